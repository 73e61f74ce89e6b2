"""A progress bar in bytes on stderr, only where someone can see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
ProgressChoice = bool | Progress


@contextmanager
def progress_bar(label: str, wanted: ProgressChoice = True) -> Iterator[Progress | None]:
    """A callback that draws a bar while the block runs; None when stderr is no terminal, or none is wanted.

    A function is what the caller wants called instead.
    """
    if not isinstance(wanted, bool):
        yield wanted
        return
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
