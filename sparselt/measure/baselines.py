# SPDX-License-Identifier: Apache-2.0
"""The engines that a network is timed on, one registry line each.

An engine is a function that takes a model and an example input and gives back a callable: torch
tensors in, the list of output tensors out, nothing else done per call. To add one, write the two
functions (`usable` and `load`) and a line in `BASELINES`.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

__all__ = ["BASELINES", "Baseline", "Run", "compiler", "flat_tensors", "folded", "usable_engines"]

Run = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Baseline:
    """One engine.

    Attributes:
        name: the key in `BASELINES` and the row in every table.
        dense: whether it multiplies by the zeros; the best of these is what sparselt is held to.
        usable: gives "" if the engine can run here, else a sentence that says what is missing.
        load: takes (model, example inputs) and gives the callable that is timed.
    """

    name: str
    dense: bool
    usable: Callable[[], str]
    load: Callable[[nn.Module, tuple[Tensor, ...]], Run]


def flat_tensors(output: object) -> list[Tensor]:
    """The tensors in a model's output, whatever tuples, lists and dictionaries hold them.

    Example:
        >>> len(flat_tensors({"a": torch.ones(2), "b": (torch.ones(1), None)}))
        2
    """
    leaves = _pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def compiler() -> str:
    """The C++ compiler that torch.compile would use, or "" if there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and shutil.which(name.split()[-1]):
            return name
    return ""


def folded(model: nn.Module) -> nn.Module:
    """A copy with batch norms folded into convolutions, if torch.fx can trace the model."""
    from torch.fx.experimental.optimization import fuse

    model = copy.deepcopy(model).eval()
    try:
        return fuse(model)
    except Exception:  # tracing a user's model can fail in any way; then it is only not folded
        return model


def _always() -> str:
    return ""


def _inference(model: nn.Module | Callable[..., Any]) -> Run:
    @torch.inference_mode()
    def run(*inputs: Tensor) -> list[Tensor]:
        output = model(*inputs)
        return [output] if isinstance(output, Tensor) else flat_tensors(output)

    return run


def _torch_eager(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    return _inference(folded(model))


def _torch_channels_last(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    model = folded(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(*inputs: Tensor) -> list[Tensor]:
        moved = [
            x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
        ]
        return flat_tensors(model(*moved))

    return run


def _needs_compiler() -> str:
    return "" if compiler() else "torch.compile needs a C++ compiler (g++ or clang++) on the PATH"


def _torch_compile(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    # Freezing folds batch norm and prepacks the weights: the strong form.
    return _inference(torch.compile(model, options={"freezing": True}))


def _missing(*modules: str) -> str:
    absent = [module for module in modules if find_spec(module) is None]
    if not absent:
        return ""
    return f"not installed: {', '.join(absent)} (pip install 'sparselt[compare]')"


def _needs_onnxruntime() -> str:
    return _missing("onnxruntime", "onnx", "onnxscript")


def _onnxruntime(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            copy.deepcopy(model).eval(), example, str(file), dynamo=True, verbose=False
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    names = [put.name for put in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, fed)]

    return run


def _needs_openvino() -> str:
    return _missing("openvino")


def _openvino(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    import openvino

    shapes = [list(x.shape) for x in example]
    graph = openvino.convert_model(copy.deepcopy(model).eval(), example_input=example, input=shapes)
    compiled = openvino.Core().compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # bf16 would be chosen on processors that have it
        },
    )
    request = compiled.create_infer_request()
    outputs = range(len(compiled.outputs))

    def run(*inputs: Tensor) -> list[Tensor]:
        request.infer([x.numpy() for x in inputs], share_inputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in outputs]

    return run


def _sparselt(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    import sparselt

    return _inference(sparselt.compile(copy.deepcopy(model).eval(), example))


def _sparselt_convert(model: nn.Module, example: tuple[Tensor, ...]) -> Run:
    import sparselt

    return _inference(sparselt.convert(model, example))


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("torch_eager", True, _always, _torch_eager),
        Baseline("torch_channels_last", True, _always, _torch_channels_last),
        Baseline("torch_compile", True, _needs_compiler, _torch_compile),
        Baseline("onnxruntime", True, _needs_onnxruntime, _onnxruntime),
        Baseline("openvino", True, _needs_openvino, _openvino),
        Baseline("sparselt_convert", False, _always, _sparselt_convert),
        Baseline("sparselt", False, _always, _sparselt),
    )
}


def usable_engines(example: Sequence[Tensor]) -> list[str]:
    """Names of all engines that can run here and make sense for this input.

    Example:
        >>> "torch_channels_last" in usable_engines([torch.ones(1, 4)])
        False
    """
    names = [name for name, baseline in BASELINES.items() if not baseline.usable()]
    if not any(x.ndim == 4 for x in example):
        names.remove("torch_channels_last")
    return names
