"""Positions and lengths of a cache whose slot numbers equal token indices: what contiguous caches have in common.

A subclass that keeps something else than `ContiguousLayer`s overrides `make_layer`; one that grows sets `first_room` and overrides
`_reserve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.modules.cache_state import CacheState
from modelrig.modules.compiling import is_compiling
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
        if is_compiling():
            return self.keys, self.values
        return self.keys[:, :, : slots.end], self.values[:, :, : slots.end]

    def scrub(self, length: int, end: int, touched: int) -> None:  # noqa: ARG002 - other layers ask for it
        """Zero what a step from `length` to `end` leaves where it is, of tokens before `touched` that are forgotten: a kernel that
        masks a slot multiplies it by zero, and NaN and infinity survive that."""
        if end < touched:
            self.keys[:, :, end:touched] = 0
            self.values[:, :, end:touched] = 0

    def held(self, length: int) -> dict[str, Tensor]:
        """The buffers as far as a cache of `length` tokens uses them: views whose first axis are the rows."""
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length]}

    def exported(self, length: int) -> dict[str, Tensor]:
        """What another layer of its kind needs to go on from `length` tokens."""
        return self.held(length)

    def check(self, state: CacheState, prefix: str, length: int) -> None:
        """Whether what `exported` gave, each name with `prefix` before it, is of such a layer with `length` tokens."""
        for name, full in (("keys", self.keys), ("values", self.values)):
            state.tensor(prefix + name, (*full.shape[:2], length, *full.shape[3:]), full.dtype)

    def take(self, exported: Mapping[str, Tensor], length: int) -> None:
        """Hold what was `exported` and checked."""
        for name, view in self.held(length).items():
            view.copy_(exported[name])

    def place(self, slots: Slots) -> tuple[Tensor, Tensor] | None:
        """See `modelrig.components.LayerCache`."""
        return slots.index, slots.key_index[: slots.end]


class ContiguousCache:
    """Implements the `Cache` protocol's bookkeeping over `ContiguousLayer`s."""

    layers: Sequence[ContiguousLayer]
    specs: tuple[AttentionSpec, ...]
    dtype: torch.dtype
    options: Any
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
        options: Any = None,
    ) -> Self:
        """See `modelrig.components.CacheMaker`."""
        cache = cls(batch, capacity, device, padding)
        cache.specs, cache.dtype, cache.options = tuple(layers), dtype, options
        cache.layers = cache.make_layers()
        return cache

    def make_layers(self) -> Sequence[ContiguousLayer]:
        """An empty layer for each of `specs`."""
        room = self.capacity if self.first_room is None else min(self.capacity, self.first_room)
        return [self.make_layer(spec, room) for spec in self.specs]

    def make_layer(self, spec: AttentionSpec, room: int) -> ContiguousLayer:
        """An empty layer with `room` slots a row."""
        sizes = (self.batch, spec.num_key_value_heads, room, spec.head_dim, spec.value_dim)
        return ContiguousLayer(*sizes, self.dtype, self.device)

    def __init__(self, batch: int, capacity: int, device: torch.device, padding: Sequence[int] | None) -> None:
        for name, value in (("batch", batch), ("max_len", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CacheError("CA-ARGS", f"must be a whole number of at least 1, not {value!r}", locus=name)
        self.batch, self.capacity, self.device = batch, capacity, device
        self._length = self._touched = 0  # tokens committed, and an end of those that slots may hold
        self._reserved: int | None = None
        try:
            self._index = torch.arange(capacity, device=device)
        except RuntimeError as error:
            raise CacheError("CA-ARGS", f"there is no memory to number {capacity} tokens", locus="max_len") from error
        self._slots: dict[int, Slots] = {}
        self.padding: list[int] = []  # of each row
        self.starts: Tensor | None = None  # the same as a tensor, int64 [batch]; None when no row can be padded
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
        if self._length < self._touched:
            for layer in self.layers:
                layer.scrub(self._length, end, self._touched)
        self._touched = end
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

    # ------------------------------------------------------------------------------------------ rows and states

    def reorder(self, rows: Sequence[int]) -> None:
        """See `modelrig.components.Cache`. In place, through a scratch of the largest buffer's size."""
        chosen = list(rows)
        if len(chosen) != self.batch or not all(type(row) is int and 0 <= row < self.batch for row in chosen):
            raise CacheError("CA-ARGS", f"needs {self.batch} numbers from 0 to {self.batch - 1}, not {chosen[:8]}", locus="rows")
        if self._reserved is not None:
            raise CacheError("CA-STATE", "reorder within a step", hint="commit the step, or rewind to forget it")
        if chosen == list(range(self.batch)):
            return
        views = [view for layer in self.layers for view in layer.held(self._length).values()]
        order = torch.tensor(chosen, device=views[0].device)
        # The scratch exists before anything changes, so running out of memory changes nothing.
        scratch = torch.empty(max(view.nbytes for view in views), dtype=torch.uint8, device=order.device)
        for view in views:
            taken = scratch[: view.nbytes].view(view.dtype).view(view.shape)
            view.copy_(torch.index_select(view, 0, order, out=taken))
        self.padding = [self.padding[row] for row in chosen]
        if self.starts is not None:
            self.starts.copy_(self.starts[chosen])

    def fork(self, copies: int) -> Self:
        """See `modelrig.components.Cache`. A step that was begun and not committed is no part of it."""
        if type(copies) is not int or copies < 1:
            raise CacheError("CA-ARGS", f"must be a whole number of at least 1, not {copies!r}", locus="copies")
        with torch.inference_mode(False):  # it must serve outside of an inference block too
            made = self.create(
                self.specs,
                batch=self.batch * copies,
                capacity=self.capacity,
                dtype=self.dtype,
                device=self.device,
                padding=None if self.starts is None else [row for row in self.padding for _ in range(copies)],
                options=self.options,
            )
            made._reserve(self._length)
            made._length = made._touched = self._length
            made._follow(self)
            for layer, new in zip(self.layers, made.layers, strict=True):
                held = layer.held(self._length)
                for name, view in new.held(self._length).items():
                    torch.unflatten(view, 0, (self.batch, copies)).copy_(held[name][:, None])
        return made

    def export(self) -> dict[str, Tensor]:
        """See `modelrig.components.Cache`: `length` int64 [1], `padding` int64 [batch] and each layer's, as `0.keys`."""
        with torch.inference_mode(False):
            state = {"length": torch.tensor([self._length]), "padding": torch.tensor(self.padding)}
            for number, layer in enumerate(self.layers):
                for name, tensor in layer.exported(self._length).items():
                    state[f"{number}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        return state

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """See `modelrig.components.Cache`."""
        checked = CacheState(state)
        (length,), padding = checked.integers("length", 1), checked.integers("padding", self.batch)
        for name, slots in (("length", length), ("padding", max(padding) + 1)):
            checked.require(slots <= self.capacity, name, f"{slots} slots, of which there are {self.capacity}", "CA-FULL")
        for number, layer in enumerate(self.layers):
            layer.check(checked, f"{number}.", length)
        self._check(checked, length, padding)
        checked.finish()
        self.rewind(self._length)  # a step that was never committed is not to be
        self._reserve(length)
        self._set_padding(padding if any(padding) else None)
        self._length, self._touched, self._reserved = length, max(length, self._touched), None
        self._learn(checked)
        for number, layer in enumerate(self.layers):
            start = f"{number}."
            layer.take({name.removeprefix(start): one for name, one in state.items() if name.startswith(start)}, length)

    def _follow(self, other: Self) -> None:
        """Know what `other`, which has the same length, knows beside what its layers hold."""

    def _check(self, state: CacheState, length: int, padding: Sequence[int]) -> None:
        """Whether `state` is right in what is no layer's own; changes nothing."""

    def _learn(self, state: CacheState) -> None:
        """Know what `state`, which is checked, says beside what layers hold."""

    def _set_padding(self, padding: Sequence[int] | None) -> None:
        starts, rows = None, [0] * self.batch
        if padding is not None:
            rows = [int(row) for row in padding]
            if len(rows) != self.batch or any(not 0 <= row < self.capacity for row in rows):
                raise CacheError(
                    "CA-ARGS", f"needs {self.batch} counts from 0 to {self.capacity - 1}, not {rows[:8]}", locus="padding"
                )
            with torch.inference_mode(False):  # it must serve outside of an inference block too
                starts = torch.tensor(rows, device=self.device)
        self.padding, self.starts = rows, starts
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
