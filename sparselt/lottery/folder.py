# SPDX-License-Identifier: Apache-2.0
"""Where a run lives on disk, so that it can stop anywhere and go on.

Under torchrun one process writes, and all of them read.

::

    <root>/<network>-<data>-<hash>/
        recipe.json
        rewind.safetensors            whole state dict of the rewinding iteration
        level_03/ticket.safetensors   the level's ticket
        level_03/ticket.json          its outcome, then one file a control: reinit.json ...
        level_03/ticket.pt            checkpoint of a training that is under way
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from torch import Tensor

from sparselt.errors import TicketFileError
from sparselt.lottery import distributed
from sparselt.lottery.recipe import Recipe
from sparselt.lottery.training import Outcome
from sparselt.tickets import Ticket, load_ticket
from sparselt.tickets.file import read_safetensors, replace_file

__all__ = ["RunFolder"]


class RunFolder:
    """Reads and writes one run; without a root it keeps nothing.

    Args:
        root: Folder of all runs, or None.
        recipe: Names the run's own folder.
    """

    def __init__(self, root: str | Path | None, recipe: Recipe) -> None:
        self.path = None if root is None else Path(root) / recipe.folder_name()
        if self.path is not None and distributed.is_leader():
            replace_file(self.path / "recipe.json", recipe.to_json().encode())

    def checkpoint(self, level: int, arm: str) -> Path | None:
        """File that the training of ``arm`` at ``level`` continues from."""
        return self._file(level, f"{arm}.pt")

    def read_outcome(self, level: int, arm: str) -> Outcome | None:
        """The outcome of a finished training, or None."""
        path = self._file(level, f"{arm}.json")
        if path is None or not path.exists():
            return None
        try:
            return Outcome.from_values(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise TicketFileError(
                f"{path}: not a readable outcome ({error}); delete it to train again"
            ) from error

    def write_outcome(self, level: int, arm: str, outcome: Outcome) -> None:
        """Records a finished training."""
        path = self._file(level, f"{arm}.json")
        if path is not None and distributed.is_leader():
            replace_file(path, json.dumps(outcome.to_values()).encode())

    def read_ticket(self, level: int) -> Ticket | None:
        """The ticket of a finished level, or None."""
        path = self._file(level, "ticket.safetensors")
        return load_ticket(path) if path is not None and path.exists() else None

    def write_ticket(self, level: int, ticket: Ticket) -> None:
        """Saves the ticket of a level."""
        path = self._file(level, "ticket.safetensors")
        if path is not None and distributed.is_leader():
            ticket.save(path)

    def read_rewind(self) -> dict[str, Tensor] | None:
        """The state dict of the rewinding iteration, or None."""
        path = None if self.path is None else self.path / "rewind.safetensors"
        return read_safetensors(path)[0] if path is not None and path.exists() else None

    def write_rewind(self, state: dict[str, Tensor]) -> None:
        """Saves the state dict of the rewinding iteration."""
        if self.path is not None and distributed.is_leader():
            replace_file(self.path / "rewind.safetensors", safetensors.torch.save(state))

    def _file(self, level: int, name: str) -> Path | None:
        return None if self.path is None else self.path / f"level_{level:02d}" / name
