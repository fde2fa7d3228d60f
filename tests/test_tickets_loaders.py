# SPDX-License-Identifier: Apache-2.0
"""Tickets from other tools' files: torch, safetensors, scipy, DLMC and numpy folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from sparselt import errors
from sparselt.tickets import LOADERS, load_ticket, ticket_from_state_dict


class TestTorchFiles:
    def test_torch_prune_keeps_a_kept_zero(self, tmp_path: Path) -> None:
        layer = nn.Linear(4, 2)
        layer.weight.data[0, 0] = 0.0
        mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
        prune.custom_from_mask(layer, "weight", mask)
        torch.save(layer.state_dict(), tmp_path / "pruned.pt")

        ticket = load_ticket(tmp_path / "pruned.pt")

        assert torch.equal(ticket.masks["weight"], mask.bool())
        assert torch.equal(ticket.weights["weight"], layer.weight_orig * mask)
        assert sorted(ticket.weights) == ["bias", "weight"]
        assert any("kept weights that are 0.0" in note for note in ticket.meta["notes"])

    def test_plain_zeros_are_pruned_and_biases_and_norms_are_not_masked(
        self, tmp_path: Path
    ) -> None:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 2))
        model[0].weight.data[0].zero_()
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3},
            tmp_path / "c.pth",
        )

        ticket = load_ticket(tmp_path / "c.pth")

        assert list(ticket.masks) == ["0.weight", "2.weight"]
        assert ticket.layers()[0].density == pytest.approx(2 / 3)
        assert ticket.meta["source"]["format"] == "torch"
        assert ticket.apply(model) is model

    def test_names_behind_torch_compile_are_cleaned(self) -> None:
        from sparselt.tickets.state_dicts import tensors_of

        state = {"module._orig_mod.a.weight": torch.eye(2), "module._orig_mod.b": torch.ones(1)}
        assert sorted(tensors_of(state)) == ["a.weight", "b"]
        assert sorted(tensors_of({"net._orig_mod.a": torch.ones(1), "c": torch.ones(1)})) == [
            "c",
            "net.a",
        ]

    def test_mask_buffers_beside_the_weight_are_applied(self) -> None:
        state = {
            "fc.weight": torch.tensor([[1.0, 2.0]]),
            "fc.weight_mask": torch.tensor([[0.0, 1.0]]),
        }

        ticket = ticket_from_state_dict(state)

        assert ticket.weights["fc.weight"].tolist() == [[0.0, 2.0]]
        assert "nonzero weights under the mask" in ticket.meta["notes"][0]

    def test_parametrizations_are_multiplied(self) -> None:
        state = {
            "fc.parametrizations.weight.original": torch.tensor([[1.0, 2.0]]),
            "fc.parametrizations.weight.0.mask": torch.tensor([[0.0, 1.0]]),
            "fc.bias": torch.ones(1),
        }

        ticket = ticket_from_state_dict(state)

        assert ticket.weights["fc.weight"].tolist() == [[0.0, 2.0]]
        assert sorted(ticket.weights) == ["fc.bias", "fc.weight"]

    def test_open_lth_masks_are_paired_with_the_model_and_revived_weights_are_zeroed(
        self, tmp_path: Path
    ) -> None:
        mask = {"fc.weight": torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)}
        model = {"fc.weight": torch.full((2, 2), 5.0), "fc.bias": torch.ones(2)}
        first = {"fc.weight": torch.full((2, 2), 3.0), "fc.bias": torch.zeros(2)}
        for name, content in (("mask", mask), ("model", model), ("first", first)):
            torch.save(content, tmp_path / f"{name}.pth")

        alone = load_ticket(tmp_path / "mask.pth")
        ticket = load_ticket(
            tmp_path / "mask.pth", model=tmp_path / "model.pth", initial=tmp_path / "first.pth"
        )

        assert alone.density == 0.75
        assert not alone.weights
        assert ticket.weights["fc.weight"].tolist() == [[0.0, 5.0], [5.0, 5.0]]
        assert ticket.initial["fc.weight"].tolist() == [[0.0, 3.0], [3.0, 3.0]]

    def test_open_lth_checkpoints_lose_their_prefixes(self, tmp_path: Path) -> None:
        inner = {
            "model.blocks.0.weight": torch.ones(2, 2),
            "model.blocks.0.bias": torch.ones(2),
            "mask_blocks___0___weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        }
        torch.save({"ep": 1, "it": 2, "model_state_dict": inner}, tmp_path / "checkpoint.pth")

        ticket = load_ticket(tmp_path / "checkpoint.pth")

        assert sorted(ticket.weights) == ["blocks.0.bias", "blocks.0.weight"]
        assert torch.equal(ticket.weights["blocks.0.weight"], torch.eye(2))

    def test_edge_popup_scores_need_an_explicit_keep_fraction(self, tmp_path: Path) -> None:
        state = {
            "module.fc.weight": torch.ones(2, 2),
            "module.fc.scores": torch.tensor([[0.1, -0.9], [0.5, 0.2]]),
        }
        torch.save({"state_dict": state}, tmp_path / "ep.pth")

        with pytest.raises(errors.FormatError, match="keep_fraction"):
            load_ticket(tmp_path / "ep.pth")
        ticket = load_ticket(tmp_path / "ep.pth", keep_fraction=0.5)

        assert ticket.masks["fc.weight"].tolist() == [[False, True], [True, False]]
        assert list(ticket.weights) == ["fc.weight"]

    @pytest.mark.filterwarnings("ignore:Sparse")
    @pytest.mark.parametrize("layout", ["csr", "csc", "bsr", "coo"])
    def test_torch_sparse_layouts_keep_stored_zeros(self, tmp_path: Path, layout: str) -> None:
        dense = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
        sparse = {
            "csr": dense.to_sparse_csr,
            "csc": dense.to_sparse_csc,
            "bsr": lambda: dense.to_sparse_bsr((1, 2)),
            "coo": lambda: dense.to_sparse().coalesce(),
        }[layout]()
        sparse.values().reshape(-1)[0] = 0.0
        torch.save({"fc.weight": sparse}, tmp_path / "s.pt")

        ticket = load_ticket(tmp_path / "s.pt")

        assert torch.equal(ticket.masks["fc.weight"], dense != 0)
        assert float(ticket.weights["fc.weight"][0, 0]) == 0.0

    @pytest.mark.parametrize("bad", [2.0, -1.0, 0.5, float("nan")])
    def test_masks_of_anything_but_zeros_and_ones_are_refused(self, bad: float) -> None:
        state = {"weight_orig": torch.ones(1, 2), "weight_mask": torch.tensor([[1.0, bad]])}

        with pytest.raises(errors.FormatError, match="only 0 and 1"):
            ticket_from_state_dict(state)

    def test_the_state_of_a_converted_model_is_named_as_such(self) -> None:
        state = {"fc.weight.crow_indices": torch.tensor([0, 1]), "fc.weight.values": torch.ones(1)}

        with pytest.raises(errors.FormatError, match="converted"):
            ticket_from_state_dict(state)

    def test_a_mask_of_another_shape_or_name_is_refused(self) -> None:
        with pytest.raises(errors.ShapeError):
            ticket_from_state_dict({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 3)})
        with pytest.raises(errors.FormatError, match="weight of that name"):
            ticket_from_state_dict({"w": torch.ones(2, 2)}, {"v": torch.ones(2, 2)})

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {3: torch.ones(2, 2)}])
    def test_a_file_without_named_weights_is_refused(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "x.pt")

        with pytest.raises(errors.TicketFileError, match="named tensors"):
            load_ticket(tmp_path / "x.pt")


class TestOtherFiles:
    def test_plain_safetensors(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"a.weight": torch.eye(3)}, tmp_path / "p.safetensors")

        ticket = load_ticket(tmp_path / "p.safetensors")

        assert ticket.density == pytest.approx(1 / 3)
        assert ticket.meta["source"]["format"] == "safetensors"

    @pytest.mark.parametrize("stem", ["layers.0", "layers.0.weight"])
    @pytest.mark.parametrize("in_folder", [False, True])
    def test_compressed_tensors_sparse_bitmask_of_both_generations(
        self, tmp_path: Path, stem: str, in_folder: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(5, 11, generator=generator) < 0.4
        weight = torch.randn(5, 11, generator=generator) * mask
        bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)[:-1]])
        safetensors.torch.save_file(
            {
                f"{stem}.shape": torch.tensor([5, 11]),
                f"{stem}.compressed": weight[mask],
                f"{stem}.bitmask": torch.from_numpy(bits),
                f"{stem}.row_offsets": counts,
            },
            tmp_path / "model.safetensors",
        )

        ticket = load_ticket(tmp_path if in_folder else tmp_path / "model.safetensors")

        assert torch.equal(ticket.masks["layers.0.weight"], mask)
        assert torch.equal(ticket.weights["layers.0.weight"], weight)
        assert list(ticket.weights) == ["layers.0.weight"]

    def test_compressed_tensors_that_disagree_are_refused(self, tmp_path: Path) -> None:
        good = {
            "a.shape": torch.tensor([2, 8]),
            "a.compressed": torch.ones(3),
            "a.bitmask": torch.tensor([[3], [1]], dtype=torch.uint8),
        }
        for change in (
            {"a.shape": torch.tensor([2**40, 2**40])},
            {"a.shape": torch.tensor([-2, -8])},
            {"a.compressed": torch.ones(4)},
            {"a.bitmask": torch.tensor([[3]], dtype=torch.uint8)},
        ):
            safetensors.torch.save_file({**good, **change}, tmp_path / "m.safetensors")
            with pytest.raises(errors.TicketFileError, match=r"a\.weight"):
                load_ticket(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr"])
    def test_scipy_matrices_keep_stored_zeros(self, tmp_path: Path, layout: str) -> None:
        from scipy import sparse

        dense = np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]], dtype=np.float32)
        matrix = sparse.csr_matrix(dense).asformat(layout)
        matrix.data.reshape(-1)[0] = 0.0
        sparse.save_npz(tmp_path / "m.npz", matrix)

        ticket = load_ticket(tmp_path / "m.npz", name="conv.weight", shape=(2, 1, 2, 2))

        mask = ticket.masks["conv.weight"]
        assert mask.shape == (2, 1, 2, 2)
        assert bool(mask.reshape(-1)[0])
        assert ticket.weights["conv.weight"].reshape(-1)[1:].tolist() == [2, 0, 0, 0, 0, 3, 4]

    def test_hostile_scipy_files_are_refused(self, tmp_path: Path) -> None:
        base = {
            "format": b"csr",
            "shape": np.array([2, 2]),
            "data": np.ones(2, np.float32),
            "indices": np.array([0, 1]),
            "indptr": np.array([0, 1, 2]),
        }
        for change in (
            {"indices": np.array([0, 2**30])},
            {"indices": np.array([0, -7])},
            {"indptr": np.array([0, 9, 2])},
            {"format": b"dia"},
            {"data": np.array([{}, {}], dtype=object)},
        ):
            np.savez(tmp_path / "h.npz", **{**base, **change})
            with pytest.raises(errors.TicketFileError):
                load_ticket(tmp_path / "h.npz")

    def test_smtx_gives_the_pattern_and_seeded_values(self, tmp_path: Path) -> None:
        (tmp_path / "m.smtx").write_text("2, 3, 3\n0 2 3\n0 2 1\n")

        first, again = (load_ticket(tmp_path / "m.smtx", seed=3) for _ in range(2))

        assert first.masks["weight"].int().tolist() == [[1, 0, 1], [0, 1, 0]]
        assert torch.equal(first.weights["weight"], again.weights["weight"])
        other = load_ticket(tmp_path / "m.smtx", seed=4).weights["weight"]
        assert not torch.equal(first.weights["weight"], other)

    def test_smtx_convolutions_are_read_with_the_input_channel_fastest(
        self, tmp_path: Path
    ) -> None:
        # One filter, two input channels, 1 x 3 taps: column 3 is tap 1, channel 1.
        (tmp_path / "c.smtx").write_text("1, 6, 1\n0 1\n3\n")

        mask = load_ticket(tmp_path / "c.smtx", shape=(1, 2, 1, 3)).masks["weight"]

        assert mask.nonzero().tolist() == [[0, 1, 0, 1]]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "2, 3\n0 2 3\n0 2 1\n",
            "2, 3, 3\n0 2 3\n0 2\n",
            "2, 3, 3\n0 2\n0 2 1\n",
            "2, 3, 3\n0 4 3\n0 2 1\n",
            "2, 3, 3\n0 2 3\n0 3 1\n",
            "2, 3, 3\n0 2 3\n0 0 1\n",
            "2, 3, 3\n0 2 3\n0 -1 1\n",
            "-2, 3, 3\n0 2 3\n0 2 1\n",
            "999999999, 999999999, 1\n0 1\n0\n",
            "2, 3, x\n0 2 3\n0 2 1\n",
        ],
    )
    def test_damaged_smtx_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "m.smtx").write_text(text)

        with pytest.raises(errors.TicketFileError):
            load_ticket(tmp_path / "m.smtx")

    def test_a_shape_hint_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m.smtx").write_text("2, 3, 3\n0 2 3\n0 2 1\n")

        with pytest.raises(errors.ShapeError, match="6 elements"):
            load_ticket(tmp_path / "m.smtx", shape=(2, 2))

    def test_folders_of_npy_are_transposed_to_torchs_order(self, tmp_path: Path) -> None:
        mask = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        for folder, arrays in (
            ("masks", {"layer0_w": mask}),
            ("final", {"layer0_w": np.full((2, 3), 2.0), "layer0_b": np.ones(3)}),
            ("initial", {"layer0_w": np.full((2, 3), 7.0), "layer0_b": np.zeros(3)}),
        ):
            (tmp_path / folder).mkdir()
            for name, array in arrays.items():
                np.save(tmp_path / folder / f"{name}.npy", array)

        ticket = load_ticket(tmp_path)

        assert torch.equal(ticket.masks["layer0.weight"], torch.from_numpy(mask.T != 0))
        assert ticket.weights["layer0.weight"].shape == (3, 2)
        assert torch.equal(ticket.initial["layer0.weight"], torch.from_numpy(mask.T * 7))
        assert list(ticket.initial) == ["layer0.weight"]

    def test_object_arrays_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "masks").mkdir()
        np.save(tmp_path / "masks" / "a_w.npy", np.array([{}], dtype=object), allow_pickle=True)

        with pytest.raises(errors.TicketFileError, match="plain"):
            load_ticket(tmp_path)

    def test_every_loader_is_named_in_the_message_for_an_unknown_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text("hello")

        with pytest.raises(errors.TicketFileError) as caught:
            load_ticket(tmp_path / "x.txt")

        assert all(name in str(caught.value) for name in LOADERS)
