# SPDX-License-Identifier: Apache-2.0
"""A pruned network behind HTTP, on the standard library's threading server.

    python examples/serve_http.py [--program FILE] [--port 8000]
    curl -d '{"inputs": [[0.1, ...]]}' http://127.0.0.1:8000

Requests come on threads of their own and call one program at the same time, which it allows. For
more than a demonstration put the same two lines into a server of your choice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import nn

import sparselt
from sparselt.program import Program

LARGEST_REQUEST = 16 << 20


def made_up_program() -> Program:
    """A perceptron of 64 inputs and 10 outputs with 90 % zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.1)
    return sparselt.compile(model, torch.randn(4, 64))


def make_server(program: Program, port: int) -> ThreadingHTTPServer:
    """A server that is not running yet; port 0 lets the system choose.

    Args:
        program: takes one tensor (B, ...) and returns another.
        port: on 127.0.0.1.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 < length <= LARGEST_REQUEST:
                    raise ValueError(f"a request of {length} bytes")
                body = json.loads(self.rfile.read(length))
                x = torch.tensor(body["inputs"], dtype=torch.float32)
                self.answer(200, {"outputs": program(x).tolist()})
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                self.answer(400, {"error": f"{type(error).__name__}: {error}"})

        def answer(self, status: int, content: dict[str, object]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing a request."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(arguments: list[str] | None = None) -> None:
    """Runs the example until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", type=Path, help="a file of Program.save")
    parser.add_argument("--port", type=int, default=8000, help="8000")
    options = parser.parse_args(arguments)
    program = sparselt.load_program(options.program) if options.program else made_up_program()
    with make_server(program, options.port) as server:
        print(f"listening on http://127.0.0.1:{server.server_address[1]}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
