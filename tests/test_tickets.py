# SPDX-License-Identifier: Apache-2.0
"""Tickets: what a mask means, the file, its round trip, and hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselt import errors
from sparselt.tickets import Ticket, load_ticket
from sparselt.tickets.file import pack_bits, unpack_bits


def sample_ticket(density: float = 0.2, seed: int = 0, initial: bool = True) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "conv.weight": torch.randn(8, 3, 5, 5, generator=generator),
        "conv.bias": torch.randn(8, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randn(33, 17, generator=generator),
    }
    names = ("conv.weight", "fc.weight")
    masks = {n: torch.rand(weights[n].shape, generator=generator) < density for n in names}
    first = {n: torch.randn(weights[n].shape, generator=generator) for n in names if initial}
    return Ticket(masks, weights, first, {"seed": seed, "recipe": {"lr": 0.1}})


def assert_same(got: Ticket, want: Ticket) -> None:
    for part in ("masks", "weights", "initial"):
        left, right = getattr(got, part), getattr(want, part)
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), name
    assert got.meta == want.meta


class TestTicket:
    def test_weights_outside_the_mask_become_exact_zeros(self) -> None:
        weights = {"w": torch.tensor([[float("nan"), -2.0], [3.0, float("inf")]])}

        ticket = Ticket({"w": torch.tensor([[False, True], [True, False]])}, weights)

        assert ticket.weights["w"].tolist() == [[0.0, -2.0], [3.0, 0.0]]

    def test_density_counts_kept_zeros_and_only_masked_tensors(self) -> None:
        mask = torch.tensor([[True, False, False, False]])
        ticket = Ticket({"w": mask}, {"w": torch.zeros(1, 4), "b": torch.ones(50)})

        assert ticket.density == 0.25
        assert ticket.layers()[0].kept == 1
        assert ticket.layers()[0].density == 0.25

    def test_apply_loads_everything_and_returns_the_model(self) -> None:
        model = nn.Linear(17, 33)
        ticket = Ticket(
            {"weight": torch.rand(33, 17) < 0.3}, {k: v + 1 for k, v in model.state_dict().items()}
        )

        assert ticket.apply(model) is model

        for name, value in ticket.weights.items():
            assert torch.equal(model.state_dict()[name], value)

    def test_a_ticket_of_masks_only_zeroes_pruned_weights_and_nothing_else(self) -> None:
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        mask = torch.tensor([[True, False, True], [False, True, True]])

        Ticket({"weight": mask}).apply(model)

        assert torch.equal(model.weight, before * mask)

    def test_a_refused_apply_leaves_the_model_as_it_was(self) -> None:
        model = nn.Linear(4, 3)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        wrong_shape = Ticket(
            {"weight": torch.ones(3, 5, dtype=torch.bool)},
            {"bias": torch.ones(3), "weight": torch.ones(3, 5)},
        )
        wrong_names = Ticket({"w": torch.ones(3, 4, dtype=torch.bool)}, {"w": torch.ones(3, 4)})

        with pytest.raises(errors.ShapeError, match=r"expected \(3, 5\), got \(3, 4\)"):
            wrong_shape.apply(model)
        with pytest.raises(errors.FormatError, match="only in the ticket: w"):
            wrong_names.apply(model)

        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    def test_float_masks_and_stray_initial_weights_are_refused(self) -> None:
        with pytest.raises(errors.FormatError, match="bool"):
            Ticket({"w": torch.ones(2, 2)})
        with pytest.raises(errors.FormatError, match="initial"):
            Ticket({}, {}, {"w": torch.ones(2)})
        with pytest.raises(errors.ShapeError):
            Ticket({"w": torch.ones(2, 2, dtype=torch.bool)}, {"w": torch.ones(2, 3)})


class TestFile:
    @pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 0.98, 1.0])
    @pytest.mark.parametrize("initial", [False, True])
    def test_round_trip_is_exact(self, tmp_path: Path, density: float, initial: bool) -> None:
        ticket = sample_ticket(density, initial=initial)

        ticket.save(tmp_path / "ticket.safetensors")

        assert_same(load_ticket(tmp_path / "ticket.safetensors"), ticket)

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(0, 9),
        cols=st.integers(0, 9),
        seed=st.integers(0, 1000),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        kind=st.sampled_from(["normal", "signs", "zeros"]),
    )
    def test_round_trip_is_exact_for_any_shape_type_and_values(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        rows: int,
        cols: int,
        seed: int,
        dtype: torch.dtype,
        kind: str,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(rows, cols, generator=generator)
        value = {"normal": value, "signs": value.sign() * 0.125, "zeros": value.round()}[kind]
        mask = torch.rand(rows, cols, generator=generator) < 0.5
        ticket = Ticket({"w": mask}, {"w": value.to(dtype)}, {"w": value}, {})
        path = tmp_path_factory.mktemp("file") / "t.safetensors"

        ticket.save(path)

        assert_same(load_ticket(path), ticket)

    def test_a_kept_zero_stays_kept(self, tmp_path: Path) -> None:
        mask = torch.tensor([[True, True, False]])
        Ticket({"w": mask}, {"w": torch.tensor([[0.0, 1.0, 2.0]])}).save(tmp_path / "t")

        assert torch.equal(load_ticket(tmp_path / "t").masks["w"], mask)

    @pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 0.999])
    def test_the_file_is_smaller_than_the_dense_one(self, tmp_path: Path, density: float) -> None:
        ticket = sample_ticket(density, initial=False)
        torch.save(ticket.weights, tmp_path / "dense.pt")

        ticket.save(tmp_path / "t.safetensors")

        size = (tmp_path / "t.safetensors").stat().st_size
        assert size < (tmp_path / "dense.pt").stat().st_size

    def test_sign_tickets_store_one_bit_a_kept_weight(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(256, 256, generator=generator).sign() * 0.0883
        mask = torch.rand(256, 256, generator=generator) < 0.5
        ticket = Ticket({"w": mask}, {"w": weight})

        ticket.save(tmp_path / "t")

        assert (tmp_path / "t").stat().st_size < 256 * 256 / 8 * 1.5 + 1000
        assert_same(load_ticket(tmp_path / "t"), ticket)

    def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_beside_it(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "t.safetensors"
        sample_ticket(seed=1).save(path)
        before = path.read_bytes()

        with pytest.raises(errors.TicketFileError, match="JSON"):
            Ticket({}, {"b": torch.ones(1)}, {}, {"path": Path()}).save(path)
        with pytest.raises(errors.TicketFileError, match="taken"):
            Ticket(
                {"w": torch.tensor([True, False])}, {"w": torch.ones(2), "w.bitmask": torch.ones(1)}
            ).save(path)

        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @given(st.lists(st.booleans(), max_size=70))
    def test_bits_round_trip_in_numpys_little_order(self, flags: list[bool]) -> None:
        packed = pack_bits(torch.tensor(flags, dtype=torch.bool))

        assert unpack_bits(packed, len(flags)).tolist() == flags
        assert all(int(packed[i // 8]) >> (i % 8) & 1 == flag for i, flag in enumerate(flags))


def rewrite(path: Path, change: Callable[[dict, dict, dict], None]) -> None:
    """Applies ``change(parts, metadata, header)`` to a ticket file, as a hostile writer could."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata["sparselt"])
    change(parts, metadata, header)
    from sparselt.tickets.file import _digest

    if header.get("sha256") != "keep":
        header["sha256"] = _digest(parts)
    if metadata.get("sparselt") != "{broken":
        metadata["sparselt"] = json.dumps(header)
    safetensors.torch.save_file(parts, str(path), metadata=metadata)


