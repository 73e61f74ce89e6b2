"""Attention as the textbook writes it: what the other kernels are compared with.

Shapes: b batch, h query heads, g key/value heads, r = h / g, t queries, s slots, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.slots import Visibility


class EagerAttention:
    def __init__(self, options: Any = None) -> None:
        pass

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Tensor:  # noqa: ARG002 - protocol
        return visible.dense()  # bool [b or 1, 1, t, s]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
        b, h, t, d = q.shape
        g = spec.num_key_value_heads
        q = q.reshape(b, g, h // g * t, d)  # the queries that share a key head, side by side
        scores = (q @ k.transpose(2, 3)).view(b, h, t, -1) * spec.scale  # [b, h, t, s]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        y = weights.view(b, g, h // g * t, -1) @ v
        return y.view(b, h, t, spec.value_dim).transpose(1, 2).reshape(b, t, h * spec.value_dim)
