"""Positions and lengths of a cache whose slot numbers equal token indices: what contiguous caches have in common.

A subclass that keeps something else than `ContiguousLayer`s overrides `create`; one that grows sets `first_room` and overrides
`_reserve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.modules.slots import Slots


class ContiguousLayer:
    """Keys and values of one layer, [batch, kv_heads, slots, dim], zeroed once so that unused slots stay finite."""

    def __init__(
        self, batch: int, heads: int, slots: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(batch, heads, slots, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(batch, heads, slots, value_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, slots.index, k)
        self.values.index_copy_(2, slots.index, v)
        if torch.compiler.is_compiling():
            return self.keys, self.values
        return self.keys[:, :, : slots.end], self.values[:, :, : slots.end]

    def place(self, slots: Slots) -> tuple[Tensor, Tensor] | None:
        """See `modelrig.components.LayerCache`."""
        return slots.index, slots.key_index[: slots.end]


class ContiguousCache:
    """Implements the `Cache` protocol's bookkeeping over `ContiguousLayer`s."""

    layers: Sequence[ContiguousLayer]
    first_room: int | None = None  # tokens to allocate at first; None for the whole capacity

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
    ) -> Self:
        """See `modelrig.components.CacheMaker`."""
        cache = cls(batch, capacity, device, padding)
        room = capacity if cls.first_room is None else min(capacity, cls.first_room)
        cache.layers = [
            ContiguousLayer(batch, spec.num_key_value_heads, room, spec.head_dim, spec.value_dim, dtype, device) for spec in layers
        ]
        return cache

    def __init__(self, batch: int, capacity: int, device: torch.device, padding: Sequence[int] | None) -> None:
        for name, value in (("batch", batch), ("max_len", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CacheError("CA-ARGS", f"must be a whole number of at least 1, not {value!r}", locus=name)
        self.batch, self.capacity, self.device = batch, capacity, device
        self._length = 0
        self._reserved: int | None = None
        self._index = torch.arange(capacity, device=device)
        self._slots: dict[int, Slots] = {}
        self._set_padding(padding)

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def begin(self, count: int) -> Slots:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise CacheError("CA-ARGS", f"a step needs at least one token, not {count!r}", locus="count")
        end = self._length + count
        if end > self.capacity:
            raise CacheError(
                "CA-FULL",
                f"{count} tokens do not fit: {self._length} of {self.capacity} slots are used",
                hint="make the cache with a larger max_len, rewind it, or reset it",
            )
        self._reserve(end)
        slots = self._slots.get(count)
        if slots is None:
            slots = self._slots[count] = self._new_slots(count)
        slots.past = self._length
        slots.index.copy_(self._index[self._length : end])
        if self.starts is None:
            slots.positions.copy_(slots.index)
        else:
            torch.sub(slots.index, self.starts[:, None], out=slots.positions).clamp_(min=0)
        self._reserved = count
        return slots

    def commit(self, count: int) -> None:
        if self._reserved is None:
            raise CacheError("CA-STATE", "commit without a begin")
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self._reserved:
            raise CacheError("CA-ARGS", f"{self._reserved} tokens were reserved, {count!r} cannot be committed", locus="count")
        self._length += count
        self._reserved = None

    def rewind(self, to: int) -> None:
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to <= self._length:
            raise CacheError("CA-REWIND", f"cannot rewind to {to!r}: the cache holds {self._length} tokens", locus="to")
        self._length, self._reserved = to, None

    def reset(self, padding: Sequence[int] | None = None) -> None:
        self._set_padding(padding)
        self._length, self._reserved = 0, None

    def _set_padding(self, padding: Sequence[int] | None) -> None:
        starts = None
        if padding is not None:
            rows = [int(row) for row in padding]
            if len(rows) != self.batch or any(not 0 <= row < self.capacity for row in rows):
                raise CacheError(
                    "CA-ARGS", f"needs {self.batch} counts from 0 to {self.capacity - 1}, not {rows[:8]}", locus="padding"
                )
            if any(rows):
                starts = torch.tensor(rows, device=self.device)
        self.starts: Tensor | None = starts
        self._slots.clear()

    def _new_slots(self, count: int) -> Slots:
        positions = torch.zeros(self.batch, count, dtype=torch.int64, device=self.device)
        return Slots(
            index=torch.zeros(count, dtype=torch.int64, device=self.device),
            positions=positions,
            key_index=self._index,
            starts=self.starts,
            layers=self.layers,
            past=0,
        )

    def _reserve(self, end: int) -> None:
        """Make room for `end` slots; called before anything else changes."""
