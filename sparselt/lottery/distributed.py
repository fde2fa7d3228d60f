# SPDX-License-Identifier: Apache-2.0
"""The same search on several processes under torchrun: one shard of every batch each, one mask for
all.

Every process computes masks from the same weights, so they agree by construction; that they do is
checked all the same, because a search whose processes prune differently trains nonsense without
failing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sparselt.errors import DataError, OptionError, explain_mismatch

__all__ = ["check_same", "is_leader", "join", "shard", "share_buffers", "wrap"]

_SETTLE_SECONDS = 0.2


def join() -> bool:
    """Joins the process group that torchrun announces, once; without torchrun it does nothing.

    Returns:
        Whether there is a group of more than one process.
    """
    if not distributed.is_available() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return _active()
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return _active()


def is_leader() -> bool:
    """Whether this process is the one that writes files."""
    return not _active() or distributed.get_rank() == 0


def wrap(model: nn.Module) -> nn.Module:
    """What to run forward, so that gradients are averaged over the processes."""
    return DistributedDataParallel(model) if _active() else model


def shard(batch: Tensor) -> Tensor:
    """This process's part of a batch of indices.

    Raises:
        OptionError: The batch does not divide by the number of processes.
    """
    if not _active():
        return batch
    processes = distributed.get_world_size()
    if len(batch) % processes:
        raise OptionError(
            explain_mismatch("batch", f"a multiple of {processes} processes", len(batch))
        )
    return batch[distributed.get_rank() :: processes]


def share_buffers(model: nn.Module) -> None:
    """Gives every process the batch-norm statistics of the leader."""
    if _active():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def check_same(tensors: Mapping[str, Tensor], what: str) -> None:
    """Makes sure that all processes hold the same tensors, to the bit.

    Raises:
        DataError: They do not.
    """
    if not _active():
        return
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    found: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, digest.hexdigest())
    if len(set(found)) != 1:
        raise DataError(
            f"{what} differ between processes; do all of them read the same data and folder?"
        )


def _leave() -> None:
    if not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        # A process that leaves while another still reads from it aborts that one; but one that
        # has failed must not be waited for long.
        with contextlib.suppress(RuntimeError):
            distributed.monitored_barrier(timeout=timedelta(seconds=5))
        # Gloo's threads outlive the group (DistributedDataParallel keeps it alive), and one that
        # still has to free the tensors of its last collective needs the interpreter: once that is
        # being finalised, it ends the process with SIGABRT.
        time.sleep(_SETTLE_SECONDS)
    distributed.destroy_process_group()


def _active() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
