"""Older tokens packed to 8 or 4 bits a number, the newest as they are.

Which form of a token a query sees depends on the places of these two in their row and on nothing else, so it makes no difference in
what steps they come. A row's own tokens, after its padding, form blocks; a block is packed for the queries that stand `residual`
tokens or more behind its end. Within a step there may be queries of both kinds: then a token has two slots, and the mask says who
sees which.

Keys have a scale for each channel of a block, values for each token and group of channels (Liu et al., KIVI, 2024). Tokens as they
are lie in a ring, long enough that what a rewind within `headroom` makes visible again is still there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from attrs import define, field, frozen
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.modules.cache_state import CacheState
from modelrig.modules.slots import Slots, Visibility
from modelrig_plugins.caches.packing import Packed, pack, unpack_into
from modelrig_plugins.caches.quantized import (
    QuantizedOptions,
    code_bytes,
    packed_tokens,
    recent_tokens,
    seen_tokens,
    value_group,
)
from modelrig_plugins.caches.sliding_module import NOWHERE, Ring, RingLayer, SlidingCache, SlidingSlots


@frozen(eq=False)
class Rows:
    """Neighbouring rows with equal padding, and what a step has to do for them.

    Attributes:
        start: the index of their first token.
        stop: the end of the blocks that are packed for some query of the step.
        blocks: the numbers of those that are not packed yet.
        where: int64, the slots of their tokens in what the ring offers.
    """

    rows: slice
    start: int
    stop: int
    blocks: slice
    where: Tensor | None


@define(eq=False)
class Blocks:
    """What all layers have in common: how tokens form blocks, the rows' padding, and a scratch for what is unpacked."""

    options: QuantizedOptions
    tokens: int  # for which there is packed room
    padding: list[int]
    scratch: Tensor
    rows: list[Rows] = field(factory=list)  # of the step that was begun
    packed: int = 0  # slots that are offered as packed ones

    def count(self, length: int, start: int) -> int:
        """Blocks of a row that begins at `start` which are packed for the query before `length`."""
        return max(0, (length - 1 - start - self.options.residual) // self.options.group)

    def stop(self, length: int, padding: Sequence[int]) -> int:
        """The end of all blocks that are packed for the query before `length`."""
        return max(start + blocks * self.options.group if (blocks := self.count(length, start)) else 0 for start in padding)

    def begin(self, past: int, end: int, ring: Ring) -> None:
        """Prepare a step from `past` to `end`."""
        self.packed, self.rows = self.stop(end, self.padding), []
        for start, same in groupby(range(len(self.padding)), key=self.padding.__getitem__):
            numbers = list(same)
            blocks = slice(self.count(past, start), self.count(end, start))
            stop = start + blocks.stop * self.options.group if blocks.stop else start
            where = None
            if blocks.start < blocks.stop:
                index = torch.arange(start + blocks.start * self.options.group, stop, device=self.scratch.device)
                where = torch.remainder(index, ring.size)
                if ring.is_long(end - past):
                    where = torch.where(index < past, where, ring.size + index - past)
            self.rows.append(Rows(slice(numbers[0], numbers[-1] + 1), start, stop, blocks, where))

    def bound(self, index: Tensor) -> Tensor:
        """The first query that sees each token packed, int64 [tokens], or [batch, tokens] where rows differ."""
        group, residual = self.options.group, self.options.residual
        shifts = [start % group for start in self.padding]
        shift = shifts[0] if len(set(shifts)) == 1 else torch.tensor(shifts, device=index.device)[:, None]
        first: Tensor = torch.div(index - shift, group, rounding_mode="floor") * group
        return first + (shift + group + residual)


class QuantizedLayer(RingLayer):
    """One layer: the ring, `keys` and `values` [batch, kv_heads, size, dim], and `packed`, by the names it has in a state.

    Codes are uint8 [batch, kv_heads, tokens, dim or half of it]; scales and minima of keys [batch, kv_heads, blocks, key dim],
    those of values [batch, kv_heads, tokens, groups]. A token's index is its place there; blocks count from each row's start.
    """

    def __init__(self, ring: Ring, blocks: Blocks, spec: AttentionSpec, dtype: torch.dtype) -> None:
        batch, heads, device = len(blocks.padding), spec.num_key_value_heads, blocks.scratch.device
        super().__init__(ring, batch, heads, ring.size, spec.head_dim, spec.value_dim, dtype, device)
        self.blocks, bits, tokens = blocks, blocks.options.bits, blocks.tokens
        self.groups = spec.value_dim // value_group(spec.value_dim)
        shapes = {
            "key_codes": (tokens, code_bytes(spec.head_dim, bits), torch.uint8),
            "key_scales": (tokens // blocks.options.group, spec.head_dim, dtype),
            "key_lows": (tokens // blocks.options.group, spec.head_dim, dtype),
            "value_codes": (tokens, code_bytes(spec.value_dim, bits), torch.uint8),
            "value_scales": (tokens, self.groups, dtype),
            "value_lows": (tokens, self.groups, dtype),
        }
        self.packed = {
            name: torch.zeros(batch, heads, slots, size, dtype=one, device=device) for name, (slots, size, one) in shapes.items()
        }

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.nbytes for tensor in self.packed.values())

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        keys, values = super().update(k, v, slots)
        blocks = self.blocks
        if not blocks.packed:
            return keys, values
        all_keys, all_values = self._scratch()
        for rows in blocks.rows:
            if rows.where is not None:
                self._pack(rows, *(part[rows.rows].index_select(2, rows.where) for part in (keys, values)))
            for scratch in (all_keys, all_values):
                scratch[rows.rows, :, : rows.start] = 0  # no other row's numbers, which might be NaN
                scratch[rows.rows, :, rows.stop : blocks.packed] = 0
            self._unpack(rows, all_keys, all_values)
        return _beside(all_keys, blocks.packed, keys), _beside(all_values, blocks.packed, values)

    def _pack(self, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """Store the new blocks of `rows`, whose tokens are `keys` and `values`."""
        bits, group = self.blocks.options.bits, self.blocks.options.group
        tokens = slice(rows.start + rows.blocks.start * group, rows.stop)
        packed = pack(torch.unflatten(keys, 2, (-1, group)), 3, bits)
        self.packed["key_codes"][rows.rows, :, tokens] = packed.codes.flatten(2, 3)
        self.packed["key_scales"][rows.rows, :, rows.blocks] = packed.scale[:, :, :, 0]
        self.packed["key_lows"][rows.rows, :, rows.blocks] = packed.low[:, :, :, 0]
        packed = pack(torch.unflatten(values, 3, (self.groups, -1)), 4, bits)
        self.packed["value_codes"][rows.rows, :, tokens] = packed.codes.flatten(3, 4)
        self.packed["value_scales"][rows.rows, :, tokens] = packed.scale[..., 0]
        self.packed["value_lows"][rows.rows, :, tokens] = packed.low[..., 0]

    def _unpack(self, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """Write the blocks of `rows` to where they belong in `keys` and `values`."""
        if not (count := rows.blocks.stop):
            return
        bits, tokens = self.blocks.options.bits, slice(rows.start, rows.stop)
        codes, shape = self.packed["key_codes"][rows.rows, :, tokens], (count, self.blocks.options.group)
        scale, low = (self.packed[name][rows.rows, :, :count, None] for name in ("key_scales", "key_lows"))
        out = torch.unflatten(keys[rows.rows, :, tokens], 2, shape)
        unpack_into(out, Packed(torch.unflatten(codes, 2, shape), scale, low), bits)
        codes, shape = self.packed["value_codes"][rows.rows, :, tokens], (self.groups, -1)
        scale, low = (self.packed[name][rows.rows, :, tokens, :, None] for name in ("value_scales", "value_lows"))
        out = torch.unflatten(values[rows.rows, :, tokens], 3, shape)
        unpack_into(out, Packed(torch.unflatten(codes, 3, shape), scale, low), bits)

    def _scratch(self) -> tuple[Tensor, Tensor]:
        """Room for the keys and values that a step of this layer sees, until the next layer's."""
        batch, heads, size, key_dim = self.keys.shape
        shape, per_slot = (batch, heads, self.blocks.tokens + size), batch * heads * (self.blocks.tokens + size)
        flat = self.blocks.scratch
        keys, values = flat[: per_slot * key_dim], flat[per_slot * key_dim :][: per_slot * self.values.shape[3]]
        return keys.view(*shape, key_dim), values.view(*shape, -1)

    def _used(self, length: int, padding: Sequence[int]) -> dict[str, int]:
        """Packed buffer → the slots of it that a cache of `length` tokens uses."""
        stop, count = self.blocks.stop(length, padding), max(self.blocks.count(length, start) for start in padding)
        return {name: count if name in ("key_scales", "key_lows") else stop for name in self.packed}

    def held(self, length: int) -> dict[str, Tensor]:
        used = self._used(length, self.blocks.padding)
        return {**super().held(length), **{name: tensor[:, :, : used[name]] for name, tensor in self.packed.items()}}

    def exported(self, length: int) -> dict[str, Tensor]:
        return {**self.held(length), **super().exported(length)}

    def check(self, state: CacheState, prefix: str, length: int) -> None:
        super().check(state, prefix, length)
        used = self._used(length, state.integers("padding", self.keys.shape[0]))
        for name, tensor in self.packed.items():
            state.tensor(prefix + name, (*tensor.shape[:2], used[name], tensor.shape[3]), tensor.dtype)

    def take(self, exported: Mapping[str, Tensor], length: int) -> None:
        super().take(exported, length)
        used = self._used(length, self.blocks.padding)
        for name, tensor in self.packed.items():
            tensor[:, :, : used[name]] = exported[name]


class QuantizedSlots(SlidingSlots):
    """A step's place in the ring, and before it in what is packed.

    Attributes:
        offered: (key_index, seen_from, seen_until) of packed slots and the ring's; None when nothing is packed.
    """

    window: int
    offered: tuple[Tensor, Tensor, Tensor] | None

    def visible(self, spec: AttentionSpec) -> Visibility:
        step = self.rings[self.window]
        if self.offered is not None:
            key_index, seen_from, seen_until = self.offered
            return Visibility(self.index, key_index, self.starts, spec.window, spec.causal, None, seen_from, seen_until)
        if step.is_contiguous:
            return Slots.visible(self, spec)
        return Visibility(self.index, step.key_index, self.starts, spec.window, spec.causal, None)


class QuantizedCache(SlidingCache):
    slots_class = QuantizedSlots
    blocks: Blocks | None = None

    def make_layers(self) -> Sequence[QuantizedLayer]:
        options = self.options = self.options or QuantizedOptions()
        tokens, size = packed_tokens(self.capacity, options), recent_tokens(self.capacity, options)
        window = seen_tokens(options)
        ring = Ring(window, size, self.capacity, self.device)
        self.rings = {window: ring}
        largest = max((spec.num_key_value_heads * (spec.head_dim + spec.value_dim) for spec in self.specs), default=0)
        room = self.batch * largest * (tokens + size) if tokens else 0
        scratch = torch.zeros(room, dtype=self.dtype, device=self.device)
        self.blocks = Blocks(options, tokens, self.padding, scratch)
        return [QuantizedLayer(ring, self.blocks, spec, self.dtype) for spec in self.specs]

    @property
    def nbytes(self) -> int:
        assert self.blocks is not None
        return super().nbytes + self.blocks.scratch.nbytes

    def begin(self, count: int) -> Slots:
        slots = super().begin(count)
        assert isinstance(slots, QuantizedSlots) and self.blocks is not None
        ((slots.window, ring),) = self.rings.items()
        blocks, step = self.blocks, slots.rings[slots.window]
        blocks.begin(slots.past, slots.end, ring)
        slots.offered = None
        if blocks.packed:
            recent = step.key_index[: slots.end] if step.is_contiguous else step.key_index
            packed = self._index[: blocks.packed]
            bound = blocks.bound(torch.cat((packed, recent)))
            seen_from, seen_until = bound.clone(), bound
            seen_from[..., len(packed) :] = 0
            seen_until[..., : len(packed)] = NOWHERE
            slots.offered = (torch.cat((packed, recent)), seen_from, seen_until)
        return slots

    def export(self) -> dict[str, Tensor]:
        """As the base class's, and `form` int64 [3]: bits, group and residual."""
        with torch.inference_mode(False):
            return {**super().export(), "form": torch.tensor(self._form)}

    @property
    def _form(self) -> list[int]:
        return [self.options.bits, self.options.group, self.options.residual]

    def _check(self, state: CacheState, length: int, padding: Sequence[int]) -> None:
        super()._check(state, length, padding)
        form = state.integers("form", 3)
        state.require(form == self._form, "form", f"bits, group and residual are {form}, here {self._form}")

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        assert self.blocks is not None
        self.blocks.padding = self.padding

    def _set_padding(self, padding: Sequence[int] | None) -> None:
        super()._set_padding(padding)
        if self.blocks is not None:
            self.blocks.padding = self.padding


def _beside(scratch: Tensor, packed: int, recent: Tensor) -> Tensor:
    """`scratch` as far as it is `packed`, and `recent` after it."""
    end = packed + recent.shape[2]
    if end > scratch.shape[2]:  # a step that is too long for the ring
        return torch.cat((scratch[:, :, :packed], recent), dim=2)
    scratch[:, :, packed:end] = recent
    return scratch[:, :, :end]
