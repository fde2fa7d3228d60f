# SPDX-License-Identifier: Apache-2.0
"""A linear layer by torch's own 2:4 product, where that measured fastest on a CUDA device.

Torch keeps such a weight as a tensor class of its own, in a layout of the library behind it. State
dicts hold the dense weight, and so does a layer that leaves CUDA or 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from typing_extensions import Self

from sparselt.facts import is_two_of_four
from sparselt.plan import DENSE, SEMI_STRUCTURED, Plan

__all__ = ["SemiStructuredLinear"]

_HALVES = (torch.float16, torch.bfloat16)


class SemiStructuredLinear(nn.Linear):
    """nn.Linear whose weight is torch's 2:4 tensor while it is on CUDA in 16 bits.

    Attributes:
        sparselt_plan: why.
        density: of the weight.
    """

    def __init__(self, module: nn.Linear, plan: Plan, mask: Tensor | None = None) -> None:
        """Packs `module.weight`, of which at most two of each four in a row are kept.

        Args:
            module: on CUDA, float16 or bfloat16.
            plan: of the layer.
            mask: which weights are kept; None for those that are not 0.

        Raises:
            RuntimeError: torch's library does not take the weight, or is not there.
        """
        bias = module.bias is not None
        super().__init__(module.in_features, module.out_features, bias, device="meta")
        weight = module.weight.detach()
        self.weight = nn.Parameter(weight if mask is None else weight * (mask != 0), False)
        copied = nn.Parameter(module.bias.detach().clone(), False) if bias else None
        self.register_parameter("bias", copied)
        self.sparselt_plan = plan
        self.density = int(self.weight.count_nonzero()) / max(1, self.weight.numel())
        self.train(module.training)
        self._compress()

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear; torch's 2:4 product takes no strides."""
        return super().forward(input.contiguous())

    def dense_weight(self) -> Tensor:
        """The weight as a plain tensor of its shape and type."""
        weight = self.weight.detach()
        if not isinstance(weight, SparseSemiStructuredTensor):
            return weight
        # Both of torch's libraries multiply; one of them has no way back but that.
        unit = torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)
        return nn.functional.linear(unit, weight).t().contiguous()

    def to_dense(self) -> nn.Linear:
        """The torch layer with the same weights."""
        bias = self.bias is not None
        dense = nn.Linear(self.in_features, self.out_features, bias, device="meta")
        dense.weight = nn.Parameter(self.dense_weight(), False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    @property
    def kernel(self) -> str:
        """What runs now."""
        return SEMI_STRUCTURED if isinstance(self.weight, SparseSemiStructuredTensor) else DENSE

    def _compress(self) -> None:
        """Torch trusts the pattern, so a weight that was loaded is looked at."""
        weight = self.weight.detach()
        if not (weight.is_cuda and weight.dtype in _HALVES and is_two_of_four(weight != 0)):
            return
        self.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._compress()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles pack anew."""
        state = {key: value for key, value in self.__dict__.items() if key != "_parameters"}
        return type(self), (self.to_dense(), self.sparselt_plan), state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.weight = nn.Parameter(self.dense_weight().clone(), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._compress()
