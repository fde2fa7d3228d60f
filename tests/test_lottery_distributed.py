# SPDX-License-Identifier: Apache-2.0
"""One search on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lottery_cases import RECIPE, blobs, one_thread  # noqa: F401
from torch import distributed, nn

import sparselt
from sparselt import errors
from sparselt.lottery import Progress, run_levels
from sparselt.lottery.distributed import check_same, is_leader, join, shard, wrap
from sparselt.tickets import load_ticket

RECIPE_AT_10 = replace(RECIPE, rewind=10)


def smooth() -> nn.Sequential:
    """Without batch norm, so that shards change nothing but rounding."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def search_together(out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    options = {"controls": ("reinit",), "folder": out / "runs"}

    levels = list(run_levels(smooth, blobs(), RECIPE_AT_10, **options))

    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2
    assert is_leader() == (rank == 0)
    levels[-1].ticket.save(out / f"rank_{rank}.safetensors")
    distributed.barrier()
    list(run_levels(smooth, blobs(), RECIPE_AT_10, progress=refuse, **options))
    assert len(shard(torch.arange(6))) == 3
    with pytest.raises(errors.OptionError, match="multiple of 2"):
        shard(torch.arange(5))
    with pytest.raises(errors.DataError, match="masks differ"):
        check_same({"w": torch.tensor([float(rank)])}, "masks")


def refuse(now: Progress) -> None:
    """A progress report that must not come, because the run is finished."""
    raise AssertionError("trained again")


@pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch has no gloo back end",
)
def test_two_processes_find_one_ticket_and_one_of_them_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(Path(sparselt.__file__).parents[1]), *sys.path]

    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )

    assert done.returncode == 0, done.stderr[:3000]
    first, second = (load_ticket(tmp_path / f"rank_{rank}.safetensors") for rank in (0, 1))
    alone = list(run_levels(smooth, blobs(), RECIPE_AT_10))[-1].ticket
    for name, mask in first.masks.items():
        assert torch.equal(mask, second.masks[name])
        assert torch.equal(first.weights[name], second.weights[name])
        assert float((mask == alone.masks[name]).float().mean()) > 0.95
        torch.testing.assert_close(first.weights[name], alone.weights[name], atol=0.05, rtol=0)
    saved = load_ticket(
        tmp_path / "runs" / RECIPE_AT_10.folder_name() / "level_03" / "ticket.safetensors"
    )
    assert all(torch.equal(saved.masks[name], mask) for name, mask in first.masks.items())


def test_without_torchrun_nothing_is_distributed() -> None:
    model, batch = smooth(), torch.arange(5)

    assert not join()
    assert is_leader()
    assert wrap(model) is model
    assert shard(batch) is batch
    check_same({"w": torch.ones(1)}, "weights")


if __name__ == "__main__":
    search_together(Path(sys.argv[1]))
