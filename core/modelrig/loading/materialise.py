"""Fill a module that was built on the meta device.

On CPU a tensor whose dtype stays is a view of the mapped file: nothing is copied, processes share the pages. Any other tensor is
cast in pieces straight into its final storage, so the peak is the model plus one piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from modelrig.components import DTYPE_BITS, Catalog, FormatReader, LinearMaker, ModelFacts, TensorEntry
from modelrig.errors import LoadError, PluginError
from modelrig.loading.schedule import schedule
from modelrig.loading.transport import TensorFileReader, check_unchanged

if TYPE_CHECKING:
    from modelrig.components import TensorFile

PIECE_BYTES = 4 << 20  # read and cast at a time; larger ones leave the processor's cache

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@frozen
class LoadReport:
    """What a load did, in bytes of the files: viewed in place, and copied into memory of their own; seconds."""

    mapped_bytes: int
    copied_bytes: int
    seconds: float


def materialise(
    module: nn.Module,
    facts: ModelFacts,
    catalog: Catalog,
    reader: FormatReader,
    linear: LinearMaker,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> LoadReport:
    """schedule → execute → finalise.

    Raises:
        LoadError: LD-DTYPE for a stored dtype that is no weight, LD-META if a parameter got no data.
        FileError: IO-CHANGED if a file is not what was planned, before or after reading.
        PluginError: PL-CONTRACT if the module has not the parameters that the plan's facts say.
    """
    started = time.perf_counter()
    reads = schedule(facts, catalog)
    total, done, mapped = sum(read.entry.nbytes for read in reads), 0, 0
    for number, group in groupby(reads, key=lambda read: read.entry.file):
        with TensorFileReader(catalog.files[number]) as file:
            place = _Placer(file, reader, dtype, device)
            for read in group:
                tensor, is_view = place(read.entry)
                _assign(module, read.parameter.name, tensor, facts.architecture)
                done += read.entry.nbytes
                mapped += read.entry.nbytes * is_view
                if progress is not None:
                    progress(done, total)
    for number in dict.fromkeys(read.entry.file for read in reads):
        check_unchanged(catalog.files[number])
    finalise(module, facts, linear, device)
    return LoadReport(mapped, done - mapped, time.perf_counter() - started)


class _Placer:
    """Brings tensors of one file to their final dtype and device."""

    def __init__(self, file: TensorFileReader, reader: FormatReader, dtype: torch.dtype, device: torch.device) -> None:
        self.file, self.reader, self.dtype, self.device = file, reader, dtype, device
        self.staging = torch.empty(PIECE_BYTES, dtype=torch.uint8)

    def __call__(self, entry: TensorEntry) -> tuple[Tensor, bool]:
        """(the tensor, whether it is a view of the file)."""
        stored = _floating_dtype(entry, self.file.file)
        if stored != self.dtype or self.device.type != "cpu":
            return self._converted(entry, stored), False
        # A mapped tensor must begin at a multiple of its item size, which the format does not promise.
        data = self.file.view(entry) if entry.offset % stored.itemsize == 0 else None
        if data is None:
            data = self.file.read(entry.offset, torch.empty(entry.nbytes, dtype=torch.uint8))
            return self.reader.decode(data, entry), False
        tensor = self.reader.decode(data, entry)
        return tensor, tensor.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()

    def _converted(self, entry: TensorEntry, stored: torch.dtype) -> Tensor:
        target = torch.empty(entry.shape, dtype=self.dtype, device=self.device)
        flat, count = target.view(-1), PIECE_BYTES // stored.itemsize
        for start in range(0, flat.numel(), count):
            end = min(start + count, flat.numel())
            first, size = entry.offset + start * stored.itemsize, (end - start) * stored.itemsize
            data = self.file.read(first, self.staging[:size])
            part = evolve(entry, shape=(end - start,), offset=first, nbytes=size)
            flat[start:end].copy_(self.reader.decode(data, part))
        return target


def _floating_dtype(entry: TensorEntry, file: TensorFile) -> torch.dtype:
    dtype: torch.dtype | None = getattr(torch, entry.dtype, None)
    if dtype is None or not dtype.is_floating_point or DTYPE_BITS[entry.dtype] < 8:
        reason = f"is stored as {entry.dtype}, which is no plain weight; only a quantizer could read it"
        raise LoadError("LD-DTYPE", reason, path=file.path, locus=entry.name)
    return dtype


def _assign(module: nn.Module, name: str, tensor: Tensor, architecture: str) -> None:
    owner, leaf = _slot(module, name, architecture)
    shape = owner._parameters[leaf].shape  # type: ignore[union-attr]
    if shape != tensor.shape:
        text = f"{architecture} builds {name} as {list(shape)}, its plan says {list(tensor.shape)}"
        raise PluginError("PL-CONTRACT", text, plugin=architecture, locus=name)
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _slot(module: nn.Module, name: str, architecture: str) -> tuple[nn.Module, str]:
    """The submodule that holds parameter `name`, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is None or owner._parameters.get(leaf) is None:
        text = f"{architecture} builds a module without the parameter {name} of its plan"
        raise PluginError("PL-CONTRACT", text, plugin=architecture, locus=name)
    return owner, leaf


def finalise(module: nn.Module, facts: ModelFacts, linear: LinearMaker, device: torch.device) -> None:
    """Ties, buffers, kernels; then check that nothing was forgotten."""
    for alias, original in facts.ties.items():
        source, source_leaf = _slot(module, original, facts.architecture)
        owner, leaf = _slot(module, alias, facts.architecture)
        owner._parameters[leaf] = source._parameters[source_leaf]
    module.init_buffers(device)  # type: ignore[operator]
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise LoadError("LD-META", f"{len(empty)} got no data: {', '.join(empty[:20])}", missing=empty, locus=empty[0])
    module.bind(linear)  # type: ignore[operator]
    module.eval()
