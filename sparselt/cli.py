# SPDX-License-Identifier: Apache-2.0
"""The `sparselt` command: reads the arguments, calls one function, prints what it gives back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparselt
from sparselt.errors import OptionError, SparseltError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sparselt.measure.networks import Pruned
    from sparselt.measure.suites import Layer

__all__ = ["main", "parser"]

_DESCRIPTION = (
    "Finds winning lottery tickets, and runs them fast: sparse kernels and formats for PyTorch."
)
_ONLY = "cases by parts of their names, as vgg19@64 or layer3"
# What `bench` measures case by case: each is a module of `sparselt.measure` with a SWEEP.
_SWEEPS = {
    "dlmc": "time DLMC's layers with our own choice, cold, and in a program",
    "choice": "look for layers that are slower than dense with our own choice",
    "blocks": "time layers whose zeros come in blocks of output channels",
    "vector": "time linear layers at batch 1 against the memory's rate",
    "batches": "look for batch sizes at which the time per image jumps",
}
_EXIT_FAILED, _EXIT_USAGE, _EXIT_STOPPED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never shows a user's mistake as a traceback.

    Exit codes: 0 done, 1 a check failed (a wrong output, a kernel's self-test), 2 wrong input,
    130 stopped by Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    arguments = parser(words).parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("\nsparselt: stopped", file=sys.stderr)
        return _EXIT_STOPPED
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`| head`): nobody is left to tell
        return _EXIT_FAILED
    except (SparseltError, OSError, ImportError) as error:
        print(f"sparselt: {error}", file=sys.stderr)
        return _EXIT_USAGE
    return code


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line; nothing heavy is imported to build it.

    Args:
        words: What it is to parse. The flags of ``find`` need torch, so they are there only if the
            first word is ``find``.
    """
    top = argparse.ArgumentParser(prog="sparselt", description=_DESCRIPTION)
    top.add_argument("--version", action="version", version=f"sparselt {sparselt.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_quickstart, _find, _inspect, _convert, _profile, _bench, _compare, _doctor):
        add(commands)
    if words[:1] and words[0] == "find":
        from sparselt.lottery.command import add_flags

        add_flags(commands.choices["find"])
    return top


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    made.set_defaults(run=run)
    made.add_argument("--json", metavar="FILE", help="write everything measured to FILE as JSON")
    return made


def _threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of every engine (default: torch's)"
    )


def _quickstart(commands: Any) -> None:
    text = "find tickets on handwritten digits, run them sparse, and compare: under three minutes"
    command = _command(commands, "quickstart", _run_quickstart, text)
    command.add_argument(
        "--out", default="sparselt-quickstart", metavar="FOLDER", help="default: %(default)s"
    )
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    command.add_argument("--fast", action="store_true", help="a few seconds, for a smoke test")
    _threads(command)


def _find(commands: Any) -> None:
    text = "find a ticket: by iterative pruning with controls, or by another method; see --help"
    _command(commands, "find", _run_find, text)


def _inspect(commands: Any) -> None:
    text = "say what is in a ticket or checkpoint: density, blocks and size, tensor by tensor"
    command = _command(commands, "inspect", _run_inspect, text)
    command.add_argument("file", metavar="FILE", help="ticket, .pt, .safetensors, .npz, .smtx, ...")
    command.add_argument("--format", help="the file's kind, if it cannot be told from the file")


def _convert(commands: Any) -> None:
    text = "turn a pruned checkpoint of any format that inspect reads into one packed ticket file"
    command = _command(commands, "convert", _run_convert, text)
    command.add_argument("file", metavar="FILE", help="what to read")
    command.add_argument("output", metavar="OUTPUT", help="the ticket to write (.safetensors)")
    command.add_argument("--format", help="the file's kind, if it cannot be told from the file")
    command.add_argument("--model", metavar="FILE", help="trained weights, if FILE has masks only")
    command.add_argument("--initial", metavar="FILE", help="original weights, kept in the ticket")


def _network(command: argparse.ArgumentParser, more: str = "") -> None:
    known = "lenet, mlp, resnet20, vgg19, resnet50, file.py:function"
    command.add_argument("network", help=known + more)
    command.add_argument("--ticket", metavar="FILE", help="weights to load, of any readable format")
    command.add_argument(
        "--density", type=float, default=0.1, help="random zeros without a ticket (default: 0.1)"
    )
    command.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N")
    command.add_argument("--input", metavar="C,H,W", help="shape of one input, without the batch")
    _threads(command)


def _profile(commands: Any) -> None:
    text = "say where the time of a call of a compiled network goes, layer by layer"
    command = _command(commands, "profile", _run_profile, text)
    _network(command)
    command.add_argument("--trace", metavar="FILE", help="the same as a Chrome trace, for Perfetto")


def _bench(commands: Any) -> None:
    text = "time networks, layers or one kernel against the strongest dense engines"
    made = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    kinds = made.add_subparsers(title="what to time", required=True, metavar="KIND")
    model = _command(
        kinds,
        "model",
        _run_bench_model,
        "time a whole network, every engine in its own process, outputs checked first",
    )
    _network(model, ", or all: the table")
    model.add_argument("--engines", metavar="A,B", help="default: all that are installed")
    model.add_argument("--rounds", type=_positive, help="turns (default: 10; of the table 8)")
    table = model.add_argument_group("all: every network, batch and share of zeros")
    table.add_argument("--check", action="store_true", help="no times: errors against float64")
    layers = _command(
        kinds, "layers", _run_bench_layers, "time the layers of a known network, kernel by kernel"
    )
    layers.add_argument("suite", help="matrix, lenet, mlp, resnet20, vgg19 or resnet50")
    kernel = _command(
        kinds, "kernel", _run_bench_kernel, "time every kernel on one product y = W x"
    )
    kernel.add_argument("--shape", default="512x512x784", metavar="MxKxN", help="%(default)s")
    groups: list[Any] = [table]
    for kind, text in _SWEEPS.items():
        groups.append(_command(kinds, kind, _run_bench_sweep, text))
        groups[-1].set_defaults(kind=kind)
        _threads(groups[-1])
    for group in groups:
        group.add_argument("--only", nargs="+", default=[], metavar="NAME", help=_ONLY)
        group.add_argument("--quick", action="store_true", help="fewer cases, in a hurry")
        group.add_argument("--resume", action="store_true", help="go on with --json FILE")
    for command in (layers, kernel):
        command.add_argument("--density", type=float, nargs="+", default=[0.1], metavar="D")
        command.add_argument("--batch", type=_positive, default=1, metavar="N")
        command.add_argument("--block", default="1x1", metavar="RxC", help="zeros in whole blocks")
        command.add_argument("--cold", action="store_true", help="empty the caches before a call")
        command.add_argument("--seconds", type=float, default=0.3, help="least time of each")
        _threads(command)


def _compare(commands: Any) -> None:
    text = "compare two results that bench wrote with --json, row by row"
    command = _command(commands, "compare", _run_compare, text)
    command.add_argument("before", metavar="A.json")
    command.add_argument("after", metavar="B.json")


def _doctor(commands: Any) -> None:
    text = "say what this installation can do here, and why not more; test every kernel"
    _command(commands, "doctor", _run_doctor, text)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {word!r}")
    return int(word)


def _sizes(word: str, separator: str, count: int | None, option: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 between separators."""
    parts = word.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts) or count not in (None, len(parts)):
        wanted = "numbers" if count is None else f"{count} numbers"
        raise OptionError(f"{option}: expected {wanted} joined by {separator!r}, got {word!r}")
    return tuple(int(part) for part in parts)


def _console(least_width: int = 0, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, width=max(Console(stderr=stderr).width, least_width))


def _show(*parts: RenderableType, least_width: int = 0) -> None:
    console = _console(least_width)
    for part in parts:
        console.print(part, highlight=False)


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    with _console(stderr=True).status("starting") as status:
        yield lambda text: status.update(text)


def _keep(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    from sparselt.measure.report import write_json

    if arguments.json:
        write_json(arguments.json, result)


def _set_threads(arguments: argparse.Namespace) -> None:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def _pruned(arguments: argparse.Namespace) -> Pruned:
    """The network that the arguments name, with its zeros and the shape of one input."""
    from sparselt import lottery
    from sparselt.measure import networks

    shape = _sizes(arguments.input, ",", None, "--input") if arguments.input else None
    spec: str | networks.Network = arguments.network
    if shape and spec in lottery.NETWORKS:
        spec = networks.Network(lambda: lottery.NETWORKS[arguments.network](shape, 10))
    return networks.pruned_network(spec, shape, arguments.ticket, arguments.density)


def _failed(result: dict[str, Any]) -> int:
    return _EXIT_FAILED if any(row["status"] == "FAIL" for row in result["rows"]) else 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from sparselt.measure import doctor, report

    result = doctor.doctor()
    lines = doctor.kernel_lines(result["kernels"])
    _show(
        report.rich_table("This installation", doctor.FACT_COLUMNS, result["rows"]),
        report.rich_table("Kernels", doctor.KERNEL_COLUMNS, lines),
        doctor.ADVICE,
    )
    _keep(arguments, result)
    return 0 if result["healthy"] else _EXIT_FAILED


def _run_inspect(arguments: argparse.Namespace) -> int:
    from sparselt.measure import inspection, report

    hints = {"format": arguments.format} if arguments.format else {}
    result = inspection.inspect_file(arguments.file, **hints)
    table = report.rich_table(result["file"], inspection.INSPECT_COLUMNS, result["rows"])
    _show(table, inspection.summary(result))
    _keep(arguments, result)
    return 0


def _run_convert(arguments: argparse.Namespace) -> int:
    from sparselt.measure import inspection

    names = ("format", "model", "initial")
    hints = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    sparselt.load_ticket(arguments.file, **hints).save(arguments.output)
    result = inspection.inspect_file(arguments.output)
    _show(f"Wrote {arguments.output}.", inspection.summary(result))
    _keep(arguments, result)
    return 0


def _run_profile(arguments: argparse.Namespace) -> int:
    from sparselt.measure import command

    _set_threads(arguments)
    with _status() as progress:
        result, shown = command.profile(arguments, _pruned(arguments), progress)
    _show(shown, least_width=110)
    _keep(arguments, result)
    return 0


def _run_bench_model(arguments: argparse.Namespace) -> int:
    from sparselt.measure import command

    if arguments.network == "all":
        result, table = (command.check_all if arguments.check else command.time_all)(arguments)
        _show(table, least_width=140)
    else:
        with _status() as progress:
            result, shown = command.time_one(arguments, _pruned(arguments), progress)
        _show(*shown)
    _keep(arguments, result)
    return _failed(result)


def _run_bench_layers(arguments: argparse.Namespace) -> int:
    from sparselt.measure import suites

    return _time_layers(arguments, suites.suite(arguments.suite))


def _run_bench_kernel(arguments: argparse.Namespace) -> int:
    from sparselt.measure.suites import Layer

    rows, cols, columns = _sizes(arguments.shape, "x", 3, "--shape")
    return _time_layers(arguments, (Layer("matrix", rows, cols, columns=columns),))


def _time_layers(arguments: argparse.Namespace, layers: Sequence[Layer]) -> int:
    from sparselt.measure import layers as timing
    from sparselt.measure import report

    _set_threads(arguments)
    block = _sizes(arguments.block, "x", 2, "--block")
    with _status() as progress:
        result = timing.bench_layers(
            layers,
            arguments.density,
            batch=arguments.batch,
            block=(block[0], block[1]),
            seconds=arguments.seconds,
            cold=arguments.cold,
            progress=progress,
        )
    _show(*report.layer_tables(result))
    _keep(arguments, result)
    return _failed(result)


def _run_bench_sweep(arguments: argparse.Namespace) -> int:
    from sparselt.measure import command

    _set_threads(arguments)
    result, table = command.time_sweep(arguments)
    _show(table, least_width=130)
    return _failed(result)


def _run_compare(arguments: argparse.Namespace) -> int:
    from sparselt.measure import report

    before, after = (report.read_json(file) for file in (arguments.before, arguments.after))
    rows, warning = report.compare(before, after)
    title = f"{Path(arguments.before).name} against {Path(arguments.after).name}"
    _show(report.rich_table(title, report.COMPARE_COLUMNS, rows, warning))
    _keep(arguments, {"kind": "compare", "machine": after["machine"], "rows": rows})
    return 0


def _run_quickstart(arguments: argparse.Namespace) -> int:
    from sparselt import quickstart

    _set_threads(arguments)
    result = quickstart.run(arguments.out, seed=arguments.seed, fast=arguments.fast)
    _keep(arguments, result)
    return _failed(result)


def _run_find(arguments: argparse.Namespace) -> int:
    from sparselt import frontier
    from sparselt.lottery import command
    from sparselt.measure.machine import header

    run = frontier.find_frontier if arguments.frontier else command.find
    _keep(arguments, {"kind": "find", "machine": header(), **run(arguments)})
    return 0
