# SPDX-License-Identifier: Apache-2.0
"""The command line: every command runs, mistakes are one sentence, and results can be kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sparselt
from sparselt import cli

COMMANDS = ["quickstart", "find", "inspect", "convert", "bench", "compare", "doctor"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    layer = nn.Linear(40, 30)
    layer.weight.data.mul_(torch.rand(30, 40) < 0.2)
    torch.save(layer.state_dict(), tmp_path / "pruned.pt")
    return tmp_path / "pruned.pt"


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparselt", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **more},
        check=False,
    )


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["bench", "model"]])
def test_help_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: sparselt" in shown
    if not words:
        assert all(name in shown for name in COMMANDS)


def test_building_the_parser_imports_nothing_heavy_of_ours() -> None:
    code = (
        "import sys; from sparselt.cli import parser; parser(); "
        "print({'rich', 'sparselt.lottery', 'sparselt.measure'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_module_and_version_answer() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"sparselt {sparselt.__version__}"


def test_doctor_prints_and_keeps_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    shown = capsys.readouterr().out
    assert "Masks alone give no speed" in shown
    assert "csr_spmm_scalar" in shown
    assert json.loads((tmp_path / "d.json").read_text())["healthy"] is True


def test_inspect_names_density_and_size(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = checkpoint.with_suffix(".json")
    assert cli.main(["inspect", str(checkpoint), "--json", str(target)]) == 0
    assert "30x40" in capsys.readouterr().out
    (row,) = json.loads(target.read_text())["rows"]
    assert row["total"] == 1200
    assert row["density"] == pytest.approx(row["kept"] / 1200)


def test_convert_makes_a_smaller_file_with_the_same_weights(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = checkpoint.with_name("packed.safetensors")
    assert cli.main(["convert", str(checkpoint), str(packed)]) == 0
    assert packed.stat().st_size < checkpoint.stat().st_size
    want = torch.load(checkpoint, weights_only=True)
    got = sparselt.load_ticket(packed).weights
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert "Wrote" in capsys.readouterr().out


def test_bench_kernel_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    for file in files:
        words = ["bench", "kernel", "--shape", "32x48x40", "--seconds", "0.01", "--threads", "1"]
        assert cli.main([*words, "--json", file]) == 0
    assert "csr_spmm_scalar" in capsys.readouterr().out
    assert cli.main(["compare", *files]) == 0
    assert "verdict" in capsys.readouterr().out
    assert json.loads(Path(files[0]).read_text())["machine"]["threads"] == 1


def test_bench_layers_of_many_cases_prints_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        "layers",
        "lenet",
        "--density",
        "0.1",
        "0.2",
        "--seconds",
        "0",
        "--batch",
        "4",
    ]
    assert cli.main(words) == 0
    assert "Geometric mean" in capsys.readouterr().out


def test_bench_model_runs_a_ticket_of_a_users_network(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    source = checkpoint.with_name("users_network.py")
    source.write_text("from torch import nn\ndef build():\n    return nn.Linear(40, 30)\n")
    target = checkpoint.with_suffix(".json")
    words = ["bench", "model", f"{source}:build", "--ticket", str(checkpoint), "--input", "40"]
    words += ["--engines", "torch_eager,sparselt", "--rounds", "2", "--threads", "1"]
    assert cli.main([*words, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert [row["status"] for row in result["rows"]] == ["ok", "ok"]
    assert result["cases"][0]["density"] < 0.3
    assert "sparselt" in capsys.readouterr().out


def test_profile_accounts_for_the_whole_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, trace = tmp_path / "p.json", tmp_path / "trace.json"
    words = ["profile", "lenet", "--batch", "2", "--threads", "1", "--density", "0.2"]
    assert cli.main([*words, "--json", str(target), "--trace", str(trace)]) == 0
    (case,) = json.loads(target.read_text())["cases"]
    assert case["density"] == pytest.approx(0.2, abs=0.01)
    assert sum(row["us"] for row in case["rows"]) == pytest.approx(case["total_us"])
    assert json.loads(trace.read_text())["traceEvents"]
    shown = capsys.readouterr().out
    assert "lenet, batch 2" in shown
    assert "us in all" in shown


def test_find_writes_a_ticket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, not installed")
    words = ["find", "--network", "lenet_300_100", "--data", "digits", "--iterations", "20"]
    words += ["--levels", "1", "--rate", "0.5", "--out", str(tmp_path / "t.safetensors")]
    assert cli.main([*words, "--json", str(tmp_path / "t.json")]) == 0
    assert sparselt.load_ticket(tmp_path / "t.safetensors").density < 0.6
    shown = capsys.readouterr().out
    assert "reinit" in shown
    assert "Wrote" in shown
    result = json.loads((tmp_path / "t.json").read_text())
    assert [row["arm"] for row in result["rows"]] == ["ticket", "ticket", "reinit"]
    assert result["machine"]


def test_find_measures_a_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn, not installed")
    words = ["find", "--recipe", "digits_lenet", "--iterations", "20", "--levels", "1"]
    words += ["--frontier", "channels", "--batches", "2", "--json", str(tmp_path / "f.json")]
    assert cli.main(words) == 0
    assert "at batch 2" in capsys.readouterr().out
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["structure"] for row in rows] == ["dense", "channels"]


def test_find_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["find", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--method", "--stability", "--frontier", "--dead-units", "--diagnose", "--rewind"):
        assert flag in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "absent.pt"], "no such file"),
        (["convert", "absent.pt", "x.safetensors"], "no such file"),
        (["compare", "absent.json", "absent.json"], "absent.json"),
        (["find", "--recipe", "absent"], "recipe: expected one of"),
        (["find", "--data", "absent"], "absent"),
        (["bench", "kernel", "--shape", "512x512"], "--shape: expected 3 numbers"),
        (["bench", "kernel", "--block", "0x1"], "--block"),
        (["bench", "kernel", "--density", "2", "--shape", "4x4x4"], "density: expected 0 to 1"),
        (["bench", "layers", "alexnet"], "suite: expected one of"),
        (["bench", "model", "alexnet"], "network: expected one of"),
        (["bench", "model", "lenet", "--engines", "tensorrt"], "engines: expected some of"),
        (["bench", "model", "lenet", "--ticket", "absent.pt"], "no such file"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("sparselt: ")
    assert sentence in shown.err
    assert "Traceback" not in shown.err


def test_a_file_that_is_no_checkpoint_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.pt", "x.safetensors", "x.npz", "x.smtx", "x.txt"):
        (tmp_path / name).write_bytes(b"\x80\x02garbage")
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("sparselt: ")


def test_unknown_command_and_bad_number_are_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["dance"], [], ["bench", "kernel", "--threads", "0"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_unwritable_output_is_a_sentence(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    under_a_file = checkpoint / "x.json"
    assert cli.main(["inspect", str(checkpoint), "--json", str(under_a_file)]) == 2
    assert "sparselt: " in capsys.readouterr().err


# Says when timing begins: an interrupt while torch is imported may be lost in its own handlers.
# A shell that started the tests in the background has them ignore interrupts: undone here.
INTERRUPTED = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

from sparselt import cli
from sparselt.measure import layers

bench_layers = layers.bench_layers


def told(*arguments, **options):
    print("timing", flush=True)
    return bench_layers(*arguments, **options)


layers.bench_layers = told
exit(cli.main(["bench", "kernel", "--seconds", "60", "--json", "never.json"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent the POSIX way")
def test_interrupt_ends_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "timing\n"
    for attempt in range(4):
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
            break
        except subprocess.TimeoutExpired:  # Python drops what is raised in a finaliser
            if attempt == 3:
                process.kill()
                raise
    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "never.json").exists()


def test_forced_instruction_set_that_is_unknown_is_explained() -> None:
    done = run("doctor", SPARSELT_ISA="quantum")
    assert done.returncode != 0
    assert "SPARSELT_ISA: expected" in done.stderr
