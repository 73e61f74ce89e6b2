"""Bring the tensor files of a planned checkpoint onto the disk, and make sure they are the planned ones."""

from __future__ import annotations

from collections.abc import Callable

from modelrig.components import Catalog, FormatPlanner, Snapshot, SourceFetcher
from modelrig.errors import FileError


def fetch(
    snapshot: Snapshot,
    catalog: Catalog,
    fetcher: SourceFetcher,
    format_planner: FormatPlanner,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Snapshot, Catalog]:
    """(complete snapshot, its catalog). A snapshot that was complete when it was planned is returned as it is.

    Raises:
        FileError: IO-CHANGED when what was fetched holds other tensors than the headers promised.
    """
    if snapshot.complete:
        return snapshot, catalog
    fetched = fetcher.fetch(snapshot, progress)
    found = format_planner.catalog(fetched)
    if dict(found.entries) != dict(catalog.entries):
        raise FileError("IO-CHANGED", "the fetched tensor files are not those the plan was made for", path=fetched.root)
    return fetched, found
