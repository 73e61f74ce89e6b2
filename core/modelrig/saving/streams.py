"""The bytes of tensors in parts of bounded size, as the writers of formats ask for them: little-endian and in C order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from attrs import evolve
from torch import Tensor

from modelrig.checkpoint.mapping import Origin, extent, whole_region
from modelrig.components import DTYPE_BITS, FormatReader, TensorEntry
from modelrig.loading.filling import AHEAD_BYTES
from modelrig.loading.pieces import destination
from modelrig.loading.transport import TensorFileReader

PART_BYTES = 4 << 20


def bytes_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The values of `tensor`, cast to `dtype`. A part is valid until the next one is asked for."""
    for block in _blocks(tensor, max(1, PART_BYTES // max(dtype.itemsize, tensor.element_size()))):
        values = block.detach().to("cpu", dtype).contiguous()
        flat = values.as_strided((values.numel(),), (1,))  # a single element may have any stride
        yield flat.view(torch.uint8).numpy().data


def _blocks(tensor: Tensor, count: int) -> Iterator[Tensor]:
    """`tensor` in C order, cut into runs of at most `count` elements."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= count:
        yield tensor
    elif tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), count):
            yield flat[start : start + count]
    else:
        rows = count // (tensor.numel() // tensor.shape[0])
        if rows:
            for start in range(0, tensor.shape[0], rows):
                yield tensor[start : start + rows]
        else:
            for row in tensor:
                yield from _blocks(row, count)


def bytes_of_stored(
    shape: Sequence[int], origins: Sequence[Origin], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[memoryview]:
    """A stored tensor out of what it was put into: the mapping read backwards."""
    regions = [origin.part.taken or whole_region(tuple(shape)) for origin in origins]
    inner = whole_region(tuple(shape))[1:]
    if all(region[1:] == inner for region in regions):  # cut along the first dimension, if at all: one after the other
        ordered = sorted(zip(regions, origins, strict=True), key=lambda item: item[0])
        for _, origin in ordered:
            yield from bytes_of(destination(tensors[origin.name], origin.part), dtype)
        return
    first = tensors[origins[0].name]
    whole = torch.empty(tuple(shape), dtype=first.dtype)
    for region, origin in zip(regions, origins, strict=True):
        view = destination(tensors[origin.name], origin.part)
        whole[tuple(slice(start, stop) for start, stop in region)].copy_(view.reshape(extent(region)))
    yield from bytes_of(whole, dtype)


def bytes_of_entry(
    file: TensorFileReader, entry: TensorEntry, reader: FormatReader, dtype: torch.dtype | None
) -> Iterator[memoryview]:
    """A tensor of a file, cast to `dtype`; None leaves it as it is stored."""
    stored: torch.dtype | None = getattr(torch, entry.dtype, None)
    if entry.strides is not None:
        data = file.read(entry.offset, torch.empty(entry.nbytes, dtype=torch.uint8))
        values = reader.decode(data, entry)
        yield from bytes_of(values, dtype or values.dtype)
        return
    bits = DTYPE_BITS[entry.dtype]
    as_it_is = stored is None or bits < 8  # torch cannot tell its values apart, and nobody asked to change them
    for offset, data in _read(file, entry):
        if as_it_is:
            yield data.numpy().data
            continue
        count = data.numel() * 8 // bits
        values = reader.decode(data, evolve(entry, shape=(count,), offset=offset, nbytes=data.numel()))
        yield from bytes_of(values, dtype or values.dtype)


def _read(file: TensorFileReader, entry: TensorEntry) -> Iterator[tuple[int, Tensor]]:
    """The bytes of `entry` in parts, each with its offset in the file; while one is used, the next is read."""
    if entry.nbytes == 0:
        return
    if entry.nbytes <= PART_BYTES:
        yield entry.offset, file.read(entry.offset, torch.empty(entry.nbytes, dtype=torch.uint8))
        return
    stagings = [torch.empty(PART_BYTES, dtype=torch.uint8) for _ in range(2)]
    end = entry.offset + entry.nbytes

    def read(offset: int) -> Tensor:
        file.announce(offset + PART_BYTES, AHEAD_BYTES)
        stagings.reverse()
        return file.read(offset, stagings[0][: end - offset])

    with ThreadPoolExecutor(1, "modelrig-read") as pool:
        ahead = pool.submit(read, entry.offset)
        for offset in range(entry.offset, end, PART_BYTES):
            data = ahead.result()
            if offset + PART_BYTES < end:
                ahead = pool.submit(read, offset + PART_BYTES)
            yield offset, data
