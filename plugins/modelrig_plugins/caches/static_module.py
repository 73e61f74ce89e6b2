"""Buffers of the full length, allocated once."""

from __future__ import annotations

from modelrig.modules.cache import ContiguousCache


class StaticCache(ContiguousCache):
    """A `ContiguousCache` as it is: its buffers have the whole capacity and never move."""
