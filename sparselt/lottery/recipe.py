# SPDX-License-Identifier: Apache-2.0
"""One recipe is one dataclass is one set of command-line flags is one JSON file is one hash.

The hash names the run's folder, so two runs with different settings never share one and the same
settings always find theirs again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from sparselt.errors import OptionError, explain_mismatch

__all__ = ["Recipe"]


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a search, and nothing else.

    The defaults are the published settings of LeNet-300-100 on MNIST (Frankle and Carbin 2018,
    figure 2).

    Raises:
        OptionError: A value is outside its range.

    Example:
        >>> recipe = Recipe(levels=3, rate=0.5)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    network: str = _option(
        "lenet_300_100", "a key of NETWORKS, or a name of your own for your module"
    )
    data: str = _option("mnist", "a key of DATASETS, or a name of your own for your tensors")
    seed: int = _option(0, "seed of the original weights, the data order and every random choice")
    optimiser: str = _option("adam", "a key of OPTIMISERS")
    lr: float = _option(1.2e-3, "learning rate")
    momentum: float = _option(0.0, "momentum of sgd")
    weight_decay: float = _option(0.0, "weight decay")
    batch: int = _option(60, "examples in a batch")
    iterations: int = _option(50_000, "training iterations of each level")
    warmup: int = _option(0, "iterations over which the learning rate rises linearly from 0")
    lr_schedule: str = _option("step", "a key of LR_SCHEDULES: step or cosine")
    lr_drops: tuple[int, ...] = _option((), "iterations at which step divides the rate by 10")
    augment: bool = _option(False, "random flips and shifts of images, as for CIFAR-10")
    evaluate_every: int = _option(100, "iterations between two looks at the validation split")
    levels: int = _option(19, "pruning rounds after the dense level")
    rate: float = _option(0.2, "share of the remaining weights pruned a round, linear layers")
    conv_rate: float = _option(0.2, "the same for convolutions")
    output_rate: float = _option(-1.0, "the same for the output layer; -1 means half of rate")
    rates: tuple[str, ...] = _option((), "rates of single layers, as PATTERN=RATE")
    ignore: tuple[str, ...] = _option((), "name patterns of weights that are never pruned")
    scope: str = _option(
        "layer", "rank weights within a layer, or over all layers: layer or global"
    )
    schedule: str = _option("geometric", "a key of SCHEDULES: geometric, one_shot or cubic")
    criterion: str = _option(
        "magnitude", "a key of CRITERIA: what is pruned first is smallest in it"
    )
    structure: str = _option("1x1", "unit of pruning: RxC blocks, N:M, or filter")
    restart: str = _option("rewind", "a key of RESTARTS: what training starts from after pruning")
    rewind: int = _option(0, "iteration to which weights, schedule and data order go back")

    def __post_init__(self) -> None:
        limits: dict[str, tuple[bool, str]] = {
            "lr": (self.lr > 0, "a number above 0"),
            "momentum": (0 <= self.momentum < 1, "a number from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "a number of at least 0"),
            "batch": (self.batch >= 1, "at least 1"),
            "iterations": (self.iterations >= 1, "at least 1"),
            "warmup": (self.warmup >= 0, "at least 0"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "levels": (self.levels >= 0, "at least 0"),
            "rate": (0 <= self.rate < 1, "a number from 0 to below 1"),
            "conv_rate": (0 <= self.conv_rate < 1, "a number from 0 to below 1"),
            "output_rate": (
                self.output_rate == -1 or 0 <= self.output_rate < 1,
                "-1, or 0 to below 1",
            ),
            "scope": (self.scope in ("layer", "global"), "layer or global"),
            "rewind": (
                0 <= self.rewind < self.iterations,
                f"0 to below {self.iterations} iterations",
            ),
        }
        for name, (holds, expected) in limits.items():
            if not holds:
                raise OptionError(explain_mismatch(name, expected, getattr(self, name)))

    def to_json(self) -> str:
        """The recipe as JSON, one key a field, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of :meth:`to_json`; absent keys take their defaults.

        Raises:
            OptionError: Not JSON, an unknown key, or a value of the wrong type.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise OptionError(f"recipe: expected JSON, got {error}") from error
        if not isinstance(values, dict):
            raise OptionError(explain_mismatch("recipe", "a JSON object", type(values).__name__))
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values, checked for names and types."""
        types = get_type_hints(cls)
        unknown = sorted(set(values) - set(types))
        if unknown:
            raise OptionError(explain_mismatch("recipe", f"fields {', '.join(types)}", unknown))
        return cls(**{name: _coerce(name, types[name], value) for name, value in values.items()})

    def hash(self) -> str:
        """12 hexadecimal digits that stay the same as long as every setting does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def folder_name(self) -> str:
        """Name of the run's folder: readable, and unique by the hash."""
        return f"{self.network}-{self.data}-{self.hash()}"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Adds one flag a field to ``parser``; flags that are not given leave no trace in its
        result.
        """
        types = get_type_hints(cls)
        group = parser.add_argument_group("recipe")
        for item in fields(cls):
            kind = types[item.name]
            flag = f"--{item.name.replace('_', '-')}"
            shown = f"{item.metadata['help']} (default: {item.default})"
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            elif kind in (int, float, str):
                group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)
            else:
                inner = int if kind == tuple[int, ...] else str
                group.add_argument(flag, type=inner, nargs="*", **options)

    @classmethod
    def from_flags(cls, flags: argparse.Namespace, base: Recipe | None = None) -> Recipe:
        """The recipe that ``flags`` ask for, starting from ``base`` (or from the defaults)."""
        known = {item.name for item in fields(cls)}
        given = {name: value for name, value in vars(flags).items() if name in known}
        checked = cls.from_values(given)
        chosen = {name: getattr(checked, name) for name in given}
        return replace(base or cls(), **chosen)


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, where that loses nothing."""
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    inner = {tuple[int, ...]: int, tuple[str, ...]: str}.get(kind)
    if inner and isinstance(value, (list, tuple)) and all(type(item) is inner for item in value):
        return tuple(value)
    shown = (
        kind.__name__
        if kind in (int, float, bool, str)
        else f"a list of {inner and inner.__name__}"
    )
    raise OptionError(explain_mismatch(f"recipe field {name}", shown, repr(value)))
