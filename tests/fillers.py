"""Tensors in a file of raw bytes, with a catalog of them, for tests that read without a format; and what reading costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modelrig.checkpoint.files import identity
from modelrig.components import Catalog, Part, TensorEntry, TensorFile
from modelrig.loading.filling import Wanted
from modelrig_plugins.formats.decoding import decode
from residue import resident_bytes

CPU = torch.device("cpu")


class Reader:
    """What both formats of dense tensors do."""

    decode = staticmethod(decode)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes in C order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def write(folder: Path, *files: Mapping[str, torch.Tensor]) -> Catalog:
    """One file for each of `files`. A tensor that is dense in another order than C's is stored in its own."""
    found, entries = [], {}
    for number, tensors in enumerate(files):
        path, data = folder / f"{number}.bytes", bytearray()
        for name, tensor in tensors.items():
            data.extend(bytes(-len(data) % 64))
            strides = None if tensor.is_contiguous() else tensor.stride()
            order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
            content = raw(tensor if strides is None else tensor.permute(order))
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries[name] = TensorEntry(name, dtype, tuple(tensor.shape), number, len(data), len(content), strides)
            data.extend(content)
        path.write_bytes(data)
        found.append(TensorFile(path.name, path, len(data), identity(path.stat())))
    return Catalog(format="raw", files=tuple(found), entries=entries)


def wanted(name: str, like: torch.Tensor, *parts: Part, dtype: torch.dtype | None = None, **more: Any) -> Wanted:
    """`like`'s shape and dtype, of `parts`, or of the stored tensor of that name as it is."""
    shape = tuple(like.shape)
    return Wanted(name, shape, dtype or like.dtype, CPU, parts or (Part(name, shape),), **more)


def filled(part: Part, stored: torch.Tensor, shape: Sequence[int], rest: Any = 0) -> torch.Tensor:
    """What `part` says, with whole tensors: a new tensor of which the other elements are `rest`."""
    made = torch.full(tuple(shape), rest, dtype=stored.dtype)
    values = stored[_cells(part.taken)]
    values = values.reshape(values.shape if part.axes is None else part.axes)
    values = values.permute([*range(values.dim())] if part.order is None else part.order)
    into = made[_cells(part.into)]
    into.copy_(values.reshape(into.shape))
    return made


def _cells(region: Any) -> Any:
    return ... if region is None else tuple(slice(start, stop) for start, stop in region)


def peak_bytes(call: Callable[[], Any]) -> int:
    """By how much memory grew at most while `call` ran; what it returned and nobody keeps included."""
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    call()
    return resident_bytes("VmHWM") - before
