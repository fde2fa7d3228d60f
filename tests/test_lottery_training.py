# SPDX-License-Identifier: Apache-2.0
"""The training loop: deterministic, resumable, and honest about what it looks at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lottery_cases import RECIPE as TINY
from lottery_cases import KilledError, blobs, one_thread  # noqa: F401
from lottery_cases import network as tiny
from torch import Tensor, nn

from sparselt import errors
from sparselt.lottery import OPTIMISERS, Data, Outcome, Step, Training, evaluate, train

RECIPE = replace(TINY, iterations=60)


def network(dropout: float = 0.0) -> nn.Sequential:
    """The shared network, with the same weights at every call."""
    torch.manual_seed(0)
    return tiny(dropout)


def half(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_a_killed_training_ends_bitwise_as_an_uninterrupted_one(
    tmp_path: Path, optimiser: str
) -> None:
    recipe = replace(RECIPE, optimiser=optimiser, momentum=0.9, weight_decay=1e-3, warmup=20)
    whole, parts = network(dropout=0.3), network(dropout=0.3)
    want = train(whole, blobs(), Training(recipe), half(whole))

    def kill(step: Step) -> None:
        if step.iteration in (20, 40) and step.iteration not in killed:
            killed.append(step.iteration)
            raise KilledError

    killed: list[int] = []
    how = Training(recipe, progress=kill, checkpoint=tmp_path / "c.pt", checkpoint_seconds=0)
    for _ in range(2):
        with pytest.raises(KilledError):
            train(parts, blobs(), how, half(parts))
        parts = network(dropout=0.3)
    got = train(parts, blobs(), how, half(parts))

    assert same(whole, parts)
    assert got == want
    assert killed == [20, 40]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    how = Training(RECIPE, checkpoint=path)
    path.write_bytes(b"noise")
    with pytest.raises(errors.DataError, match=r"c\.pt.*delete"):
        train(network(), blobs(), how)
    torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(errors.DataError, match=r"c\.pt.*delete"):
        train(network(), blobs(), how)


def test_an_optimiser_of_ones_own_is_one_line_and_keeps_pruned_weights_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OPTIMISERS, "mine", lambda p, r: torch.optim.RMSprop(p, r.lr, momentum=0.9))
    model = network()
    masks = half(model)

    outcome = train(model, blobs(), Training(replace(RECIPE, optimiser="mine")), masks)

    assert outcome.train_accuracy > 0.8
    for name, mask in masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()


def test_the_data_order_is_a_function_of_the_iteration_alone() -> None:
    seen: dict[int, list[list[Tensor]]] = {0: [], 7: []}
    for start, batches in seen.items():
        model = network()
        model.register_forward_pre_hook(
            lambda m, inputs, batches=batches: batches.append(inputs[0]) if m.training else None
        )
        train(model, blobs(), Training(RECIPE, start=start, stop=12))

    assert len(seen[0]) == 12
    for late, early in zip(seen[7], seen[0][7:], strict=True):
        assert torch.equal(late, early)


def test_every_example_is_seen_once_an_epoch() -> None:
    model, batches = network(), []
    model.register_forward_pre_hook(
        lambda m, inputs: batches.append(inputs[0]) if m.training else None
    )
    data = blobs()

    train(model, data, Training(replace(RECIPE, batch=20), stop=6))

    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat(epoch).unique(dim=0)) == 60
    assert not torch.equal(batches[0], batches[3])


def test_seeds_decide_everything_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    models = []
    for order in (1, 1, 2):
        model = network(dropout=0.2)
        torch.manual_seed(9)
        train(model, blobs(), Training(RECIPE, order_seed=order))
        models.append(model)

    assert torch.equal(torch.rand(3), expected)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_training_moves_negative_weights_too() -> None:
    model = network()
    before = model.get_parameter("0.weight").detach().clone()

    train(model, blobs(), Training(RECIPE))

    moved = model.get_parameter("0.weight").detach() != before
    assert moved[before < 0].all()
    assert moved[before > 0].all()


def test_pruned_weights_are_zero_before_every_step_and_at_the_end() -> None:
    model = network()
    masks, looks = half(model), []

    def observe(iteration: int, observed: nn.Module) -> None:
        looks.append(iteration)
        for name, mask in masks.items():
            assert not observed.get_parameter(name).detach()[~mask].any()

    recipe = replace(RECIPE, optimiser="sgd", momentum=0.9, weight_decay=0.1)
    train(model, blobs(), Training(recipe, observe=observe), masks)

    assert looks == list(range(61))


def test_early_stopping_looks_at_the_validation_loss_and_not_at_the_test_split() -> None:
    data = blobs()
    swapped = Data(data.train, data.validation, (data.test[0], (data.test[1] + 1) % 3), classes=3)

    first = train(network(), data, Training(RECIPE))
    second = train(network(), swapped, Training(RECIPE))

    losses = [row[1] for row in first.history]
    assert [row[0] for row in first.history] == [10, 20, 30, 40, 50, 60]
    assert first.early_stop_iteration == first.history[losses.index(min(losses))][0]
    assert second.early_stop_iteration == first.early_stop_iteration
    assert second.history == first.history
    assert second.test_accuracy != first.test_accuracy


def test_the_outcome_describes_the_model_it_leaves() -> None:
    model, data = network(dropout=0.5), blobs()

    outcome = train(model, data, Training(RECIPE))

    assert evaluate(model, data.test) == (outcome.test_loss, outcome.test_accuracy)
    assert evaluate(model, data.train) == (outcome.train_loss, outcome.train_accuracy)
    assert outcome.validation_accuracy == outcome.history[-1][2]
    assert outcome.train_accuracy > 0.8
    assert Outcome.from_values(outcome.to_values()) == outcome


def test_evaluation_is_exact_and_puts_the_mode_back() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    outputs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])

    loss, accuracy = evaluate(model, (outputs, torch.tensor([0, 1, 1])))

    assert accuracy == pytest.approx(2 / 3)
    expected = nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 1])).item()
    assert loss == pytest.approx(expected)
    assert model.training


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(errors.DataError, match="learning rate"):
        train(network(), blobs(), Training(replace(RECIPE, optimiser="sgd", lr=1e30)))


def test_unknown_optimisers_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="adamw"):
        train(network(), blobs(), Training(replace(RECIPE, optimiser="lion")))


def test_a_batch_larger_than_the_data_is_the_whole_data() -> None:
    assert train(network(), blobs(), Training(replace(RECIPE, batch=10_000))).train_accuracy > 0.5


def test_augmentation_flips_and_shifts_but_invents_nothing() -> None:
    from sparselt.lottery.training import _augmented

    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)

    moved = _augmented(images)

    variants = []
    for flipped in (images[0, 0], images[0, 0].flip(1)):
        padded = nn.functional.pad(flipped, (4, 4, 4, 4))
        variants += [padded[t : t + 8, l : l + 8] for t in range(9) for l in range(9)]  # noqa: E741
    known = torch.stack(variants).flatten(1)
    for image in moved[:, 0]:
        assert (known == image.flatten()).all(1).any()
    assert len(moved.flatten(1).unique(dim=0)) > 20
