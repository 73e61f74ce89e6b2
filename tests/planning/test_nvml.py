from __future__ import annotations

import ctypes
from typing import Any

import pytest

from modelrig.planning import nvml
from modelrig.planning.nvml import Gpu, select, visible_gpus

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,-1,1", [0]),
        ("1,7,0", [1]),
        ("0,0", []),
        ("GPU-bb", [2]),
        ("GPU-aa", []),
        ("GPU-aa22, 0", [1, 0]),
        ("none", []),
        ("MIG-77", ["MIG-77"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted: str | None, left: list[object]) -> None:
    assert left == list(select(wanted, UUIDS))


class FakeLibrary:
    """NVML for two GPUs; the second is busy. Says which functions were called."""

    def __init__(self, _: str) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            values: dict[str, Any] = {
                "nvmlDeviceGetCount_v2": lambda count: set_value(count, 2),
                "nvmlDeviceGetHandleByIndex_v2": lambda index, handle: set_value(handle, 100 + index.value),
                "nvmlDeviceGetUUID": lambda handle, buffer, _: fill(buffer, f"GPU-{handle.value}"),
                "nvmlDeviceGetName": lambda handle, buffer, _: fill(buffer, "NVIDIA H200"),
                "nvmlSystemGetDriverVersion": lambda buffer, _: fill(buffer, "570.1"),
                "nvmlDeviceGetMemoryInfo": lambda handle, info: fill_memory(info, 1000, 900 if handle.value == 100 else 1),
                "nvmlDeviceGetCudaComputeCapability": lambda handle, major, minor: (set_value(major, 9), set_value(minor, 0)),
            }
            values.get(name, lambda *_: None)(*arguments)
            return 0

        return call


def set_value(reference: Any, value: int) -> None:
    reference._obj.value = value


def fill(buffer: Any, text: str) -> None:
    buffer.value = text.encode()


def fill_memory(info: Any, total: int, free: int) -> None:
    info._obj.total, info._obj.free = total, free


def test_gpus_are_numbered_as_torch_numbers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary("")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    gpus, hidden, driver = visible_gpus({"CUDA_VISIBLE_DEVICES": "1"})
    busy = Gpu(index=0, name="NVIDIA H200", uuid="GPU-101", total_bytes=1000, free_bytes=1, capability=(9, 0))
    assert ((busy,), 1, "570.1") == (gpus, hidden, driver)
    assert ("nvmlInit_v2", "nvmlShutdown") == (library.calls[0], library.calls[-1])
    assert "cuda:0" == busy.device


def test_a_failing_call_means_no_gpus_and_shuts_nvml_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeLibrary):
        def nvmlDeviceGetCount_v2(self, count: Any) -> int:
            return 999

    library = Broken("")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    assert ((), 0, None) == visible_gpus({})
    assert "nvmlShutdown" == library.calls[-1]


def test_without_a_driver_there_are_no_gpus() -> None:
    assert ((), 0, None) == visible_gpus({}, library="libno-such-library.so.1")
    assert nvml.LIBRARY.startswith("libnvidia-ml")
