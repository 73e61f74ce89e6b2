"""A checkpoint in another format, dtype or number of files. Streams: a few megabytes at a time, whatever the model's size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from modelrig.checkpoint.folder import consistently
from modelrig.checkpoint.saving.protocol import SaveReport, save_checkpoint
from modelrig.components import DTYPE_BITS, Catalog, FormatReader, StoredTensor, TensorEntry
from modelrig.errors import ConfigError, RequestError, quoted
from modelrig.loading.fetch import fetch
from modelrig.loading.into_module import floating
from modelrig.loading.progress import ProgressChoice, progress_bar
from modelrig.loading.transport import TensorFileReader, check_unchanged
from modelrig.planning.identify import CONFIG, catalog, check_reference, read_config, resolve
from modelrig.planning.needs import PLAIN, stored_scheme
from modelrig.registry import Registry, current
from modelrig.saving.companions import companions, dtype_changes
from modelrig.saving.streams import bytes_of_entry


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = "safetensors",  # noqa: A002
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    from_variant: str | None = None,
    progress: ProgressChoice = False,
) -> SaveReport:
    """Write the checkpoint `source` to the folder `target`, which may be the same.

    Args:
        source: a folder, `org/name[@rev]` or a bundled name. No architecture has to know it.
        format: a component that writes.
        dtype: what floating tensors become; None leaves them.
        variant, from_variant: marks of the files that are written and read, such as "fp16".

    Raises:
        CheckpointError: the source is not what it should be.
        RequestError: RQ-NAME, RQ-VALUE. SaveError: see `modelrig.checkpoint.saving.protocol.save_checkpoint`.
    """
    registry = current()
    writer = writing_format(format, registry)
    into = floating(dtype)
    identified, snapshot = resolve(check_reference(source), registry, from_variant)
    planner, found = consistently(snapshot.root, lambda: catalog(snapshot, registry))
    config: dict[str, Any] = {}
    if (snapshot.root / CONFIG).exists():
        config = read_config(snapshot)
        if into is not None and stored_scheme(config, snapshot.root / CONFIG) != PLAIN:
            reason = f"the weights are quantised, and cannot become {dtype} by a cast; convert without a dtype"
            raise ConfigError("CF-REL", reason, path=snapshot.root / CONFIG, locus="quantization_config")
    with progress_bar("fetching", progress if not snapshot.complete else False) as report:
        fetcher = identified.registered.implementation()
        snapshot, found = fetch(snapshot, found, fetcher, planner.registered.planner(), report)
    name = None if into is None else str(into).removeprefix("torch.")
    stored = list(stored_tensors(found, name))
    reading = EntryReader(found, planner.registered.implementation(), into)
    reading.expect(stored)
    metadata = {"format": "pt"} | dict(found.metadata if found.index is None else {})
    try:
        with progress_bar("converting", progress) as report:
            result = save_checkpoint(
                target,
                stored,
                reading,
                writer,
                max_shard_size=max_shard_size,
                variant=variant,
                metadata={key: value for key, value in metadata.items() if isinstance(value, str)},
                files=companions(snapshot, found, dtype_changes(config, name)),
                progress=report,
            )
    finally:
        reading.close()
    return result


def writing_format(name: str, registry: Registry) -> Any:
    """The planner of the format called `name`. Raises `RequestError` (RQ-NAME, RQ-VALUE), `PluginError`."""
    if not isinstance(name, str):
        raise RequestError("RQ-VALUE", f"{quoted(name)}; the name of a format is accepted", locus="format")
    planner = registry.find("formats", name).require_active().planner()
    if not hasattr(planner, "write"):
        able = [one.name for one in registry.components("formats") if one.state == "active" and hasattr(one.planner(), "write")]
        reason = f"the format {name} can be read and not written; {', '.join(able) or 'no format'} can be"
        raise RequestError("RQ-VALUE", reason, locus="format")
    return planner


def stored_tensors(found: Catalog, dtype: str | None) -> Iterator[StoredTensor]:
    """What is written: every tensor once, in the order of the files; further names of one become its aliases."""
    places: dict[tuple[int, int, int], list[TensorEntry]] = {}
    for entry in sorted(found.entries.values(), key=lambda one: (one.file, one.offset)):
        key = (entry.file, entry.offset, entry.nbytes)
        places.setdefault(key if entry.nbytes else (-1, len(places), 0), []).append(entry)
    for first, *others in places.values():
        is_cast = dtype is not None and "float" in first.dtype and DTYPE_BITS[first.dtype] >= 8
        into = dtype if is_cast and dtype is not None else first.dtype
        same = [one for one in others if one.shape == first.shape]
        yield StoredTensor(first.name, into, first.shape, tuple(one.name for one in same))
        for other in others:
            if other not in same:
                yield StoredTensor(other.name, into, other.shape)


class EntryReader:
    """Reads tensors of a catalog for a writer, and after the last one of a file makes sure that the file is still the same.

    `open_file` gives files that somebody holds open already, by their number; else one is open at a time.
    """

    def __init__(
        self,
        found: Catalog,
        reader: FormatReader,
        dtype: torch.dtype | None,
        open_file: Callable[[int], TensorFileReader] | None = None,
    ) -> None:
        self.found, self.reader, self.dtype, self.open_file = found, reader, dtype, open_file
        self._open: tuple[int, TensorFileReader] | None = None
        self._last: dict[int, str] = {}

    def expect(self, tensors: Iterable[StoredTensor]) -> None:
        """These will be asked for, in this order."""
        self._last = {self.found.entries[one.name].file: one.name for one in tensors}

    def __call__(self, tensor: StoredTensor) -> Iterator[memoryview]:
        entry = self.found.entries[tensor.name]
        is_cast = self.dtype is not None and tensor.dtype != entry.dtype
        yield from bytes_of_entry(self._file(entry.file), entry, self.reader, self.dtype if is_cast else None)
        if self._last.get(entry.file) == tensor.name:
            check_unchanged(self.found.files[entry.file])

    def _file(self, number: int) -> TensorFileReader:
        if self.open_file is not None:
            return self.open_file(number)
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = number, TensorFileReader(self.found.files[number])
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
