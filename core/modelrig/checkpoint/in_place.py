"""What of a tensor can be shown as it lies in its files: a run of bytes, or several put side by side page by page.

Planning counts by it what takes no memory of its own, and loading maps it.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from attrs import evolve, frozen

from modelrig.components import DTYPE_BITS, Part, Region, TensorEntry

PART_BYTES = 1 << 20  # a smaller part is not mapped beside others: a process may have only so many mappings
PAGE = mmap.PAGESIZE


def is_whole(part: Part) -> bool:
    """Whether the part is the stored tensor as it is, and all of the final one."""
    return part.taken is None and part.axes is None and part.order is None and part.into is None


def consecutive(shape: tuple[int, ...], region: Region) -> int | None:
    """The first element of a region whose elements lie one after the other in a tensor of this shape; None where they do not."""
    first, stride, is_cut = 0, 1, False
    for size, (start, stop) in zip(reversed(shape), reversed(region), strict=True):
        if is_cut and stop - start != 1:
            return None
        is_cut |= stop - start != size
        first += start * stride
        stride *= size
    return first


def run_of(entry: TensorEntry, part: Part, shape: tuple[int, ...]) -> TensorEntry | None:
    """The bytes of `entry` that are, as they are stored, all of a tensor of this shape; None where there is no such run."""
    if is_whole(part):
        return entry
    if part.order is not None or (part.into is not None and part.into != tuple((0, size) for size in shape)):
        return None
    first = 0 if part.taken is None else consecutive(entry.shape, part.taken)
    return None if first is None else evolve(elements(entry, first, prod(shape), DTYPE_BITS[entry.dtype]), shape=shape)


def elements(entry: TensorEntry, first: int, count: int, bits: int) -> TensorEntry:
    """Consecutive elements of `entry`, as one dimension."""
    return evolve(entry, shape=(count,), offset=entry.offset + first * bits // 8, nbytes=(count * bits + 7) // 8)


@frozen
class Stitches:
    """How a tensor of several parts is mapped: it begins at byte `begin` of a page, and `nbytes` of it are whole pages of files."""

    begin: int
    nbytes: int


def find_stitches(shape: tuple[int, ...], dtype: str, parts: Sequence[Part], entries: Mapping[str, TensorEntry]) -> Stitches | None:
    """Where the tensor begins such that most of it can be mapped; None where that is less than half of it.

    A mapping consists of whole pages, so it serves parts that begin at the same place of a page in their files and in the tensor.
    """
    if len(parts) < 2 or dtype == "bool":
        return None
    size = DTYPE_BITS[dtype] // 8
    found = [(entries[part.name], place_in(shape, dtype, part, entries[part.name])) for part in parts]
    begins: Counter[int] = Counter()
    for entry, place in found:
        if place is not None:
            begins[(entry.offset - place) % PAGE] += entry.nbytes
    [(begin, count)] = begins.most_common(1) or [(0, 0)]
    if not count or count * 2 < prod(shape) * size or begin % size:
        return None
    served = (entry for entry, place in found if place is not None and (entry.offset - place) % PAGE == begin)
    return Stitches(begin, sum(max(0, stop - start) for start, stop in map(whole_pages, served)))


def whole_pages(entry: TensorEntry) -> tuple[int, int]:
    """The bytes of `entry` that are whole pages of its file."""
    return -entry.offset % PAGE, (entry.offset + entry.nbytes) // PAGE * PAGE - entry.offset


def place_in(shape: tuple[int, ...], dtype: str, part: Part, entry: TensorEntry) -> int | None:
    """The byte of a tensor from which on it is as `entry` is stored; None where it is not, or `entry` is too small."""
    if entry.nbytes < PART_BYTES or entry.strides is not None or part.taken is not None or part.order is not None:
        return None
    if entry.dtype != dtype:
        return None
    first = 0 if part.into is None else consecutive(shape, part.into)
    return None if first is None else first * DTYPE_BITS[dtype] // 8
