# SPDX-License-Identifier: Apache-2.0
"""Layers with sparse weights that stand in for torch's: same attributes and results, forward only.

What a layer runs was decided when it was made; `forward` is one operator call.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from sparselt.errors import (
    DtypeError,
    GradientError,
    OptionError,
    ShapeError,
    SparseltError,
    explain_mismatch,
)
from sparselt.facts import facts_of, sparse_plan
from sparselt.moving import place_of, plan_at
from sparselt.packed import PackedWeight, pack_as, pack_dense_key
from sparselt.plan import DENSE, FORMAT_CHOICES, SEMI_STRUCTURED, Plan

__all__ = [
    "SPARSE_LAYERS",
    "PackedWeight",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
]

_LINEAR = torch.ops.sparselt.linear.default
_CONV2D = torch.ops.sparselt.conv2d.default
_FLOAT32 = torch.float32
# A layer's repr leaves an attribute out while it has this value, or is a tuple of nothing else.
_DEFAULTS = {
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
    "transposed": False,
    "output_padding": 0,
}


class SparseLayer(nn.Module):
    """What the sparse layers share. Use SparseLinear, SparseConv1d or SparseConv2d.

    Attributes:
        weight: a PackedWeight; its buffers are the sparse parts.
        bias: Parameter (M,) that requires no gradient, or None.
        lower, upper: bounds that the result is clamped to (a fused ReLU has lower = 0.0), or None.
        kernel: name of the kernel that runs; empty for the first of the registry that fits.
        plan: why.
    """

    op: ClassVar[str]
    dense_kind: ClassVar[type[nn.Module]]
    attributes: ClassVar[tuple[str, ...]]

    weight: PackedWeight
    bias: nn.Parameter | None
    lower: float | None
    upper: float | None
    kernel: str
    plan: Plan

    def __init__(self, module: nn.Module, plan: Plan, mask: Tensor | None = None) -> None:
        """Packs `module.weight` as the plan says; see `from_dense`, which also makes the plan."""
        super().__init__()
        for name in self.attributes:
            setattr(self, name, getattr(module, name))
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        groups = int(getattr(module, "groups", 1))
        packed = pack_as(weight.detach(), mask, plan.format, plan.block, groups)
        self.weight = PackedWeight(packed, groups)
        copied = nn.Parameter(bias.detach().clone(), False) if isinstance(bias, Tensor) else None
        self.register_parameter("bias", copied)
        self.lower = self.upper = None
        self.weight.to(weight.dtype)
        self.kernel, self.plan = plan.kernel, plan
        self._place, self._plans = place_of(weight), {place_of(weight): plan}
        self.train(module.training)

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        mask: Tensor | None = None,
        format: str = "auto",
        kernel: str = "",
    ) -> Self:
        """A sparse layer with the weights of a dense one.

        Args:
            module: nn.Linear for SparseLinear, and so on. It is not changed, nothing is shared.
            mask: the weight's shape, bool or 0/1 valued: what to keep, a kept 0.0 included. None
                keeps every weight that is not 0.
            format: "auto" (csr, unless the zeros come in whole 16x16, 16x1, 8x1 or 4x1 blocks),
                "csr", "bsr", or a kernel's own layout, "sell" or "bsell".
            kernel: name of the kernel to use; empty lets the plan choose.

        Returns:
            A layer that always runs sparse, whether or not that is faster; `sparselt.convert`
            measures.

        Raises:
            OptionError: module or format of another kind.
            KernelError: the kernel is unknown or does not fit, or none fits.
            FormatError, ShapeError: the mask does not fit the weight.
            DtypeError: the weight is float64.

        Example:
            >>> import torch
            >>> dense = torch.nn.Linear(8, 4)
            >>> dense.weight.data.mul_(torch.eye(4, 8))
            tensor(...)
            >>> SparseLinear.from_dense(dense).weight.nnz
            4
        """
        if not isinstance(module, cls.dense_kind):
            kind = type(module).__name__
            raise OptionError(explain_mismatch("module", f"an nn.{cls.dense_kind.__name__}", kind))
        if format not in FORMAT_CHOICES or format in (DENSE, SEMI_STRUCTURED):
            raise OptionError(explain_mismatch("format", "'auto', 'csr' or 'bsr'", repr(format)))
        kept = module.weight != 0 if mask is None else mask != 0
        assert isinstance(kept, Tensor)
        plan = sparse_plan(facts_of(module, kept), format, kernel)
        return cls(module, plan, mask)

    def to_dense(self) -> nn.Module:
        """The torch layer with the same weights; a clamp is lost.

        Returns:
            An nn.Linear, nn.Conv1d or nn.Conv2d whose parameters require no gradient.
        """
        # The two left out are results of the constructor, not arguments.
        names = set(self.attributes) - {"transposed", "output_padding"}
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        dense = self.dense_kind(**arguments, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.to_dense(), False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result; shapes as in the torch layer of the same name.

        Raises:
            ShapeError, DtypeError: the input does not fit the weight.
            GradientError: gradients are on and the input requires one.
        """
        # The dictionaries are read directly because attribute look-up through nn.Module costs as
        # much as a small layer's arithmetic.
        parts: list[Any] = list(self._modules["weight"]._buffers.values())  # type: ignore[union-attr]
        if (
            input.dtype is _FLOAT32
            and parts[-1].dtype is _FLOAT32
            and not (input.requires_grad and torch.is_grad_enabled())
        ):
            return self._run(input, parts, self._parameters["bias"])
        return self._run_converted(input, parts)

    def _run(self, input: Tensor, parts: list[Any], bias: Tensor | None) -> Tensor:
        """The operator call, float32."""
        raise NotImplementedError

    def _run_dense(self, input: Tensor) -> Tensor:
        """Torch's operator on the dense weight, for float64, which no kernel computes."""
        raise NotImplementedError

    def _run_converted(self, input: Tensor, parts: list[Any]) -> Tensor:
        """Every call that is not plain float32: half precision, float64, autocast, or an error."""
        if input.requires_grad and torch.is_grad_enabled():
            raise GradientError(
                f"{type(self).__name__} runs forward only, and its input requires a gradient; call "
                "it under torch.inference_mode(), or train the dense model and convert it after"
            )
        own, got = parts[-1].dtype, input.dtype
        if got is own is torch.float64:
            result = self._run_dense(input)
            bounded = self.lower is not None or self.upper is not None
            return result.clamp(self.lower, self.upper) if bounded else result
        narrow = got in (_FLOAT32, torch.float16, torch.bfloat16)
        cast = torch.is_autocast_enabled(input.device.type)
        if input.is_cuda and narrow and (got is own or cast):
            return self._run(input, parts, self.bias)
        if not narrow or (got is not own and not cast):
            hint = f"convert the input with .to({own}) or the layer with .to({got})"
            raise DtypeError(explain_mismatch("input", own, got, hint))
        bias = self.bias.float() if self.bias is not None else None
        return self._run(input.float(), [*parts[:-1], parts[-1].float()], bias).to(got)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight, plan = self.weight, self.plan
        place = place_of(fn(torch.empty(0, dtype=weight.dtype, device=weight.device)))
        if place != self._place:
            plan = plan_at(self._plans, place, self, weight)
        # Packed on the CPU, which knows every format.
        if weight.device.type != "cuda":
            weight.repack(plan.format, plan.block)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight.repack(plan.format, plan.block)
        self._place, self.kernel, self.plan = place, plan.kernel, plan
        return self

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Packs a dense weight found in the state dict before the usual load."""
        try:
            pack_dense_key(self.weight, state_dict, prefix)
        except SparseltError as error:
            del state_dict[prefix + "weight"]
            error_msgs.append(f"{prefix}weight: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """Torch's attributes, then density, format and kernel."""
        shown = []
        for name in self.attributes:
            value, default = getattr(self, name), _DEFAULTS.get(name)
            if value != default and value != (default,) * (len(self.weight.shape) - 2):
                shown.append(f"{name}={value}")
        shown.append(f"bias={self.bias is not None}")
        if self.lower is not None or self.upper is not None:
            shown.append(f"clamp=({self.lower}, {self.upper})")
        shown.append(f"density={self.weight.density:.3g}, format={self.weight.format}")
        return ", ".join([*shown, f"kernel={self.kernel or 'first that fits'}"])