HOSTILE: dict[str, Callable[[dict, dict, dict], object]] = {
    "a future version": lambda p, m, h: m.update(version="99"),
    "a broken header": lambda p, m, h: m.update(sparselt="{broken"),
    "a header without tensors": lambda p, m, h: h.pop("tensors"),
    "a header of the wrong type": lambda p, m, h: h.update(tensors=[1, 2]),
    "a negative size": lambda p, m, h: h["tensors"]["fc.weight"].update(shape=[-33, -17]),
    "a fractional size": lambda p, m, h: h["tensors"]["fc.weight"].update(shape=[33.0, 17]),
    "an enormous shape": lambda p, m, h: h["tensors"]["fc.weight"].update(shape=[2**40, 2**40]),
    "an empty but enormous shape": lambda p, m, h: h["tensors"]["fc.weight"].update(
        shape=[0, 2**62, 2**62]
    ),
    "a missing bitmask": lambda p, m, h: p.pop("fc.weight.bitmask"),
    "a short bitmask": lambda p, m, h: p.update({"fc.weight.bitmask": p["fc.weight.bitmask"][1:]}),
    "a bitmask of floats": lambda p, m, h: p.update(
        {"fc.weight.bitmask": p["fc.weight.bitmask"].float()}
    ),
    "padding bits set": lambda p, m, h: p.update(
        {"fc.weight.bitmask": p["fc.weight.bitmask"] | 128}
    ),
    "too few values": lambda p, m, h: p.update({"fc.weight.values": p["fc.weight.values"][1:]}),
    "values of two dimensions": lambda p, m, h: p.update(
        {"fc.weight.values": p["fc.weight.values"][:, None]}
    ),
    "too many initial values": lambda p, m, h: p.update(
        {"fc.weight.initial_values": torch.ones(999)}
    ),
    "an unlisted tensor": lambda p, m, h: p.update({"extra": torch.ones(2)}),
    "a listed tensor that is missing": lambda p, m, h: p.pop("conv.bias"),
    "a mask name that is missing": lambda p, m, h: h["tensors"].pop("conv.weight"),
    "a wrong checksum": lambda p, m, h: (
        p.update({"conv.bias": p["conv.bias"] + 1}),
        h.update(sha256="keep"),
    ),
}


