# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, driven by JSON lines over standard input and output.

Engines bring their own threads, and threads that spin after a call slow whatever runs next, so
engines never share a process. A worker that is not asked anything is blocked on its standard
input and uses no processor time. Requests, one line each, and their answers:

    {"do": "load", "engine": NAME, "folder": PATH, "threads": N}  -> {"ok": true, "seconds": S}
    {"do": "check"}                  -> {"ok": true, "error": E, "finite": B, "shapes": [...]}
    {"do": "round", "samples": N, "seconds": S}  -> {"ok": true, "samples_us": [...], "calls": N}
    {"do": "quit"}

Anything that goes wrong is {"ok": false, "reason": SENTENCE}. The folder is written by `model`:
model.pt with classes.json (read with weights_only, so that only the classes the parent listed can
be built), inputs.safetensors and reference.safetensors.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparselt.errors import DataError, SparseltError
from sparselt.measure.baselines import BASELINES, Run
from sparselt.measure.timer import burst, calls_for

__all__ = ["Worker", "load_example", "load_module", "output_error"]

_WARMUP_SECONDS = 0.3
# After another engine's turn a call refills the caches; one as long as this hardly notices.
_LONG_CALL_US = 2e5


def named_object(module: str, name: str) -> Any:
    """The object called `name` (dots allowed) in an importable module."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def load_module(folder: Path) -> nn.Module:
    """Read the model that `model.write_folder` left; only classes named beside it are built."""
    pairs = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    classes = [named_object(module, name) for module, name in pairs]
    with torch.serialization.safe_globals(classes):
        model = torch.load(folder / "model.pt", weights_only=True)
    if not isinstance(model, nn.Module):
        raise DataError(f"model.pt: expected a torch.nn.Module, got {type(model).__name__}")
    return model.eval()


def load_example(folder: Path, name: str) -> tuple[Tensor, ...]:
    """Tensors of a file that `model.write_folder` left, in order."""
    tensors = load_file(folder / f"{name}.safetensors")
    return tuple(tensors[key] for key in sorted(tensors, key=int))


def output_error(outputs: list[Tensor], reference: tuple[Tensor, ...]) -> float:
    """Largest absolute difference of any output, relative to that output's largest magnitude.

    Raises:
        DataError: if the number or shapes of the outputs differ from the reference.
    """
    got, want = [tuple(x.shape) for x in outputs], [tuple(x.shape) for x in reference]
    if got != want:
        raise DataError(f"output shapes: expected {want}, got {got}")
    worst = 0.0
    for x, y in zip(outputs, reference, strict=True):
        if y.numel():
            scale = max(float(y.abs().max()), 1e-30)
            worst = max(worst, float((x.double() - y).abs().max()) / scale)
    return worst


class Worker:
    """What one worker process knows: its engine, the inputs, and the reference outputs."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.reference: tuple[Tensor, ...] = ()
        self.calls = 0
        self.slowest = 0.0

    def load(self, engine: str, folder: str, threads: int) -> dict[str, Any]:
        """Build the engine from the folder's model; says how many seconds that took."""
        torch.set_num_threads(threads)
        model = load_module(Path(folder))
        self.inputs = load_example(Path(folder), "inputs")
        self.reference = load_example(Path(folder), "reference")
        start = time.perf_counter()
        self.run = BASELINES[engine].load(model, self.inputs)
        self.run(*self.inputs)
        return {"seconds": time.perf_counter() - start}

    def _loaded(self) -> Run:
        if self.run is None:
            raise DataError("no engine is loaded in this worker; send load first")
        return self.run

    def check(self) -> dict[str, Any]:
        """Compare the engine's outputs with the reference."""
        outputs = self._loaded()(*self.inputs)
        finite = all(bool(torch.isfinite(x).all()) for x in outputs)
        return {
            "error": output_error(outputs, self.reference),
            "finite": finite,
            "shapes": [list(x.shape) for x in outputs],
        }

    def round(self, samples: int, seconds: float) -> dict[str, Any]:
        """Time at least `samples` samples and `seconds`; warms up first, longer the first time.

        Where calls take long, the round ends after ten times `seconds`, with fewer samples.
        """
        run, inputs = self._loaded(), self.inputs

        def call() -> object:
            return run(*inputs)

        if self.calls == 0:
            self.calls = calls_for(call, _WARMUP_SECONDS)
        if self.slowest < _LONG_CALL_US:
            call()
        times: list[float] = []
        begin = time.perf_counter()
        spent = 0.0
        while not times or spent < seconds or (len(times) < samples and spent < 10 * seconds):
            times.extend(burst(call, 1, self.calls))
            spent = time.perf_counter() - begin
        self.slowest = max(times)
        return {"samples_us": times, "calls": self.calls}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; never raises."""
        words = dict(request)
        do = words.pop("do", "")
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "check": self.check,
            "round": self.round,
        }
        try:
            if do not in actions:
                raise DataError(f"do: expected one of {sorted(actions)}, got {do!r}")
            return {"ok": True, **actions[do](**words)}
        except SparseltError as error:
            return {"ok": False, "reason": str(error)}
        except Exception as error:  # another engine's failure is an answer, not a crash
            text = (str(error).strip().splitlines() or [""])[0]
            return {"ok": False, "reason": f"{type(error).__name__}: {text}"[:400]}


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until `quit` or the end of the input."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        if request.get("do") == "quit":
            return
        answers.write(json.dumps(worker.answer(request)) + "\n")
        answers.flush()


def main() -> None:
    """Serve on the real standard output, and send whatever libraries print to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
