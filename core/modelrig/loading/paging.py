"""What becomes of the pages of the disk tier's mapped files: they stay, they are dropped after use, or they are gone around.

With `max_memory` the process itself stays within it, so pages are dropped; without, it is the system's affair, which takes pages of
files back when somebody needs the memory. But where the files are larger than memory, each would be taken back just before its
next use, so only as many as there is room for are paged at all, and the rest is read around the page cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from modelrig.planning.environment import read_environment

if TYPE_CHECKING:
    from modelrig.loading.filling import Wanted
    from modelrig.loading.offload import Unit

SLOTS = 2  # one computes, one is filled
CAUTION = 0.95  # of what is free: with a little more than that, every page would be taken back before its next use


class Paging(Enum):
    """Of a unit that can be viewed in its mapped file."""

    KEPT = "kept"
    DROPPED = "dropped"
    AROUND = "around"  # not viewed: read into a slot


@frozen(kw_only=True)
class MainMemory:
    """What the disk tier may use of main memory.

    Attributes:
        is_limited: there is a `max_memory` for it.
        reserved_bytes: what will be taken besides weights, by the cache and activations.
    """

    is_limited: bool = False
    reserved_bytes: int = 0

    def can_cache(self, wanted: Iterable[Wanted]) -> bool:
        """Whether it holds all of these, and so the files of those that are on disk."""
        free = self._free_bytes()
        return free is None or _nbytes(wanted) <= free

    def paged(self, units: Sequence[Unit], *, has_room: bool) -> list[Unit]:
        """The units with what becomes of their pages. `has_room`: it can hold the whole model."""
        if has_room:
            return [evolve(unit, paging=Paging.DROPPED if self.is_limited else Paging.KEPT) for unit in units]
        sizes = [_nbytes(unit.wanted) for unit in units]
        kept = set() if self.is_limited else _spaced(sizes, self._free_bytes() or 0)
        return [evolve(unit, paging=Paging.KEPT if number in kept else Paging.AROUND) for number, unit in enumerate(units)]

    def _free_bytes(self) -> int | None:
        available = read_environment().available_bytes("cpu")
        return None if available is None else available - self.reserved_bytes


UNLIMITED = MainMemory()


def _spaced(sizes: Sequence[int], free: int) -> set[int]:
    """Numbers of as many, in equal distances, as fit beside the slots of the others."""
    room = (free - SLOTS * max(sizes, default=0)) * CAUTION
    for count in range(len(sizes), 0, -1):
        chosen = {number * len(sizes) // count for number in range(count)}
        if sum(sizes[number] for number in chosen) <= room:
            return chosen
    return set()


def _nbytes(wanted: Iterable[Wanted]) -> int:
    return sum(prod(one.shape) * one.dtype.itemsize for one in wanted)
