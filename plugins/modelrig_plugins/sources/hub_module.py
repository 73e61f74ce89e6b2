"""hub, fetching: the tensor files a plan was made for, into the hub's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import evolve

from modelrig.checkpoint.files import open_regular, read_at
from modelrig.components import Snapshot
from modelrig.errors import FileError, SourceError
from modelrig_plugins.sources import hub_remote
from modelrig_plugins.sources.hub import split_reference
from modelrig_plugins.sources.local import blobs_of

DOWNLOADS = 4  # at a time; each may use several connections of its own


class HubFetcher:
    @staticmethod
    def fetch(snapshot: Snapshot, progress: Callable[[int, int], None] | None = None) -> Snapshot:
        """Download the tensor files of exactly the planned commit.

        Args:
            progress: called from several threads, one at a time, with (bytes done, bytes in all).

        Raises:
            SourceError: SR-FETCH; what is there already stays in the cache and is not fetched again.
            FileError: IO-CHANGED when a file is not the one whose header was planned with.
        """
        if snapshot.complete:
            return snapshot
        from huggingface_hub import close_session, hf_hub_download

        parts = split_reference(snapshot.reference)
        if parts is None or snapshot.revision is None:
            raise SourceError("SR-FETCH", f"{snapshot.reference} was not resolved by this source")
        repository, stop = parts[0], threading.Event()
        tally = _Tally({name: size for name, (size, _) in snapshot.headers.items()}, progress)

        def download(name: str) -> None:
            bar = hub_remote.meter(lambda count: tally.add(name, count), stop)
            path = Path(hf_hub_download(repository, name, revision=snapshot.revision, tqdm_class=bar))
            tally.finish(name)
            _require_planned(path, *snapshot.headers[name])

        with hub_remote.explained(repository, snapshot.revision), ThreadPoolExecutor(DOWNLOADS) as pool:
            try:
                for _ in pool.map(download, snapshot.headers):
                    pass
            except BaseException:  # Ctrl-C too
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                close_session()  # ends reads that wait for the network; the next call opens a new one
                raise
        return evolve(snapshot, complete=True, headers={}, link_roots=blobs_of(snapshot.root))


class _Tally:
    """Bytes done of several files, counted from several threads."""

    def __init__(self, sizes: dict[str, int], progress: Callable[[int, int], None] | None) -> None:
        self.sizes, self.done, self.progress = sizes, dict.fromkeys(sizes, 0), progress
        self.lock = threading.Lock()

    def add(self, name: str, count: int) -> None:
        with self.lock:
            self.done[name] = min(self.done[name] + count, self.sizes[name])
            self._report()

    def finish(self, name: str) -> None:
        with self.lock:
            self.done[name] = self.sizes[name]
            self._report()

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(sum(self.done.values()), sum(self.sizes.values()))


def _require_planned(path: Path, size: int, folder: Path) -> None:
    planned = (folder / path.name).read_bytes()
    with open_regular(path) as (descriptor, status):
        if status.st_size != size or read_at(descriptor, len(planned), 0, path) != planned:
            raise FileError("IO-CHANGED", "not the file whose header the plan was made from", path=path, hint="plan again")
