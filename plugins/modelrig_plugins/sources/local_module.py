"""local, fetching: there is nothing to fetch."""

from __future__ import annotations

from collections.abc import Callable

from modelrig.components import Snapshot


class LocalFetcher:
    @staticmethod
    def fetch(snapshot: Snapshot, progress: Callable[[int, int], None] | None = None) -> Snapshot:  # noqa: ARG004
        return snapshot
