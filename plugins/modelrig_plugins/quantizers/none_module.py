"""The plain linear kernels: which one multiplies a dense weight is decided once, when it is bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseLinear:
    @staticmethod
    def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`torch.mv` for one 16-bit row on CPU, which reads weights up to twice as fast as `F.linear` there (benchmarks/LOG.md)."""
        rows, columns = weight.shape
        if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
            return lambda x: F.linear(x, weight, bias)

        def linear(x: Tensor) -> Tensor:
            if x.numel() != columns:
                return F.linear(x, weight, bias)
            y = torch.mv(weight, x.view(columns)) if bias is None else torch.addmv(bias, weight, x.view(columns))
            return y.view(*x.shape[:-1], rows)

        return linear