class TestHostileFiles:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_an_altered_ticket_is_refused(self, tmp_path: Path, case: str) -> None:
        path = tmp_path / "t.safetensors"
        sample_ticket().save(path)
        rewrite(path, HOSTILE[case])  # type: ignore[arg-type]

        with pytest.raises(errors.TicketFileError) as caught:
            load_ticket(path)

        assert len(str(caught.value)) > 30

    def test_a_ticket_cut_anywhere_is_refused(self, tmp_path: Path) -> None:
        sample_ticket().save(tmp_path / "whole")
        data = (tmp_path / "whole").read_bytes()
        for size in {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1}:
            cut = tmp_path / "cut.safetensors"
            cut.write_bytes(data[:size])
            with pytest.raises(errors.TicketFileError):
                load_ticket(cut)

    @settings(max_examples=60, deadline=None)
    @given(position=st.floats(0, 0.999), value=st.integers(0, 255))
    def test_a_changed_byte_never_gives_another_ticket(
        self, tmp_path_factory: pytest.TempPathFactory, position: float, value: int
    ) -> None:
        path = tmp_path_factory.mktemp("flip") / "t.safetensors"
        want = sample_ticket()
        want.save(path)
        data = bytearray(path.read_bytes())
        data[int(position * len(data))] = value
        path.write_bytes(data)

        try:
            got = load_ticket(path)
        except errors.SparseltError:
            return

        for name, tensor in want.weights.items():
            if name in got.weights:
                assert torch.equal(got.weights[name], tensor)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".smtx", ".bin", ""])
    def test_noise_is_refused_whatever_it_is_called(self, tmp_path: Path, suffix: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
        (tmp_path / f"noise{suffix}").write_bytes(noise)

        with pytest.raises(errors.TicketFileError):
            load_ticket(tmp_path / f"noise{suffix}")

    def test_a_pickled_model_is_refused_with_the_reason(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "model.pt")

        with pytest.raises(errors.TicketFileError, match=r"run code.*state_dict"):
            load_ticket(tmp_path / "model.pt")

    def test_a_missing_file_is_its_own_error(self) -> None:
        with pytest.raises(errors.TicketNotFoundError, match="no such file"):
            load_ticket("no/such/file.safetensors")
        with pytest.raises(FileNotFoundError):
            load_ticket("no/such/file.safetensors")

    def test_unknown_hints_and_formats_are_named(self, tmp_path: Path) -> None:
        torch.save({"w.weight": torch.eye(3)}, tmp_path / "a.pt")

        with pytest.raises(errors.OptionError, match="colour"):
            load_ticket(tmp_path / "a.pt", colour="red")
        with pytest.raises(errors.OptionError, match="sparselt"):
            load_ticket(tmp_path / "a.pt", format="nonsense")
        with pytest.raises(errors.OptionError, match="model"):
            load_ticket(tmp_path / "a.pt", model=tmp_path / "a.pt")
