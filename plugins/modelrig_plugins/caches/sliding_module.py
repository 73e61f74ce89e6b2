"""Layers with a window keep it in a ring; the others keep everything.

Token number `index` lies in slot `index % size` of a ring of window and headroom. As long as a step is no longer than the headroom
and one, what it overwrites is out of the window of all its tokens, so it is written at once. The keys of a longer one are put
beside those of the ring, and into it when they are committed. Until a token is overwritten a ring is as a contiguous cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from attrs import define
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.modules.cache import ContiguousCache, ContiguousLayer
from modelrig.modules.cache_state import CacheState
from modelrig.modules.compiling import is_compiling
from modelrig.modules.slots import Slots, Visibility
from modelrig_plugins.caches.sliding import room

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
        touched: the end of the tokens that slots may hold, forgotten ones too.
    """

    def __init__(self, window: int, size: int, capacity: int, device: torch.device) -> None:
        self.window, self.size, self.never_wraps = window, size, size >= capacity
        self.held = torch.full((size,), NOWHERE, device=device)
        self.written = self.touched = 0
        self.steps: dict[int, RingStep] = {}

    def is_long(self, count: int) -> bool:
        """Whether a step of so many tokens would overwrite what some of them see."""
        return not self.never_wraps and count > self.size - self.window + 1

    def begin(self, past: int, index: Tensor) -> RingStep:
        count = index.shape[0]
        is_long = self.is_long(count)
        step = self.steps.get(count)
        if step is None:
            step = self.steps[count] = RingStep(torch.zeros_like(index), self.held, is_long)
        torch.remainder(index, self.size, out=step.where)
        self.touched = past if is_long else past + count  # the rest was scrubbed
        if is_long:
            step.key_index = torch.cat((self.held, index))
        else:
            self.held.index_copy_(0, step.where, index)
            self.written = max(self.written, past + count)
        step.is_contiguous = self.written <= self.size and not is_long
        return step

    @property
    def first(self) -> int:
        """The lowest index that is not overwritten."""
        return max(0, self.written - self.size)

    def hold(self, written: int, length: int) -> None:
        """Say that it holds the tokens before `length` that are there still when so many were written."""
        self.forget(0)
        self.written, self.touched = written, length
        index = torch.arange(self.first, length, device=self.held.device)
        self.held.index_copy_(0, torch.remainder(index, self.size), index)

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
        if is_compiling() or not step.is_contiguous:
            return self.keys, self.values
        return self.keys[:, :, : slots.end], self.values[:, :, : slots.end]

    def scrub(self, length: int, end: int, touched: int) -> None:  # noqa: ARG002 - the ring knows what it touched
        start = length if self.ring.is_long(end - length) else end
        if start < self.ring.touched:
            index = torch.arange(max(start, self.ring.touched - self.ring.size), self.ring.touched, device=self.keys.device)
            where = torch.remainder(index, self.ring.size)
            self.keys.index_fill_(2, where, 0)
            self.values.index_fill_(2, where, 0)

    def held(self, length: int) -> dict[str, Tensor]:  # noqa: ARG002 - a ring's slots are in another order
        used = min(self.ring.written, self.ring.size)
        return {"keys": self.keys[:, :, :used], "values": self.values[:, :, :used]}

    def exported(self, length: int) -> dict[str, Tensor]:
        """What is not overwritten, in the order of tokens: it fits into a ring of another size too."""
        where = torch.remainder(torch.arange(self.ring.first, length, device=self.keys.device), self.ring.size)
        return {"keys": self.keys.index_select(2, where), "values": self.values.index_select(2, where)}

    def check(self, state: CacheState, prefix: str, length: int) -> None:
        for name, full in (("keys", self.keys), ("values", self.values)):
            found = state.tensor(prefix + name, (*full.shape[:2], None, full.shape[3]), full.dtype)
            kept, needed = found.shape[2], min(length, self.ring.window - 1)
            state.require(needed <= kept <= length, prefix + name, f"{kept} tokens of {length}, of which {needed} are needed")

    def take(self, exported: Mapping[str, Tensor], length: int) -> None:
        index = torch.arange(self.ring.first, length, device=self.keys.device)
        where = torch.remainder(index, self.ring.size)
        for name, full in (("keys", self.keys), ("values", self.values)):
            found = exported[name]
            full.zero_()
            full.index_copy_(2, where, found[:, :, found.shape[2] - len(index) :].to(full.device))

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
        if step is None or (step.is_contiguous and not is_compiling()):
            return super().visible(spec)
        return Visibility(self.index, step.key_index, self.starts, spec.window, spec.causal, None)


class SlidingCache(ContiguousCache):
    slots_class: type[SlidingSlots] = SlidingSlots
    rings: dict[int, Ring]

    def make_layers(self) -> Sequence[ContiguousLayer]:
        self.rings = {
            spec.window: Ring(spec.window, room(spec, self.capacity, self.options), self.capacity, self.device)
            for spec in self.specs
            if spec.window is not None
        }
        return super().make_layers()

    def make_layer(self, spec: AttentionSpec, room: int) -> ContiguousLayer:
        if spec.window is None:
            return super().make_layer(spec, room)
        ring = self.rings[spec.window]
        sizes = (self.batch, spec.num_key_value_heads, ring.size, spec.head_dim, spec.value_dim)
        return RingLayer(ring, *sizes, self.dtype, self.device)

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
                ring.written, ring.touched = max(ring.written, self._length), self._length
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

    def _follow(self, other: Self) -> None:
        for window, ring in self.rings.items():
            ring.hold(other.rings[window].written, self._length)

    def _check(self, state: CacheState, length: int, padding: Sequence[int]) -> None:  # noqa: ARG002 - the base class's
        for window in self.rings:
            kept = self._kept(state, window)
            state.require(len(set(kept)) == 1, f"window {window}", f"its layers hold {kept[:8]} tokens")

    def _learn(self, state: CacheState) -> None:
        for window, ring in self.rings.items():
            first = self._length - min(self._kept(state, window)[0], ring.size)
            ring.hold(self._length if first == 0 else first + ring.size, self._length)

    def _kept(self, state: CacheState, window: int) -> list[int]:
        """The tokens in each tensor of the layers of one ring."""
        ring = self.rings[window]
        numbers = [number for number, layer in enumerate(self.layers) if isinstance(layer, RingLayer) and layer.ring is ring]
        return [state.tensors[f"{number}.{name}"].shape[2] for number in numbers for name in ("keys", "values")]

    def _forget(self, to: int) -> None:
        for ring in self.rings.values():
            ring.forget(to)
        for layer in self.layers:
            if isinstance(layer, RingLayer):
                layer.pending = None

    def _new_slots(self, count: int) -> Slots:
        plain = super()._new_slots(count)
        return self.slots_class(
            index=plain.index,
            positions=plain.positions,
            key_index=plain.key_index,
            starts=plain.starts,
            layers=plain.layers,
            past=0,
        )
