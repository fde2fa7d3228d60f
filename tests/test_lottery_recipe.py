# SPDX-License-Identifier: Apache-2.0
"""A recipe is a dataclass, flags, JSON and a hash, and all four agree."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace

import pytest

from sparselt import errors
from sparselt.lottery import Recipe
from sparselt.lottery.schedules import keep_fraction, learning_rate, number_of_levels

CHANGED = Recipe(
    network="conv_2",
    data="cifar10",
    seed=3,
    optimiser="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    batch=128,
    iterations=30_000,
    warmup=100,
    lr_schedule="cosine",
    lr_drops=(20_000, 25_000),
    augment=True,
    evaluate_every=7,
    levels=4,
    rate=0.3,
    conv_rate=0.1,
    output_rate=0.0,
    rates=("fc=0.5", "conv*=0.25"),
    ignore=("stem",),
    scope="global",
    schedule="cubic",
    criterion="movement",
    structure="16x1",
    restart="lr_rewind",
    rewind=500,
)


def parse(words: list[str], base: Recipe | None = None) -> Recipe:
    parser = argparse.ArgumentParser()
    Recipe.add_flags(parser)
    return Recipe.from_flags(parser.parse_args(words), base)


def test_the_example_changes_every_field() -> None:
    assert not [f.name for f in fields(Recipe) if getattr(CHANGED, f.name) == f.default]


def test_json_round_trip_is_exact() -> None:
    assert Recipe.from_json(CHANGED.to_json()) == CHANGED
    assert Recipe.from_json("{}") == Recipe()


def test_every_field_is_a_flag() -> None:
    words: list[str] = []
    for name, value in json.loads(CHANGED.to_json()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]

    assert parse(words) == CHANGED


def test_flags_change_only_what_they_name() -> None:
    assert parse([], CHANGED) == CHANGED
    assert parse(["--levels", "9"], CHANGED) == replace(CHANGED, levels=9)
    assert parse(["--no-augment"], CHANGED) == replace(CHANGED, augment=False)


def test_every_flag_has_help_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    Recipe.add_flags(parser)
    text = parser.format_help()
    assert all("--" + f.name.replace("_", "-") in text for f in fields(Recipe))
    assert text.count("(default:") + text.count("(default:\n") >= len(fields(Recipe)) - 1


def test_the_hash_is_stable_and_changes_with_every_field() -> None:
    base = Recipe()
    hashes = {
        replace(base, **{f.name: getattr(CHANGED, f.name)}).hash()
        for f in fields(Recipe)
        if f.name != "rewind"
    }

    assert Recipe().hash() == base.hash() == Recipe.from_json(base.to_json()).hash()
    assert base.hash() not in hashes
    assert len(hashes) == len(fields(Recipe)) - 1
    assert base.folder_name() == f"lenet_300_100-mnist-{base.hash()}"


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"batch": 0},
        {"iterations": 0},
        {"warmup": -1},
        {"evaluate_every": 0},
        {"levels": -1},
        {"rate": 1.0},
        {"conv_rate": -0.1},
        {"output_rate": -0.5},
        {"scope": "row"},
        {"rewind": 50_000},
        {"lr": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(errors.OptionError, match=next(iter(change))):
        Recipe.from_values(change)


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"speed": 1}', '{"levels": 2.5}', '{"levels": true}', '{"lr": "fast"}',
     '{"ignore": "fc"}', '{"lr_drops": ["a"]}', '{"augment": 1}'],
)  # fmt: skip
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(errors.OptionError):
        Recipe.from_json(text)


def test_the_learning_rate_warms_up_drops_and_stays() -> None:
    recipe = Recipe(lr=1.0, warmup=10, lr_drops=(50, 80), iterations=100)

    rates = [learning_rate(recipe, i) for i in (0, 4, 9, 10, 49, 50, 80, 99, 150)]

    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.1, 0.01, 0.01, 0.01])
    cosine = replace(recipe, lr_schedule="cosine", warmup=0)
    assert learning_rate(cosine, 0) == 1.0
    assert learning_rate(cosine, 50) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["geometric", "one_shot", "cubic"])
def test_schedules_start_dense_fall_and_end_at_the_same_density(schedule: str) -> None:
    recipe = Recipe(schedule=schedule, levels=10, rate=0.2)
    fractions = [keep_fraction(recipe, 0.2, level) for level in range(11)]

    assert fractions[0] == 1.0
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[10] == pytest.approx(0.8**10)
    assert number_of_levels(recipe) == (2 if schedule == "one_shot" else 11)


def test_the_cubic_schedule_is_zhu_and_guptas() -> None:
    recipe = Recipe(schedule="cubic", levels=4, rate=0.5)
    final_sparsity = 1 - 0.5**4
    for level in range(5):
        sparsity = final_sparsity - final_sparsity * (1 - level / 4) ** 3
        assert keep_fraction(recipe, 0.5, level) == pytest.approx(1 - sparsity)


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="schedule"):
        keep_fraction(Recipe(schedule="x"), 0.2, 1)
    with pytest.raises(errors.OptionError, match="lr_schedule"):
        learning_rate(Recipe(lr_schedule="x"), 0)
