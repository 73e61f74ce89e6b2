"""The GPUs this process may use, by NVML and without torch, in the order of torch's indices.

NVML comes with the driver; nothing is started on a GPU and no context is made. Only what CUDA_VISIBLE_DEVICES leaves is listed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p, create_string_buffer

from attrs import frozen

LIBRARY = "libnvidia-ml.so.1"


@frozen(kw_only=True)
class Gpu:
    """One visible GPU (or MIG slice). `index` is torch's, memory is in bytes."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


class _MemoryInfo(ctypes.Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class NvmlError(Exception):
    """A call of NVML returned an error code."""


def visible_gpus(environ: Mapping[str, str], library: str = LIBRARY) -> tuple[tuple[Gpu, ...], int, str | None]:
    """(GPUs in torch's order, number of GPUs that CUDA_VISIBLE_DEVICES hides, driver version); nothing without a driver."""
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    try:
        with _open(library) as nvml:
            count = c_uint()
            _call(nvml, "nvmlDeviceGetCount_v2", byref(count))
            driver = _string(nvml, "nvmlSystemGetDriverVersion", None)
            handles = [_handle(nvml, "nvmlDeviceGetHandleByIndex_v2", c_uint(index)) for index in range(count.value)]
            uuids = [_string(nvml, "nvmlDeviceGetUUID", handle) for handle in handles]
            chosen = list(select(wanted, uuids))
            found = [
                (handles[item], uuids[item])
                if isinstance(item, int)
                else (_handle(nvml, "nvmlDeviceGetHandleByUUID", c_char_p(item.encode())), item)
                for item in chosen
            ]
            gpus = tuple(_describe(nvml, handle, uuid, index) for index, (handle, uuid) in enumerate(found))
            return gpus, count.value - len({item for item in chosen if isinstance(item, int)}), driver
    except (OSError, AttributeError, NvmlError):
        return (), 0, None


def select(wanted: str | None, uuids: list[str]) -> Iterator[int | str]:
    """What CUDA_VISIBLE_DEVICES=`wanted` leaves of the GPUs with `uuids`: numbers of whole GPUs, UUIDs of MIG slices.

    As CUDA does it: UUIDs may be shortened while unique, everything from the first entry that fits nothing on is ignored, and
    a GPU named twice leaves none at all.
    """
    if wanted is None:
        yield from range(len(uuids))
        return
    chosen: list[int | str] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.startswith("MIG-"):
            chosen.append(entry)
            continue
        if entry.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        else:
            matches = [int(entry)] if entry.isascii() and entry.isdigit() and int(entry) < len(uuids) else []
        if len(matches) != 1:
            break
        chosen += matches
    if len(set(chosen)) == len(chosen):
        yield from chosen


def _describe(nvml: ctypes.CDLL, handle: c_void_p, uuid: str, index: int) -> Gpu:
    memory, major, minor = _MemoryInfo(), c_int(), c_int()
    _call(nvml, "nvmlDeviceGetMemoryInfo", handle, byref(memory))
    try:
        _call(nvml, "nvmlDeviceGetCudaComputeCapability", handle, byref(major), byref(minor))
        capability = (major.value, minor.value)
    except NvmlError:  # a MIG slice does not say
        capability = None
    name = _string(nvml, "nvmlDeviceGetName", handle)
    return Gpu(index=index, name=name, uuid=uuid, total_bytes=memory.total, free_bytes=memory.free, capability=capability)


@contextmanager
def _open(library: str) -> Iterator[ctypes.CDLL]:
    nvml = ctypes.CDLL(library)
    _call(nvml, "nvmlInit_v2")
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _call(nvml: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(nvml, function)(*arguments)
    if code != 0:
        raise NvmlError(f"{function} returned {code}")


def _handle(nvml: ctypes.CDLL, function: str, key: object) -> c_void_p:
    handle = c_void_p()
    _call(nvml, function, key, byref(handle))
    return handle


def _string(nvml: ctypes.CDLL, function: str, handle: c_void_p | None) -> str:
    buffer = create_string_buffer(96)
    arguments = (buffer, c_uint(len(buffer))) if handle is None else (handle, buffer, c_uint(len(buffer)))
    _call(nvml, function, *arguments)
    return buffer.value.decode(errors="replace")
