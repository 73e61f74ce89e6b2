"""What becomes of the pages of the disk tier's mapped files: they stay, they are dropped after use, or they are gone around.

With `max_memory` the process itself stays within it, so pages are dropped; without, it is the system's affair, which takes pages of
files back when somebody needs the memory (and what it took comes again at its next use, not ahead of it). But where the files are
larger than memory, each would be taken back just before its next use, so only as many as there is room for are paged at all, and
the rest is read around the page cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from modelrig.planning.environment import read_memory

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
        return _nbytes(wanted) <= self._free_bytes()

    def paged(self, units: Sequence[Unit], *, has_room: bool) -> list[Unit]:
        """The units with what becomes of their pages. `has_room`: what is free, `max_memory` or not, can hold the whole model."""
        if has_room:
            return [evolve(unit, paging=Paging.DROPPED if self.is_limited else Paging.KEPT) for unit in units]
        # Of what is looked up by rows few pages are touched, and they are not read into slots.
        sizes = [_nbytes(one for one in unit.wanted if one.name not in unit.gathered) for unit in units]
        kept = set() if self.is_limited else _spaced(sizes, self._free_bytes())
        return [evolve(unit, paging=Paging.KEPT if number in kept else Paging.AROUND) for number, unit in enumerate(units)]

    def _free_bytes(self) -> int:
        return read_memory(Path("/")).available_bytes - self.reserved_bytes


UNLIMITED = MainMemory()


def _spaced(sizes: Sequence[int], free: int) -> set[int]:
    """Numbers of units that fit beside the slots of the others: about as many as can, in about equal distances."""
    room = (free - SLOTS * max(sizes, default=0)) * CAUTION
    fitting = [number for number, size in enumerate(sizes) if size <= room]
    share = min(1.0, room / max(1, sum(sizes[number] for number in fitting)))
    kept, passed = set(), 0.0
    for number in fitting:  # whenever the share of what was passed has room for it
        passed += sizes[number] * share
        if sizes[number] <= passed:
            passed -= sizes[number]
            kept.add(number)
    return kept


def _nbytes(wanted: Iterable[Wanted]) -> int:
    return sum(one.nbytes for one in wanted)
