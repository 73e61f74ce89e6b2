"""What is read at a time: pieces of a stored tensor, each with the view of the final tensor that it fills.

A part only moves elements, so its place in the final tensor is a view of it (sliced, split into finer dimensions, permuted) with
the same elements in the same order as in the file. Cutting both along their leading dimension gives pieces of bounded size that
are cast and copied straight to where they belong: nothing is put together in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from attrs import evolve, frozen
from torch import Tensor

from modelrig.checkpoint.in_place import elements, is_whole
from modelrig.checkpoint.mapping import extent
from modelrig.components import DTYPE_BITS, Part, Region, TensorEntry

PIECE_BYTES = 1 << 20  # larger ones leave the processor's cache on the way


@frozen(eq=False)
class Piece:
    """The bytes of `entry`, a run of elements of one file, that fill `into`.

    Of the run, viewed in the shape `rows`, only `cut` is wanted; without a `cut` it is all wanted, in the shape of `into`.
    """

    entry: TensorEntry
    into: Tensor
    rows: tuple[int, ...] | None = None
    cut: tuple[slice, ...] | None = None

    def shaped(self, decoded: Tensor) -> Tensor:
        """The decoded run as `into` takes it."""
        if self.cut is not None:
            assert self.rows is not None
            return decoded.view(self.rows)[self.cut].reshape(self.into.shape)
        return decoded if decoded.shape == self.into.shape else decoded.reshape(self.into.shape)


def destination(tensor: Tensor, part: Part) -> Tensor:
    """The view of `tensor` that takes the elements of `part` in the order in which they are stored."""
    view = tensor if part.into is None else tensor[tuple(slice(start, stop) for start, stop in part.into)]
    taken = part.shape if part.taken is None else extent(part.taken)
    axes = part.axes or taken
    order = part.order or tuple(range(len(axes)))
    view = view.view([axes[place] for place in order])  # finer than the region, never coarser: always a view
    return view.permute([order.index(place) for place in range(len(axes))])


def pieces(entry: TensorEntry, part: Part, tensor: Tensor) -> Iterator[Piece]:
    """The pieces of stored tensor `entry` that fill `part` of `tensor`."""
    if 0 < entry.nbytes <= PIECE_BYTES and entry.strides is None and is_whole(part):  # most are small and as they are
        yield Piece(entry, tensor)
        return
    into = destination(tensor, part)
    if into.numel() == 0:
        return
    taken = part.taken or tuple((0, size) for size in entry.shape)
    if entry.strides is None:
        yield from _pieces(entry, taken, into)
    elif part.axes is None and into.shape == extent(taken):  # the dimensions in the order in which they are stored
        order = sorted(range(len(entry.shape)), key=lambda dim: entry.strides[dim], reverse=True)  # type: ignore[index]
        stored = evolve(entry, shape=tuple(entry.shape[dim] for dim in order), strides=None)
        yield from _pieces(stored, tuple(taken[dim] for dim in order), into.permute(order))
    else:  # rearranged and cut or split at once: only the whole can be told apart
        cut = None if part.taken is None else tuple(slice(start, stop) for start, stop in part.taken)
        yield Piece(entry, into, entry.shape, cut)


def _pieces(entry: TensorEntry, taken: Region, into: Tensor) -> Iterator[Piece]:
    """Those of a tensor stored in C's order, of which `taken` fills `into`. Dimensions of `into` are those of `taken` or finer."""
    while taken and taken[0][1] - taken[0][0] != 1 and into.shape[0] == 1:
        into = into[0]  # a dimension that the stored tensor has not
    if taken and taken[0][1] - taken[0][0] == 1 and (into.dim() == 0 or into.shape[0] != 1):
        into = into[None]  # one that `into` has not
    is_run = all(pair == (0, size) for pair, size in zip(taken[1:], entry.shape[1:], strict=True))
    if is_run and into.is_contiguous():
        first = taken[0][0] * prod(entry.shape[1:]) if taken else 0
        yield from _runs(entry, first, into.view(-1))
    else:
        yield from _rows(entry, taken, is_run, into)


def _runs(entry: TensorEntry, first: int, into: Tensor) -> Iterator[Piece]:
    """Consecutive elements to consecutive places."""
    bits = DTYPE_BITS[entry.dtype]
    count = max(8, PIECE_BYTES // bits * 8)  # a multiple of 8: whole bytes of any dtype
    if into.numel() <= count:
        yield Piece(elements(entry, first, into.numel(), bits), into)
        return
    for start in range(0, into.numel(), count):
        end = min(start + count, into.numel())
        yield Piece(elements(entry, first + start, end - start, bits), into[start:end])


def _rows(entry: TensorEntry, taken: Region, is_run: bool, into: Tensor) -> Iterator[Piece]:
    """Whole rows of the stored tensor at a time, of which what is wanted is cut out; rows that are too large in turn in pieces."""
    bits, row = DTYPE_BITS[entry.dtype], prod(entry.shape[1:])
    begin, end = taken[0]
    # `into` may have several dimensions where the stored tensor has one: so many rows belong together
    together = (end - begin) // into.shape[0]
    if bits * row * together > PIECE_BYTES * 8 and bits * row % 8 == 0 and len(taken) + into.dim() > 2:
        for place, part in enumerate(into):
            first = begin + place * together
            if together > 1:
                yield from _pieces(entry, ((first, first + together), *taken[1:]), part)
            else:
                one = evolve(elements(entry, first * row, row, bits), shape=entry.shape[1:])
                yield from _pieces(one, taken[1:], part)
        return
    count = max(1, PIECE_BYTES * 8 // (bits * row * together)) if row else into.shape[0]
    inner = tuple(slice(start, stop) for start, stop in taken[1:])
    for start in range(0, into.shape[0], count):
        part = into[start : start + count]
        rows = part.shape[0] * together
        run = elements(entry, (begin + start * together) * row, rows * row, bits)
        yield Piece(run, part) if is_run else Piece(run, part, (rows, *entry.shape[1:]), (slice(None), *inner))
