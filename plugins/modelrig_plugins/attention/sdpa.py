"""Attention by `torch.nn.functional.scaled_dot_product_attention`.

Shapes: b batch, h query heads, g key/value heads, t queries, s slots, d head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.slots import Visibility


class Lowered(NamedTuple):
    mask: Tensor | None  # bool [b or 1, 1, t, s]
    is_causal: bool


class SdpaAttention:
    def __init__(self, options: Any = None) -> None:
        pass

    def prepare(self, spec: AttentionSpec, visible: Visibility) -> Lowered:  # noqa: ARG002 - protocol
        """No mask where none is needed: one query that sees everything, or a first prompt that is_causal describes."""
        count, past = visible.query_index.shape[0], visible.past
        in_window = past is not None and (visible.window is None or past + count <= visible.window)
        if visible.starts is None and in_window:
            if not visible.causal or count == 1:
                return Lowered(None, False)
            if past == 0:
                return Lowered(None, True)
        return Lowered(visible.dense(), False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Lowered, spec: AttentionSpec) -> Tensor:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask.mask,
            is_causal=mask.is_causal,
            scale=spec.scale,
            enable_gqa=spec.num_heads != spec.num_key_value_heads,
        )  # [b, h, t, d]
        b, _, t, _ = q.shape
        if t > 1:
            y = y.transpose(1, 2)
        return y.reshape(b, t, spec.num_heads * spec.value_dim)
