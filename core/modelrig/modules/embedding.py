"""Rows looked up by number: tokens, learned positions, token types."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:  # ids: [...] -> [..., size]
        return F.embedding(ids, self.weight)
