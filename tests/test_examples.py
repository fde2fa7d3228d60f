# SPDX-License-Identifier: Apache-2.0
"""Every example runs offline, on made-up weights, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {"pruned_resnet", "prune_module", "score_folder", "serve_http"}


@pytest.fixture(autouse=True)
def one_thread(fixed_threads):
    torch.set_num_threads(1)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_the_pruned_resnet_is_compiled_profiled_and_kept(tmp_path, capsys):
    example("pruned_resnet").main(["--out", str(tmp_path), "--batch", "4"])
    told = capsys.readouterr().out
    error = float(told.partition("largest difference to the model: ")[2].split()[0])
    assert error < 1e-4
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "loaded from its file: Program of Sequential" in told
    example("pruned_resnet").main(
        ["--state-dict", str(tmp_path / "resnet.pt"), "--out", str(tmp_path / "again")]
    )


def test_a_model_pruned_by_torch_is_converted_and_compiled(capsys):
    example("prune_module").main([])
    told = capsys.readouterr().out
    errors = [float(line.split()[-1]) for line in told.splitlines() if "difference" in line]
    assert len(errors) == 2
    assert max(errors) < 1e-4


def test_a_folder_is_scored_by_a_saved_program_as_by_the_fresh_one(tmp_path, capsys):
    module = example("score_folder")
    fresh, loaded = tmp_path / "a.csv", tmp_path / "b.csv"
    module.main([str(tmp_path / "arrays"), "--out", str(fresh)])
    program = tmp_path / "program.safetensors"
    module.made_up_program().save(program)
    module.main(
        [str(tmp_path / "arrays"), "--out", str(loaded), "--program", str(program), "--batch", "7"]
    )
    lines = [file.read_text().splitlines() for file in (fresh, loaded)]
    assert len(lines[0]) == 151
    assert [line.split(",")[:2] for line in lines[0]] == [line.split(",")[:2] for line in lines[1]]
    (tmp_path / "arrays" / "odd.npy").write_bytes((tmp_path / "a.csv").read_bytes())
    with pytest.raises(ValueError, match="allow_pickle"):
        module.main([str(tmp_path / "arrays"), "--out", str(fresh)])


def test_the_server_answers_several_clients_and_refuses_nonsense():
    module = example("serve_http")
    program = module.made_up_program()
    server = module.make_server(program, 0)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    running = threading.Thread(target=server.serve_forever)
    running.start()
    inputs = [torch.randn(batch, 64) for batch in (1, 3, 5, 8)]
    answers: dict[int, torch.Tensor] = {}

    def ask(i: int) -> None:
        content = json.dumps({"inputs": inputs[i].tolist()}).encode()
        with urllib.request.urlopen(url, content, timeout=60) as answer:
            answers[i] = torch.tensor(json.load(answer)["outputs"])

    try:
        clients = [threading.Thread(target=ask, args=(i,)) for i in range(len(inputs))]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        for i, x in enumerate(inputs):
            torch.testing.assert_close(answers[i], program(x), rtol=1e-3, atol=1e-4)
        for nonsense in (b"no json", b'{"inputs": "text"}', b'{"other": 1}', b'{"inputs": [[1]]}'):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url, nonsense, timeout=60)
            assert refused.value.code == 400
            assert "error" in json.load(refused.value)
    finally:
        server.shutdown()
        server.server_close()
        running.join()
