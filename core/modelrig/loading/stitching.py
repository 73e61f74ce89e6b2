"""A tensor that is put together of stored ones, such as stacked experts: its parts mapped side by side rather than read.

The sizes of real weights are multiples of a page, so parts that follow one another in a file mostly agree on where in a page the
tensor should begin. Pages that two parts share are memory of the tensor's own, into which they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from modelrig.checkpoint.in_place import PAGE, find_stitches, place_in, whole_pages
from modelrig.components import Part, TensorEntry
from modelrig.loading.pieces import Piece
from modelrig.loading.transport import TensorFileReader, allocate_pages, map_over

if TYPE_CHECKING:
    from modelrig.loading.filling import Wanted


def allocate_to_stitch(one: Wanted, entries: Mapping[str, TensorEntry]) -> Tensor | None:
    """Memory for `one` such that `stitch` can map files over most of it; None where that is not possible."""
    if not one.may_view or one.buffer is not None or one.device.type != "cpu":
        return None
    stitches = find_stitches(one.shape, _name(one), one.sources, entries)
    return None if stitches is None else allocate_pages(one.nbytes, stitches.begin).view(one.dtype).view(one.shape)


def stitch(file: TensorFileReader, entry: TensorEntry, part: Part, one: Wanted, tensor: Tensor) -> list[Piece] | None:
    """Map the pages of `entry` over their place in `tensor`, which `allocate_to_stitch` made.

    Returns:
        What remains to be read, at most two pieces of less than a page; None if nothing could be mapped.
    """
    place = place_in(one.shape, _name(one), part, entry)
    data = tensor.view(-1).view(torch.uint8)
    if place is None or (data.data_ptr() + place - entry.offset) % PAGE:
        return None
    start, end = whole_pages(entry)
    if not map_over(data[place + start : place + end], file, entry.offset + start):
        return None
    edges = [(0, start), (end, entry.nbytes)]
    return [_piece(entry, place, first, last, tensor) for first, last in edges if first < last]


def _name(one: Wanted) -> str:
    return str(one.dtype).removeprefix("torch.")


def _piece(entry: TensorEntry, place: int, first: int, last: int, tensor: Tensor) -> Piece:
    size = tensor.element_size()
    run = evolve(entry, shape=((last - first) // size,), offset=entry.offset + first, nbytes=last - first)
    return Piece(run, tensor.view(-1)[(place + first) // size : (place + last) // size])
