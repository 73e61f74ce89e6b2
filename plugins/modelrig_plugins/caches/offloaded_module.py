"""Keys and values that lie elsewhere than on the device that runs.

They are laid out [slots, batch, kv_heads, dim], so that what is held is one range of bytes: one copy, or one call to the kernel.

* For a model on the CPU they are pages of a file that has no name any more. The kernel writes them to disk and drops them where
  memory is wanted for something else; while a layer computes, the next one's pages are asked for.
* For a model on a GPU they are page-locked main memory, and layers take turns in two slots on the GPU: while one computes, the next
  one's tokens are copied to the other slot.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor

from modelrig.components import AttentionSpec
from modelrig.errors import CacheError
from modelrig.modules.cache import ContiguousCache, ContiguousLayer
from modelrig.modules.slots import Slots

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of a layer's keys and values, as they are laid out
PAGE = mmap.PAGESIZE


class OffloadedCache:
    """Makes the cache that suits the device."""

    @staticmethod
    def create(layers: Sequence[AttentionSpec], *, device: torch.device, **given: Any) -> ContiguousCache:
        """See `modelrig.components.CacheMaker`. Raises `CacheError` (CA-SPACE) where the disk has no room for it."""
        kind: type[ContiguousCache] = DiskCache if device.type == "cpu" else HostCache
        return kind.create(layers, device=device, **given)


def shapes_of(spec: AttentionSpec, batch: int, capacity: int) -> Shapes:
    rows = (capacity, batch, spec.num_key_value_heads)
    return (*rows, spec.head_dim), (*rows, spec.value_dim)


# ------------------------------------------------------------------------------------------------ on disk


@define(eq=False)
class MappedFile:
    """Bytes of a file without a name, so that nothing is left of it however this process ends."""

    pages: mmap.mmap

    @classmethod
    def create(cls, size: int, directory: str | None) -> MappedFile:
        """Raises `CacheError` (CA-SPACE) if `directory` cannot be written or has no room for `size` bytes."""
        directory = directory or tempfile.gettempdir()
        try:
            free = shutil.disk_usage(directory).free
            if free < size:
                raise CacheError(
                    "CA-SPACE", f"a cache of {size:,} bytes does not fit: {free:,} are free", locus=directory, hint=_HINT
                )
            with tempfile.TemporaryFile(dir=directory) as file:
                # Blocks that are only promised would end the process when the disk is full.
                os.posix_fallocate(file.fileno(), 0, size)
                return cls(mmap.mmap(file.fileno(), size))
        except OSError as error:
            raise CacheError("CA-SPACE", f"no file for a cache of {size:,} bytes: {error}", locus=directory, hint=_HINT) from error

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        return torch.frombuffer(self.pages, dtype=dtype, count=prod(shape), offset=offset).view(*shape)

    def ask_for(self, start: int, stop: int) -> None:
        """Let the kernel read these bytes while something else computes."""
        start -= start % PAGE
        self.pages.madvise(mmap.MADV_WILLNEED, start, stop - start)


_HINT = "choose another folder with --set cache.directory=..., or a smaller context"


class DiskLayer(ContiguousLayer):
    """One layer's part of the file, from byte `offset` on. `next` is the layer that computes after it."""

    next: DiskLayer

    def __init__(self, file: MappedFile, offset: int, shapes: Shapes, dtype: torch.dtype) -> None:
        keys = file.tensor(shapes[0], dtype, offset)
        values = file.tensor(shapes[1], dtype, offset + keys.nbytes)
        self.keys, self.values = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        self.file, self.parts = file, ((offset, keys[0].nbytes), (offset + keys.nbytes, values[0].nbytes))

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        self.next.prefetch(slots.past)
        return super().update(k, v, slots)

    def prefetch(self, tokens: int) -> None:
        for offset, size in self.parts:
            if tokens:
                self.file.ask_for(offset, offset + tokens * size)


class DiskCache(ContiguousCache):
    layers: Sequence[DiskLayer]

    def make_layers(self) -> Sequence[DiskLayer]:
        shapes = [shapes_of(spec, self.batch, self.capacity) for spec in self.specs]
        sizes = [sum(map(prod, pair)) * self.dtype.itemsize for pair in shapes]
        if not sizes:
            return []
        file = MappedFile.create(sum(sizes), getattr(self.options, "directory", None))
        layers = [DiskLayer(file, sum(sizes[:number]), pair, self.dtype) for number, pair in enumerate(shapes)]
        for number, layer in enumerate(layers):
            layer.next = layers[(number + 1) % len(layers)]
        return layers


