"""The plain linear kernels: which one multiplies a dense weight is decided once, when it is bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseLinear:
    @staticmethod
    def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A single token on CPU is a matrix-vector product: `torch.mv` reads 16-bit weights faster there (benchmarks/LOG.md)."""
        if weight.device.type != "cpu":
            return lambda x: F.linear(x, weight, bias)

        def linear(x: Tensor) -> Tensor:  # x: [tokens, in] or [in]
            if x.dim() > 1:
                return F.linear(x, weight, bias)
            return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)

        return linear
