"""Bytes of a cache that has grown to its full length: the same as one allocated at once."""

from __future__ import annotations

from modelrig_plugins.caches.static import StaticPlanner


class DynamicPlanner(StaticPlanner):
    pass
