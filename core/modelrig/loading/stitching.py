"""A tensor that is put together of stored ones, such as stacked experts: its parts mapped side by side rather than read.

A mapping consists of whole pages, so this serves parts that begin at the same place of a page in their files and in the tensor.
Where the tensor begins is chosen so that it serves most of them: the sizes of real weights are multiples of a page, so those that
follow one another in a file agree. Pages that two parts share are memory of the tensor's own, into which they are read.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from modelrig.components import Part, TensorEntry
from modelrig.loading.pieces import Piece, consecutive
from modelrig.loading.transport import TensorFileReader, allocate_pages, map_over

if TYPE_CHECKING:
    from modelrig.loading.filling import Wanted

PART_BYTES = 1 << 20  # a smaller part is read: a process may have only so many mappings
PAGE = mmap.PAGESIZE


def allocate_to_stitch(one: Wanted, entries: Mapping[str, TensorEntry]) -> Tensor | None:
    """Memory for `one` such that `stitch` can map files over most of it; None where that is not possible."""
    if len(one.sources) < 2 or not one.may_view or one.buffer is not None or one.device.type != "cpu" or one.dtype == torch.bool:
        return None
    begins: Counter[int] = Counter()
    for part in one.sources:
        entry = entries[part.name]
        place = _place(entry, part, one)
        if place is not None:
            begins[(entry.offset - place) % PAGE] += entry.nbytes
    [(begin, count)] = begins.most_common(1) or [(0, 0)]
    if not count or count * 2 < one.nbytes or begin % one.dtype.itemsize:
        return None
    return allocate_pages(one.nbytes, begin).view(one.dtype).view(one.shape)


def stitch(file: TensorFileReader, entry: TensorEntry, part: Part, one: Wanted, tensor: Tensor) -> list[Piece] | None:
    """Map the pages of `entry` over their place in `tensor`, which `allocate_to_stitch` made.

    Returns:
        What remains to be read, at most two pieces of less than a page; None if nothing could be mapped.
    """
    place = _place(entry, part, one)
    data = tensor.view(-1).view(torch.uint8)
    if place is None or (data.data_ptr() + place - entry.offset) % PAGE:
        return None
    start, end = -entry.offset % PAGE, (entry.offset + entry.nbytes) // PAGE * PAGE - entry.offset
    if not map_over(data[place + start : place + end], file, entry.offset + start):
        return None
    edges = [(0, start), (end, entry.nbytes)]
    return [_piece(entry, place, first, last, tensor) for first, last in edges if first < last]


def _place(entry: TensorEntry, part: Part, one: Wanted) -> int | None:
    """The byte of the tensor from which on it is as `entry` is stored; None where it is not, or `entry` is too small."""
    if entry.nbytes < PART_BYTES or entry.strides is not None or part.taken is not None or part.order is not None:
        return None
    if getattr(torch, entry.dtype, None) != one.dtype:
        return None
    first = 0 if part.into is None else consecutive(one.shape, part.into)
    return None if first is None else first * one.dtype.itemsize


def _piece(entry: TensorEntry, place: int, first: int, last: int, tensor: Tensor) -> Piece:
    size = tensor.element_size()
    run = evolve(entry, shape=((last - first) // size,), offset=entry.offset + first, nbytes=last - first)
    return Piece(run, tensor.view(-1)[(place + first) // size : (place + last) // size])
