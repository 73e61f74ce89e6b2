"""safetensors: which file of a folder to start from, and the catalog of what it and its shards hold."""

from __future__ import annotations

from collections.abc import Collection

from modelrig.checkpoint.catalog import catalog_sharded, catalog_single, file_names
from modelrig.checkpoint.headers import read_header
from modelrig.components import Catalog, Snapshot

NAME = "safetensors"
SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def first_file(names: Collection[str]) -> str | None:
    """Where a folder with these files is read from: `model.safetensors`, else the index, else the only safetensors file.

    The single file goes before the index, as in transformers: a save that got by without shards leaves an older index behind.
    """
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    others = [name for name in names if name.endswith(SUFFIX)]
    return others[0] if len(others) == 1 else None


class SafetensorsPlanner:
    @staticmethod
    def claims(snapshot: Snapshot) -> str | None:
        """The file it would start from, or None."""
        return first_file(file_names(snapshot))

    @staticmethod
    def catalog(snapshot: Snapshot) -> Catalog:
        """Every tensor with its verified byte range. Raises `FileError`, `FormatError` and `IndexFileError`."""
        names = file_names(snapshot)
        first = first_file(names) or SINGLE
        if first == INDEX:
            return catalog_sharded(snapshot, INDEX, format=NAME, suffix=SUFFIX, read_header=read_header)
        others = [name for name in names if name.endswith(SUFFIX) and name != first]
        notes = [f"{first} is used; {name} beside it is not" for name in (INDEX, *others) if name in names]
        return catalog_single(snapshot, first, format=NAME, read_header=read_header, notes=notes)
