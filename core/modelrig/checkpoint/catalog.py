"""From a snapshot to its catalog: every tensor with a verified byte range. Formats bring their file names and header reader."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from modelrig.checkpoint.collector import collector_paused
from modelrig.checkpoint.headers import Header
from modelrig.checkpoint.index import ShardIndex, read_index
from modelrig.checkpoint.paths import inside, is_pending
from modelrig.components import Catalog, Snapshot, TensorEntry, TensorFile
from modelrig.errors import FileError, IndexFileError, quoted

#: how files end that may hold tensors, in any format: for saying what is there, not for choosing how to read it
TENSOR_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".npy", ".onnx", ".pkl", ".distcp",
)  # fmt: skip
_SERIES = re.compile(r"-\d{5}-of-(\d{5})")
_NAMED = 5  # how many of many names a message shows


class HeaderReader(Protocol):
    """Reads and verifies the header of one tensor file; `size` is the true size where only its beginning is here."""

    def __call__(self, path: Path, *, size: int | None, file: int) -> Header: ...


def file_names(snapshot: Snapshot) -> list[str]:
    """Names of the files of the snapshot's folder, sorted, with those that are not fetched yet. Folders are left out."""
    try:
        with os.scandir(snapshot.root) as found:
            names = {entry.name for entry in found if not _is_folder(entry) and not (entry.is_symlink() and is_pending(entry.path))}
    except OSError as error:
        raise FileError("IO-READ", f"the folder cannot be read: {error.strerror}", path=snapshot.root) from error
    return sorted(names | set(snapshot.headers))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed: opening it will say so
        return False


def list_tensor_files(snapshot: Snapshot) -> tuple[str, ...]:
    """Files of the folder that look as if they held tensors, in whatever format: what an error can say is there."""
    return tuple(name for name in file_names(snapshot) if name.lower().endswith(TENSOR_SUFFIXES))


def catalog_single(snapshot: Snapshot, name: str, *, format: str, read_header: HeaderReader, notes: Iterable[str] = ()) -> Catalog:  # noqa: A002
    """The catalog of a checkpoint that is the one tensor file `name`."""
    with collector_paused():
        file, header = _read(snapshot, name, 0, read_header)
    return Catalog(format=format, files=(file,), entries=header.entries, metadata=header.metadata, notes=tuple(notes))


def catalog_sharded(
    snapshot: Snapshot,
    index_name: str,
    *,
    format: str,  # noqa: A002
    suffix: str,
    read_header: HeaderReader,
    notes: Iterable[str] = (),
) -> Catalog:
    """The catalog of a checkpoint whose index file is `index_name` and whose shards' names end in `suffix`.

    Index and headers must agree: a tensor the index names is in the shard it names, and in no other. Tensors the index does
    not name are noted and never used, like shards it does not name.

    Raises:
        IndexFileError: IX-MISSING with all missing shards, IX-NOTENSOR, IX-DUP, and what `read_index` raises.
        FileError, FormatError: what `read_header` raises; IO-PATH for a shard that is a link out of the folder.
    """
    with collector_paused():
        index = read_index(inside(snapshot, index_name), suffix=suffix)
        _require_shards(snapshot, index)
        files: list[TensorFile] = []
        entries: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {key: value for key, value in index.metadata.items() if isinstance(value, str)}
        for number, shard in enumerate(index.shards):
            file, header = _read(snapshot, shard, number, read_header)
            if twice := entries.keys() & header.entries.keys():
                name = min(twice)
                reason = f"is in {files[entries[name].file].name} and in {shard}"
                raise IndexFileError("IX-DUP", reason, path=index.path, locus=name)
            files.append(file)
            entries.update(header.entries)
            metadata = {**header.metadata, **metadata}
        unused = _agree(index, entries, files)
    return Catalog(
        format=format,
        files=tuple(files),
        entries=entries,
        index=index_name,
        metadata=metadata,
        notes=(*notes, *_report(snapshot, index, entries, unused, suffix)),
    )


def _read(snapshot: Snapshot, name: str, number: int, read_header: HeaderReader) -> tuple[TensorFile, Header]:
    path = inside(snapshot, name)
    if name not in snapshot.headers:
        header = read_header(path, size=None, file=number)
        return TensorFile(name, path, header.size, header.identity), header
    size, folder = snapshot.headers[name]
    header = read_header(folder / name, size=size, file=number)
    return TensorFile(name, path, header.size, None), header


def _require_shards(snapshot: Snapshot, index: ShardIndex) -> None:
    missing = [shard for shard in index.shards if shard not in snapshot.headers and not inside(snapshot, shard).exists()]
    if missing:
        listed = ", ".join(f"{shard} ({index.shards[shard]:,} tensors)" for shard in missing[:100])
        more = f" and {len(missing) - 100:,} more" if len(missing) > 100 else ""
        counted = f"{len(missing):,} of {len(index.shards):,} shards"
        hint = "an interrupted download or copy? fetch them again"
        raise IndexFileError(
            "IX-MISSING", f"{counted} do not exist: {listed}{more}", path=index.path, locus="weight_map", hint=hint
        )


def _agree(index: ShardIndex, entries: dict[str, TensorEntry], files: list[TensorFile]) -> list[str]:
    """Raise unless every tensor of the index is where the index says. Removes the tensors it does not name, and returns them."""
    for name, shard in index.weight_map.items():
        entry = entries.get(name)
        if entry is None or files[entry.file].name != shard:
            found = "no shard has it" if entry is None else f"{files[entry.file].name} has it"
            raise IndexFileError(
                "IX-NOTENSOR", f"is not in {shard}, where the index places it; {found}", path=index.path, locus=name
            )
    if len(entries) == len(index.weight_map):
        return []
    unused = [name for name in entries if name not in index.weight_map]
    for name in unused:
        del entries[name]
    return unused


def _report(
    snapshot: Snapshot, index: ShardIndex, entries: Mapping[str, TensorEntry], unused: list[str], suffix: str
) -> Iterator[str]:
    if unused:
        yield f"not in the index and not used: {_some(unused)}"
    if stale := [name for name in file_names(snapshot) if name.endswith(suffix) and name not in index.shards]:
        yield f"files the index does not name, not read: {_some(stale)}"
    series = {found[1] for shard in index.shards if (found := _SERIES.search(shard))}
    if len(series) > 1:
        yield f"shards of different series ({', '.join(f'of-{end}' for end in sorted(series))}): a save that was interrupted?"
    total = sum({(entry.file, entry.offset): entry.nbytes for entry in entries.values() if entry.nbytes}.values())  # ties once
    if (claimed := index.metadata.get("total_size", total)) != total:
        yield f"the index says total_size {quoted(claimed)}, its tensors have {total} bytes"


def _some(names: Collection[str]) -> str:
    shown = ", ".join(quoted(name) for name in list(names)[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED:,} more"
