"""Layers with a window keep it in a ring; the others keep everything.

Token number `index` lies in slot `index % size` of a ring of window and headroom. As long as a step is no longer than the headroom
and one, what it overwrites is out of the window of all its tokens, so it is written at once. The keys of a longer one are put
beside those of the ring, and into it when they are committed. Until a token is overwritten a ring is as a contiguous cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from attrs import define
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.modules.cache import ContiguousCache, ContiguousLayer
from modelrig.modules.slots import Slots, Visibility
from modelrig_plugins.caches.sliding import SlidingOptions, room

NOWHERE = 1 << 62  # the number of what an empty slot holds: later than any query


@define(eq=False)
class RingStep:
    """One step's place in the rings of a window. Its tensors are updated in place where a graph may hold them."""

    where: Tensor  # int64 [count], slots to write
    key_index: Tensor  # int64, the token in each slot that the step may see
    is_long: bool
    is_contiguous: bool = True  # nothing was overwritten: slot and index are the same


class Ring:
    """What the layers of one window have in common.

    Attributes:
        held: int64 [size], the index that each slot holds.
        written: the highest index ever written and kept, and one: what is `size` or more before it is gone.
    """

    def __init__(self, window: int, size: int, capacity: int, device: torch.device) -> None:
        self.window, self.size, self.never_wraps = window, size, size >= capacity
        self.held = torch.full((size,), NOWHERE, device=device)
        self.written = 0
        self.steps: dict[int, RingStep] = {}

    def begin(self, past: int, index: Tensor) -> RingStep:
        count = index.shape[0]
        is_long = not self.never_wraps and count > self.size - self.window + 1
        step = self.steps.get(count)
        if step is None:
            step = self.steps[count] = RingStep(torch.zeros_like(index), self.held, is_long)
        torch.remainder(index, self.size, out=step.where)
        if is_long:
            step.key_index = torch.cat((self.held, index))
        else:
            self.held.index_copy_(0, step.where, index)
            self.written = max(self.written, past + count)
        step.is_contiguous = self.written <= self.size and not is_long
        return step

    def keeps(self, to: int) -> bool:
        """Whether everything that token `to` may see is there."""
        return to == 0 or max(0, to - self.window + 1) >= self.written - self.size

    def forget(self, to: int) -> None:
        """Slots that hold token `to` or a later one are empty."""
        self.held.masked_fill_(self.held >= to, NOWHERE)
        if to == 0:
            self.written = 0


class RingLayer(ContiguousLayer):
    """Keys and values of one layer, [batch, kv_heads, size, dim]."""

    def __init__(self, ring: Ring, *shape: Any) -> None:
        super().__init__(*shape)
        self.ring = ring
        self.pending: tuple[Tensor, Tensor] | None = None  # of a step that is too long to be written before it is committed

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        assert isinstance(slots, SlidingSlots)
        step = slots.rings[self.ring.window]
        if step.is_long:
            self.pending = (k, v)
            return torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self.keys.index_copy_(2, step.where, k)
        self.values.index_copy_(2, step.where, v)
        if torch.compiler.is_compiling() or not step.is_contiguous:
            return self.keys, self.values
        return self.keys[:, :, : slots.end], self.values[:, :, : slots.end]

    def place(self, slots: Slots) -> tuple[Tensor, Tensor] | None:
        assert isinstance(slots, SlidingSlots)
        step = slots.rings[self.ring.window]
        if step.is_long:
            return None
        return step.where, slots.key_index[: slots.end] if step.is_contiguous else step.key_index

    def keep(self, index: Tensor) -> None:
        """Write those of the pending keys and values whose `index` is given: the last of the first ones."""
        if self.pending is None:
            return
        k, v = self.pending
        last = index.shape[0]
        first = max(0, last - self.ring.size)
        where = torch.remainder(index[first:], self.ring.size)
        self.keys.index_copy_(2, where, k[:, :, first:last])
        self.values.index_copy_(2, where, v[:, :, first:last])
        self.pending = None


class SlidingSlots(Slots):
    """A step's place in contiguous layers, and in the rings of each window."""

    rings: dict[int, RingStep]

    def visible(self, spec: AttentionSpec) -> Visibility:
        step = None if spec.window is None else self.rings[spec.window]
        if step is None or (step.is_contiguous and not torch.compiler.is_compiling()):
            return super().visible(spec)
        return Visibility(self.index, step.key_index, self.starts, spec.window, spec.causal, None)


class SlidingCache(ContiguousCache):
    rings: dict[int, Ring]

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
        options: SlidingOptions | None = None,
    ) -> Self:
        """See `modelrig.components.CacheMaker`."""
        cache = cls(batch, capacity, device, padding)
        cache.rings = {
            spec.window: Ring(spec.window, room(spec, capacity, options), capacity, device)
            for spec in layers
            if spec.window is not None
        }
        made: list[ContiguousLayer] = []
        for spec in layers:
            size = room(spec, capacity, options)
            shape = (batch, spec.num_key_value_heads, size, spec.head_dim, spec.value_dim, dtype, device)
            made.append(ContiguousLayer(*shape) if spec.window is None else RingLayer(cache.rings[spec.window], *shape))
        cache.layers = made
        return cache

    def begin(self, count: int) -> Slots:
        is_abandoned = self._reserved is not None
        slots = super().begin(count)
        assert isinstance(slots, SlidingSlots)
        if is_abandoned:
            self._forget(self._length)
        slots.rings = {window: ring.begin(self._length, slots.index) for window, ring in self.rings.items()}
        return slots

    def commit(self, count: int) -> None:
        start, reserved = self._length, self._reserved
        super().commit(count)
        index = self._index[start : self._length]
        for layer in self.layers:
            if isinstance(layer, RingLayer):
                layer.keep(index)
        for ring in self.rings.values():
            if reserved is not None and ring.steps[reserved].is_long:
                kept = index[-ring.size :]
                ring.held.index_copy_(0, torch.remainder(kept, ring.size), kept)
                ring.written = max(ring.written, self._length)
        if count != reserved:
            self._forget(self._length)

    def rewind(self, to: int) -> None:
        is_number = isinstance(to, int) and not isinstance(to, bool) and 0 <= to <= self._length
        short = [ring for ring in self.rings.values() if is_number and to < self._length and not ring.keeps(to)]
        if short:
            text = f"cannot rewind from {self._length} to {to}: a window of {short[0].window} tokens before it is not kept any more"
            raise CacheError("CA-REWIND", text, locus="to", hint="reset it and begin anew, or plan with more headroom")
        super().rewind(to)
        self._forget(to)

    def reset(self, padding: Sequence[int] | None = None) -> None:
        super().reset(padding)
        self._forget(0)

    def _forget(self, to: int) -> None:
        for ring in self.rings.values():
            ring.forget(to)
        for layer in self.layers:
            if isinstance(layer, RingLayer):
                layer.pending = None

    def _new_slots(self, count: int) -> Slots:
        plain = super()._new_slots(count)
        return SlidingSlots(
            index=plain.index,
            positions=plain.positions,
            key_index=plain.key_index,
            starts=plain.starts,
            layers=plain.layers,
            past=0,
        )
