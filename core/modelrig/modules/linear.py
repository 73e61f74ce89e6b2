"""The linear slot: holds a weight under its checkpoint name, and the kernel its quantizer bound to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from modelrig.components import LinearMaker


class Linear(nn.Module):
    """y = x · weightᵀ + bias. Before `bind` it computes with `F.linear`; afterwards with the quantizer's kernel."""

    kernel: Callable[[Tensor], Tensor] | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False) if bias else None
        self.kernel = None

    def bind(self, maker: LinearMaker) -> None:
        self.kernel = maker.make_linear(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:  # x: [..., in] -> [..., out]
        if self.kernel is None:
            return F.linear(x, self.weight, self.bias)
        return self.kernel(x)
