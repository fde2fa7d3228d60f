# SPDX-License-Identifier: Apache-2.0
"""The parent's end of a worker process: start it, ask it, end it."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

__all__ = ["Engine"]


class Engine:
    """A worker process that runs one engine; use it in a `with` block, which ends the process.

    `ask` never raises for what happens inside the worker: a crash or a time-out is an answer with
    ok = False and a reason.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        # The worker must find the same sparselt, and the classes of the user's model, as this
        # process does, whatever changed its search path.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from sparselt.measure.worker import main; main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    @property
    def process(self) -> int:
        """The id of the worker process."""
        return self._process.pid

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a worker that does not go by itself is killed."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            try:
                process.stdin.close()
            except OSError:
                process.kill()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one request and wait at most `timeout` seconds for its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except OSError:
            return self._ended()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self._process.kill()
                return {"ok": False, "reason": f"no answer within {timeout:.0f} s; stopped"}
        line = stdout.readline()
        if not line.endswith("\n"):
            return self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> dict[str, Any]:
        code = self._process.wait()
        what = f"exit code {code}"
        if code < 0:
            what = f"signal {signal.Signals(-code).name}"
        return {
            "ok": False,
            "reason": f"the engine's process ended with {what}{self._last_words()}",
        }

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""
