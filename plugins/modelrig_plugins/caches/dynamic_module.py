"""Buffers that double until they reach the cache's capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.cache import ContiguousCache, ContiguousLayer

FIRST_ROOM = 256  # tokens


class DynamicCache(ContiguousCache):
    room: int

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
    ) -> DynamicCache:
        cache = cls(batch, capacity, device, padding)
        cache.room = min(capacity, FIRST_ROOM)
        cache.layers = [
            ContiguousLayer(batch, spec.num_key_value_heads, cache.room, spec.head_dim, spec.value_dim, dtype, device)
            for spec in layers
        ]
        return cache

    def _reserve(self, end: int) -> None:
        if end <= self.room:
            return
        room = min(self.capacity, max(end, 2 * self.room))
        # All new buffers exist before the first old one goes, so running out of memory changes nothing.
        grown = [(self._grow(layer.keys, room), self._grow(layer.values, room)) for layer in self.layers]
        for layer, (keys, values) in zip(self.layers, grown, strict=True):
            layer.keys, layer.values = keys, values
        self.room = room

    def _grow(self, old: Tensor, room: int) -> Tensor:
        new = old.new_zeros(old.shape[0], old.shape[1], room, old.shape[3])
        new[:, :, : self._length] = old[:, :, : self._length]
        return new
