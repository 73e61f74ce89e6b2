"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean of squares in at least float32 (Zhang and Sennrich, 2019).

    Written with `vector_norm`, which reads a 16-bit input and sums in float32 in one operation: `F.rms_norm` has no fused
    kernel on CPU and becomes eight.
    """

    mean_epsilon: Tensor

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.size, self.epsilon = size, epsilon
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.register_buffer("mean_epsilon", torch.empty(1, dtype=self.sum_dtype, device="meta"), persistent=False)

    def init_buffers(self, device: torch.device) -> None:
        self.mean_epsilon = torch.tensor([self.epsilon], dtype=self.sum_dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:  # x: [..., size]
        if x.dtype == self.sum_dtype:
            return self.normalise(x) * self.weight
        return self.normalise(x).to(x.dtype) * self.weight

    def normalise(self, x: Tensor) -> Tensor:
        """x / rms(x), in at least float32."""
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=self.sum_dtype)
        scale = torch.addcmul(self.mean_epsilon, norm, norm, value=1 / self.size).rsqrt_()
        return x * scale


class LateRMSNorm(RMSNorm):
    """An `RMSNorm` that is rounded once, after it was multiplied by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normalise(x) * self.weight).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """An `RMSNorm` that multiplies by 1 + weight, and is rounded once, after that."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalise(x)
        return torch.addcmul(y, y, self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) * weight + bias over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.shape, self.epsilon = (size,), epsilon

    def forward(self, x: Tensor) -> Tensor:  # x: [..., size]
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)
