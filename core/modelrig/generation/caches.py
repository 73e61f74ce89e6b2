"""The caches that calls work in: one is kept between calls of `generate`, so that its buffers stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from modelrig.errors import ResourceLimitError
from modelrig.planning.environment import read_environment
from modelrig.planning.ledger import cache_places

if TYPE_CHECKING:
    from modelrig.components import Cache
    from modelrig.modules.slots import Slots
    from modelrig.planning.plan import RigPlan

logger = logging.getLogger(__name__)


def begin(cache: Cache, count: int) -> Slots:
    """`cache.begin(count)` from code that may run in inference mode: what the cache makes there must serve outside of it too."""
    with torch.inference_mode(False):
        return cache.begin(count)


def require_room(plan: RigPlan, batch: int, capacity: int) -> None:
    """Whether there is memory for a cache beyond what was planned: more rows than the batch, or more tokens than the context.

    Raises:
        ResourceLimitError: RL-MEM, with the bytes needed and available.
    """
    if batch <= plan.batch and capacity <= plan.context:
        return
    choice, now = plan.choices["caches"], read_environment()
    planner, layers = choice.registered.planner(), plan.facts.cached_layers
    places = cache_places(planner, choice.options, plan.dtype, plan.device, capacity, batch, layers)
    for place, needed in places.items():
        known = (free for free in (plan.environment.available_bytes(place), now.available_bytes(place)) if free is not None)
        available = min(known, default=needed)
        if needed > available:
            raise ResourceLimitError(
                "RL-MEM",
                f"{batch} rows of {capacity} tokens need a cache of {needed:,} bytes on {place}; {available:,} are available",
                hint=f"the plan was made for a batch of {plan.batch} and a context of {plan.context}: ask for less at a time",
            )
    logger.info(
        "a cache of %d rows of %d tokens is more than the planned %d rows of %d: up to %s bytes",
        *(batch, capacity, plan.batch, plan.context, f"{sum(places.values()):,}"),
    )


class CachePool:
    """Lends caches to calls. Threads may share it: a cache is lent to one call at a time.

    Args:
        create: `create(batch, capacity, padding)`.
    """

    def __init__(self, plan: RigPlan, create: Callable[[int, int, Sequence[int] | None], Cache]) -> None:
        self._plan, self._create = plan, create
        self._idle: list[Cache] = []  # at most one
        self._is_open = True

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that waits for the next call."""
        return sum(cache.nbytes for cache in self._idle)

    def borrow(self, batch: int, needed: int, padding: Sequence[int] | None) -> Cache:
        """An empty cache of `batch` rows and room for `needed` tokens: the idle one if it serves, else a new one, as long as
        planned, or for more rows than planned just long enough.

        Raises:
            ResourceLimitError: RL-MEM when a batch larger than the planned one does not fit into memory.
        """
        if (idle := self._take()) is not None:
            if idle.batch == batch and idle.capacity >= needed:
                idle.reset(padding)
                return idle
            del idle  # its memory goes before the new one's comes
        return self._create(batch, self._plan.context if batch <= self._plan.batch else needed, padding)

    def give_back(self, cache: Cache) -> None:
        if self._is_open:
            self._idle[:] = [cache]

    def close(self) -> None:
        self._is_open = False
        self._idle.clear()

    def _take(self) -> Cache | None:
        try:
            return self._idle.pop()
        except IndexError:  # none, or another thread was faster
            return None

    def require_room_to_fork(self, cache: Cache, rows: int) -> None:
        """Raise `ResourceLimitError` (RL-MEM) if a fork of `cache` into so many rows was not planned and does not fit."""
        planned = self._plan.choices["decoders"].registered.planner()
        copies = getattr(planned, "copies", None)
        if copies is None or rows > self._plan.batch * copies(self._plan.choices["decoders"].options):
            require_room(self._plan, rows, cache.capacity)