# ------------------------------------------------------------------------------------------------ in main memory


class Slot:
    """Room on the device for the keys and values of any layer."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.room = torch.zeros(elements, dtype=dtype, device=device)
        if stream is not None:
            self.room.record_stream(stream)
        self.holds: tuple[int, int] | None = None  # (layer, its first tokens) that were asked for
        self.filled: torch.cuda.Event | None = None

    def of(self, layer: HostLayer) -> tuple[Tensor, Tensor]:
        """Keys and values as `layer` lays them out."""
        keys, values = layer.host
        return self.room[: keys.numel()].view(keys.shape), self.room[keys.numel() :][: values.numel()].view(values.shape)


class Turns:
    """Two slots on the device in which layers take turns, and the stream that copies. On the CPU, where there is none, copies are
    made at once: the order of things is the same."""

    def __init__(self, layers: Sequence[HostLayer], elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.slots = [Slot(elements, dtype, device, self.stream) for _ in range(2)]

    def begin(self, number: int, past: int) -> tuple[Tensor, Tensor]:
        """The slot with the first `past` tokens of layer `number`; the other one is free from now on."""
        self.slots.reverse()
        slot = self.slots[0]
        if slot.holds is None or slot.holds[0] != number or slot.holds[1] < past:
            self._fetch(slot, number, past)
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        slot.holds = None
        return slot.of(self.layers[number])

    def end(self, number: int, past: int, end: int) -> None:
        """Bring what was written of layer `number` home, and the layer after it to the other slot."""
        self._wait_for_device()
        with torch.cuda.stream(self.stream):  # does nothing for None
            for home, here in zip(self.layers[number].host, self.slots[0].of(self.layers[number]), strict=True):
                home[past:end].copy_(here[past:end], non_blocking=True)
        after = (number + 1) % len(self.layers)
        self._fetch(self.slots[1], after, past if after else end, waits=False)

    def settle(self) -> None:
        """Everything is at home, and what comes home otherwise will be seen."""
        if self.stream is not None:
            self.stream.synchronize()
        for slot in self.slots:
            slot.holds = None

    def _fetch(self, slot: Slot, number: int, tokens: int, *, waits: bool = True) -> None:
        if waits:
            self._wait_for_device()
        layer = self.layers[number]
        with torch.cuda.stream(self.stream):
            for home, here in zip(layer.host, slot.of(layer), strict=True):
                here[:tokens].copy_(home[:tokens], non_blocking=True)
        slot.holds = (number, tokens)
        slot.filled = None if self.stream is None else self.stream.record_event()

    def _wait_for_device(self) -> None:
        """Copies come after what the device was asked to compute: the step that used a slot, and what it wrote there."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))


class HostLayer(ContiguousLayer):
    """One layer in main memory, `host` [slots, batch, kv_heads, dim] of keys and values; number `number` of its cache."""

    turns: Turns

    def __init__(self, number: int, shapes: Shapes, dtype: torch.dtype, *, is_pinned: bool) -> None:
        self.number = number
        self.host = [torch.zeros(shape, dtype=dtype, pin_memory=is_pinned) for shape in shapes]
        self.keys, self.values = (tensor.permute(1, 2, 0, 3) for tensor in self.host)

    def update(self, k: Tensor, v: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        keys, values = (tensor.permute(1, 2, 0, 3) for tensor in self.turns.begin(self.number, slots.past))
        keys.index_copy_(2, slots.index, k)
        values.index_copy_(2, slots.index, v)
        self.turns.end(self.number, slots.past, slots.end)
        return keys[:, :, : slots.end], values[:, :, : slots.end]

    def held(self, length: int) -> dict[str, Tensor]:
        self.turns.settle()
        return super().held(length)

    def scrub(self, length: int, end: int, touched: int) -> None:
        """Nothing: no kernel is given slots beyond the step."""

    def take(self, exported: Mapping[str, Tensor], length: int) -> None:
        super().take(exported, length)
        self.turns.settle()


class HostCache(ContiguousCache):
    layers: Sequence[HostLayer]
    turns: ClassVar[type[Turns]] = Turns

    def make_layers(self) -> Sequence[HostLayer]:
        shapes = [shapes_of(spec, self.batch, self.capacity) for spec in self.specs]
        is_pinned = self.device.type == "cuda"
        layers = [HostLayer(number, pair, self.dtype, is_pinned=is_pinned) for number, pair in enumerate(shapes)]
        turns = self.turns(layers, max((sum(map(prod, pair)) for pair in shapes), default=0), self.dtype, self.device)
        for layer in layers:
            layer.turns = turns
        return layers
