"""Fill a module that was built on the meta device.

On CPU a tensor whose dtype stays is a view of the mapped file: nothing is copied, processes share the pages. Any other tensor is
cast in pieces straight into its final storage, so the peak is the model plus one piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn

from modelrig.components import Catalog, FormatReader, LinearMaker, ModelFacts
from modelrig.errors import LoadError, quoted
from modelrig.loading.schedule import schedule
from modelrig.loading.transport import TensorFileReader

if TYPE_CHECKING:
    from modelrig.components import TensorEntry

PIECE = 4 << 20  # elements cast at a time

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@frozen
class LoadReport:
    """What a load did: bytes viewed in place, bytes copied, seconds."""

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
    """schedule → execute → finalise. Whatever interrupts it, nothing of the model is left behind.

    Raises:
        LoadError: LD-DTYPE for a stored dtype that is no weight, LD-META if a parameter got no data.
        FileError: IO-CHANGED if a file is not what was planned, before or after reading.
    """
    started = time.perf_counter()
    reads = schedule(facts, catalog)
    total, done, mapped = sum(read.entry.nbytes for read in reads), 0, 0
    with ExitStack() as stack:
        files: dict[int, TensorFileReader] = {}
        for read in reads:
            file = files.get(read.entry.file)
            if file is None:
                file = files[read.entry.file] = TensorFileReader(catalog.files[read.entry.file])
                stack.callback(file.close)
            stored = reader.decode(file.bytes_of(read.entry), read.entry)
            tensor = _place(stored, dtype, device, read.entry)
            if tensor is stored:
                mapped += read.entry.nbytes
            else:
                file.release(read.entry)
            _assign(module, read.parameter.name, tensor)
            done += read.entry.nbytes
            if progress is not None:
                progress(done, total)
        for file in files.values():
            file.check_unchanged()
        del file, stored, tensor
    finalise(module, facts, linear, device)
    return LoadReport(mapped, done - mapped, time.perf_counter() - started)


def _place(stored: Tensor, dtype: torch.dtype, device: torch.device, entry: TensorEntry) -> Tensor:
    if not stored.is_floating_point():
        raise LoadError("LD-DTYPE", f"is stored as {entry.dtype}, which is no plain weight", locus=quoted(entry.name))
    if stored.dtype == dtype and device.type == "cpu":
        return stored
    target = torch.empty(stored.shape, dtype=dtype, device=device)
    source, destination = stored.reshape(-1), target.view(-1)
    for start in range(0, source.numel(), PIECE):
        destination[start : start + PIECE].copy_(source[start : start + PIECE])
    return target


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def finalise(module: nn.Module, facts: ModelFacts, linear: LinearMaker, device: torch.device) -> None:
    """Ties, buffers, kernels; then check that nothing was forgotten."""
    for alias, original in facts.ties.items():
        owner, _, leaf = alias.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = module.get_parameter(original)
    module.init_buffers(device)  # type: ignore[operator]
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise LoadError("LD-META", f"{len(empty)} got no data: {', '.join(empty[:20])}", missing=empty, locus=empty[0])
    module.bind(linear)  # type: ignore[operator]
    module.eval()
