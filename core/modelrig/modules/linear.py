"""The linear slot: holds a weight under its checkpoint name, and the kernel its quantizer bound to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from modelrig.components import LinearMaker

Kernel = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """y = x · weightᵀ + bias. Before `bind` it computes with `F.linear`; afterwards with the quantizer's kernel."""

    kernel: Kernel | None

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

    @property
    def bound(self) -> tuple[Kernel | None, ...]:
        """Its kernels, for `count_kernels`."""
        return (self.kernel,)


def named(kernel: Kernel, name_at: Callable[[int], str]) -> Kernel:
    """`kernel`, saying how it multiplies a number of rows: `name_at(rows)`."""
    kernel.name_at = name_at  # type: ignore[attr-defined]
    return kernel


def count_kernels(module: nn.Module, rows: int, usual: str) -> dict[str, int]:
    """Name of a kernel → how many weights of `module` it multiplies in a step of `rows` rows; `usual` where one does not say."""
    bound = (kernel for part in module.modules() for kernel in getattr(part, "bound", ()))
    return dict(Counter(_name(kernel, rows, usual) for kernel in bound))


def _name(kernel: Any, rows: int, usual: str) -> str:
    name_at = getattr(kernel, "name_at", None)
    return usual if name_at is None else str(name_at(rows))