class SparseLinear(SparseLayer):
    """nn.Linear with a sparse weight: y (..., M) = x (..., K) W^T + bias.

    Example:
        >>> import torch
        >>> layer = SparseLinear.from_dense(torch.nn.Linear(8, 4))
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    op = "linear"
    dense_kind = nn.Linear
    attributes = ("in_features", "out_features")

    in_features: int
    out_features: int

    def _run(self, input: Tensor, parts: list[Any], bias: Tensor | None) -> Tensor:
        if input.dim() == 0 or input.size(-1) != self.in_features:
            expected = f"(..., {self.in_features})"
            raise ShapeError(explain_mismatch("input", expected, tuple(input.shape)))
        meta = self._modules["weight"]._meta  # type: ignore[union-attr]
        kernel = self.kernel or self.weight.format
        y: Tensor = _LINEAR(input, parts, meta, bias, None, self.lower, self.upper, kernel)
        return y

    def _run_dense(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to_dense(), self.bias)


class _SparseConv(SparseLayer):
    """What the convolutions share: geometry, padding modes, unbatched inputs.

    Paddings that the operator does not know (another mode than zeros, an uneven "same") are laid
    out by F.pad first.
    """

    attributes = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
    )

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(self, module: nn.Module, plan: Plan, mask: Tensor | None = None) -> None:
        """See SparseLayer."""
        super().__init__(module, plan, mask)
        # (left, right) of the last axis first, as F.pad takes it.
        around = list(getattr(module, "_reversed_padding_repeated_twice"))  # noqa: B009
        before, after = around[0::2][::-1], around[1::2][::-1]
        even = before == after and self.padding_mode == "zeros"
        self.pad_first: list[int] | None = None if even else around
        # The operator's view: a conv1d is a conv2d of height 1.
        lift = [1] * (2 - len(before))
        self._stride = [*lift, *self.stride]
        self._padding = [0] * len(lift) + (before if even else [0] * len(before))
        self._dilation = [*lift, *self.dilation]

    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups as the operator takes them."""
        return self._stride, self._padding, self._dilation, self.groups

    def _padded(self, input: Tensor) -> Tensor:
        assert self.pad_first is not None
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, self.pad_first, mode=mode)

    def _run(self, input: Tensor, parts: list[Any], bias: Tensor | None) -> Tensor:
        axes = len(self.stride)
        if input.dim() == axes + 1:
            return self._run(input.unsqueeze(0), parts, bias).squeeze(0)
        if input.dim() != axes + 2 or input.size(1) != self.in_channels:
            expected = f"(B, {self.in_channels}, {'W' if axes == 1 else 'H, W'})"
            raise ShapeError(explain_mismatch("input", expected, tuple(input.shape)))
        return self._convolve(input if self.pad_first is None else self._padded(input), parts, bias)

    def _run_dense(self, input: Tensor) -> Tensor:
        padded = input if self.pad_first is None else self._padded(input)
        axes = len(self.stride)
        convolve = F.conv1d if axes == 1 else F.conv2d
        steps = (self._stride[-axes:], self._padding[-axes:], self._dilation[-axes:])
        result: Tensor = convolve(padded, self.weight.to_dense(), self.bias, *steps, self.groups)
        return result

    def _convolve(self, input: Tensor, parts: list[Any], bias: Tensor | None) -> Tensor:
        """The operator call on a batched input of the right channels."""
        geometry, meta = (self._stride, self._padding, self._dilation), self.weight.lifted_meta
        end = (*geometry, self.groups, self.lower, self.upper, self.kernel or self.weight.format)
        try:
            result: Tensor = _CONV2D(input, parts, meta, bias, None, *end)
        except RuntimeError:
            # Looked at after the fact, because a check before would bound symbolic sizes.
            reach = [d * (taps - 1) for d, taps in zip(self._dilation, meta[4:], strict=True)]
            if all(input.size(2 + i) + 2 * self._padding[i] > reach[i] for i in (0, 1)):
                raise
            expected = f"a padded size of at least the kernel's reach ({self.kernel_size} taps)"
            raise ShapeError(
                explain_mismatch("input", expected, tuple(input.shape), "use a larger input")
            ) from None
        return result


class SparseConv2d(_SparseConv):
    """nn.Conv2d with a sparse weight: (B, C_in, H, W) to (B, C_out, P, Q).

    Example:
        >>> import torch
        >>> layer = SparseConv2d.from_dense(torch.nn.Conv2d(3, 8, 3, padding=1))
        >>> layer(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    op = "conv2d"
    dense_kind = nn.Conv2d


class SparseConv1d(_SparseConv):
    """nn.Conv1d with a sparse weight: (B, C_in, W) to (B, C_out, Q); a conv2d of height 1.

    Example:
        >>> import torch
        >>> layer = SparseConv1d.from_dense(torch.nn.Conv1d(3, 8, 5, padding=2))
        >>> layer(torch.ones(2, 3, 20)).shape
        torch.Size([2, 8, 20])
    """

    op = "conv1d"
    dense_kind = nn.Conv1d

    def _convolve(self, input: Tensor, parts: list[Any], bias: Tensor | None) -> Tensor:
        return super()._convolve(input.unsqueeze(2), parts, bias).squeeze(2)


SPARSE_LAYERS: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
}
