"""The files of a save, streamed into a folder that nobody reads yet."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import field, frozen
from typing_extensions import Buffer

from modelrig.checkpoint.layout import FileNames
from modelrig.checkpoint.saving.manifest import Manifest, SavedFile
from modelrig.checkpoint.saving.names import MANIFEST, Ownership, tensor_file_variant
from modelrig.checkpoint.saving.shards import Layout, lay_out
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.components import FormatPlanner, StoredTensor
from modelrig.errors import SaveError

Read = Callable[[StoredTensor], Iterable[Buffer]]

_READ_SIZE = 4 << 20
_WORTH_A_THREAD = 1 << 20  # bytes: hashing beside writing pays from here on
_SMALL = 1 << 16  # bytes: smaller parts are written together
_SYNCED = 32 << 20  # bytes: the disk writes while what follows is made, and not only when the system has no more room


@frozen(kw_only=True)
class Job:
    """What is to be saved, checked: names fit together, sizes are known, nothing is written yet."""

    id: str
    tensors: Sequence[StoredTensor]
    read: Read
    format: FormatPlanner
    names: FileNames
    formats: Sequence[FileNames]  # all whose files a save replaces
    limit: int  # bytes of tensors in one file
    variant: str | None
    metadata: Mapping[str, str]
    files: Mapping[str, bytes | Path]
    progress: Callable[[int, int], None] | None
    durable: bool
    tool: str
    _layouts: list[Layout] = field(factory=list)
    _sizes: list[int] = field(factory=list)

    @property
    def with_aliases(self) -> bool:
        return bool(getattr(self.format, "stores_aliases", False))

    @property
    def ties(self) -> dict[str, str]:
        return {alias: tensor.name for tensor in self.tensors for alias in tensor.aliases}

    def layout(self, mark: str | None = None) -> Layout:
        if mark is not None:
            return self._lay_out(mark)
        if not self._layouts:
            self._layouts.append(self._lay_out(None))
        return self._layouts[0]

    def _lay_out(self, mark: str | None) -> Layout:
        return lay_out(self.tensors, self.limit, self.names, variant=self.variant, mark=mark, with_aliases=self.with_aliases)

    def sizes(self) -> list[int]:
        """Bytes of each tensor file. Raises what the format raises for tensors it cannot hold."""
        if not self._sizes:
            self._sizes.extend(self.format.size(shard.tensors, self.metadata) for shard in self.layout().shards)
        return self._sizes

    def names_written(self) -> frozenset[str]:
        """Of all files, the manifest among them."""
        layout = self.layout()
        return frozenset({*(shard.name for shard in layout.shards), layout.entry, *self.files, MANIFEST})

    def ownership(self, manifests: Iterable[Manifest]) -> Ownership:
        """What this save replaces of a folder in which the saves that wrote these manifests were made."""
        return Ownership(self.formats, frozenset({self.variant or ""}), listed_in(manifests))

    def bytes_needed(self) -> int:
        """What a save adds to the disk until the old files are removed."""
        layout, total = self.layout(), sum(self.sizes())
        total += sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in self.files.values())
        return total + (len(layout.index[1]) if layout.index else 0)


def listed_in(manifests: Iterable[Manifest]) -> frozenset[tuple[str, int]]:
    """(name, bytes) of every file that one of them lists."""
    return frozenset((file.name, file.bytes) for one in manifests for file in one.files.values())


@frozen
class Written:
    """What was written into a folder, the manifest not counted."""

    layout: Layout
    files: tuple[SavedFile, ...]

    @property
    def names(self) -> frozenset[str]:
        """Of all files that are replaced, the manifest among them."""
        return frozenset({*(file.name for file in self.files), MANIFEST})


def write_files(vfs: Vfs, job: Job, folder: Path, replaced: Path | None, mark: str | None = None) -> Written:
    """All files but the manifest. A file of a name that `replaced` has gets the mode it has there."""
    layout, files, done = job.layout(mark), [], 0
    total = sum(tensor.nbytes for tensor in job.tensors)

    def read(tensor: StoredTensor) -> Iterable[Buffer]:
        nonlocal done
        for part in job.read(tensor):
            yield part
            done += memoryview(part).nbytes
            if job.progress:
                job.progress(done, total)

    with ThreadPoolExecutor(1, "modelrig-sha256") as pool:
        for shard, size in zip(layout.shards, job.sizes(), strict=True):
            with _Output(vfs, folder / shard.name, _mode(vfs, replaced, shard.name), job.durable, pool, size) as output:
                job.format.write(shard.tensors, job.metadata, read, output.write)
            files.append(output.saved)
        small = {**job.files, **({layout.index[0]: layout.index[1]} if layout.index else {})}
        for name, data in small.items():
            with _Output(vfs, folder / name, _mode(vfs, replaced, name), job.durable, pool) as output:
                if isinstance(data, bytes):
                    output.write(data)
                else:
                    _copy(vfs, data, output)
            files.append(output.saved)
    return Written(layout, tuple(files))


def write_manifest(vfs: Vfs, job: Job, folder: Path, written: Written, old: Manifest | None, replaced: Path | None) -> SavedFile:
    """The manifest of what was written. It goes on listing the tensor files of other variants, which stay in the folder."""
    kept = {}
    for name, file in (old.files if old else {}).items():
        if tensor_file_variant(name, job.formats) not in (None, job.variant or "") and replaced is not None:
            status = vfs.status(replaced / name)
            if status is not None and status.st_size == file.bytes:
                kept[name] = file
    files = {**kept, **{file.name: file for file in written.files}}
    manifest = Manifest(save_id=job.id, tool=job.tool, files=files, ties=job.ties)
    with _Output(vfs, folder / MANIFEST, _mode(vfs, replaced, MANIFEST), job.durable, None) as output:
        output.write(manifest.encode())
    return output.saved


def _mode(vfs: Vfs, folder: Path | None, name: str) -> int | None:
    status = None if folder is None else vfs.status(folder / name)
    return stat.S_IMODE(status.st_mode) if status is not None and stat.S_ISREG(status.st_mode) else None


def _copy(vfs: Vfs, source: Path, output: _Output) -> None:
    descriptor = vfs.open(source, os.O_RDONLY)
    try:
        while part := vfs.read(descriptor, _READ_SIZE, source):
            output.write(part)
    finally:
        vfs.close(descriptor, source)


class _Output:
    """A new file: hashed while it is written, and on the disk when the block ends well."""

    saved: SavedFile

    def __init__(
        self,
        vfs: Vfs,
        path: Path,
        mode: int | None,
        durable: bool,
        pool: ThreadPoolExecutor | None,
        size: int | None = None,
    ) -> None:
        self._vfs, self._path, self._mode, self._durable, self._pool, self._size = vfs, path, mode, durable, pool, size
        self._digest, self._count, self._small = hashlib.sha256(), 0, bytearray()
        self._written = self._begun = 0  # bytes that are in the file, and that are on their way to the disk

    def __enter__(self) -> _Output:
        self._descriptor = self._vfs.create(self._path)
        try:
            if self._size:
                self._vfs.reserve(self._descriptor, self._size, self._path)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, data: Buffer) -> None:
        """Append."""
        view = memoryview(data)
        if view.nbytes == 0:  # one with a zero in its shape cannot even be cast
            return
        view = view.cast("B")
        self._count += view.nbytes
        if view.nbytes < _SMALL:
            self._small += view
            if len(self._small) >= _WORTH_A_THREAD:
                self._flush()
            return
        self._flush()
        self._append(view)

    def _flush(self) -> None:
        if self._small:
            small, self._small = self._small, bytearray()
            self._append(memoryview(small))

    def _append(self, view: memoryview) -> None:
        if self._pool is None or view.nbytes < _WORTH_A_THREAD:
            self._digest.update(view)
            self._vfs.write(self._descriptor, view, self._path)
        else:
            hashed = self._pool.submit(self._digest.update, view)
            try:
                self._vfs.write(self._descriptor, view, self._path)
            finally:
                hashed.result()  # the bytes are only lent until we return
        self._written += view.nbytes
        if self._durable and self._written - self._begun >= _SYNCED:
            self._vfs.begin_sync(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._flush()
            if self._size is not None and self._count != self._size:
                reason = f"the format said {self._size:,} bytes and wrote {self._count:,}"
                raise SaveError("SV-READ", reason, path=self._path)
            if self._mode is not None:
                self._vfs.set_mode(self._path, self._mode)
            if self._durable:
                self._vfs.fsync(self._descriptor, self._path)
        except BaseException:
            self._abandon()
            raise
        self._vfs.close(self._descriptor, self._path)
        self.saved = SavedFile(self._path.name, self._count, self._digest.hexdigest())

    def _abandon(self) -> None:
        with contextlib.suppress(OperationError):
            self._vfs.close(self._descriptor, self._path)
