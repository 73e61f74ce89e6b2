"""Buffers of the full length, allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelrig.components import AttentionSpec
from modelrig.modules.cache import ContiguousCache, ContiguousLayer


class StaticCache(ContiguousCache):
    @classmethod
    def create(
        cls,
        layers: Sequence[AttentionSpec],
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: Sequence[int] | None = None,
        options: Any = None,  # noqa: ARG003 - protocol
    ) -> StaticCache:
        cache = cls(batch, capacity, device, padding)
        cache.layers = [
            ContiguousLayer(batch, spec.num_key_value_heads, capacity, spec.head_dim, spec.value_dim, dtype, device)
            for spec in layers
        ]
        return cache
