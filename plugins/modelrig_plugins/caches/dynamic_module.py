"""Buffers that double until they reach the cache's capacity."""

from __future__ import annotations

from torch import Tensor

from modelrig.modules.cache import ContiguousCache


class DynamicCache(ContiguousCache):
    """A `ContiguousCache` that begins small."""

    first_room = 256

    def _reserve(self, end: int) -> None:
        room = self.layers[0].keys.shape[2]
        if end <= room:
            return
        room = min(self.capacity, max(end, 2 * room))
        # All new buffers exist before the first old one goes, so running out of memory changes nothing.
        grown = [(self._grow(layer.keys, room), self._grow(layer.values, room)) for layer in self.layers]
        for layer, (keys, values) in zip(self.layers, grown, strict=True):
            layer.keys, layer.values = keys, values

    def _grow(self, old: Tensor, room: int) -> Tensor:
        new = old.new_zeros(old.shape[0], old.shape[1], room, old.shape[3])
        new[:, :, : self._length] = old[:, :, : self._length]
        return new
