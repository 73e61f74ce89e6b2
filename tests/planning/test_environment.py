from __future__ import annotations

import resource
import subprocess
import sys
import time
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from modelrig.planning.environment import Environment, Memory, has_gpu_support, read_cores, read_cpu, read_environment, read_memory

GIB = 1 << 30


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A machine with 64 GiB, 48 of them available, and no control group."""
    meminfo = f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {48 * GIB // 1024} kB\n"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(meminfo)
    return tmp_path


def cgroup(root: Path, folder: str, **files: str) -> None:
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def self_cgroup(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(text)


def test_memory_is_what_the_kernel_says_is_available(host: Path) -> None:
    assert Memory(total_bytes=64 * GIB, available_bytes=48 * GIB) == read_memory(host)


def test_the_tightest_control_group_above_the_process_limits_it(host: Path) -> None:
    self_cgroup(host, "0::/user/job\n")
    cgroup(host, "", memory__max="max\n")
    cgroup(host, "user", memory__max=f"{8 * GIB}\n", memory__current=f"{5 * GIB}\n", memory__stat=f"anon 1\ninactive_file {GIB}\n")
    cgroup(host, "user/job", memory__max=f"{16 * GIB}\n", memory__current=f"{GIB}\n")
    memory = read_memory(host)
    assert (8 * GIB, 4 * GIB) == (memory.total_bytes, memory.available_bytes)
    assert "control group" in memory.limited_by


def test_version_one_groups_count_too_and_their_huge_numbers_are_no_limit(host: Path) -> None:
    self_cgroup(host, "9:memory:/box\n4:cpu,cpuacct:/box\n0::/\n")
    cgroup(host, "memory", memory__limit_in_bytes="9223372036854771712")
    cgroup(host, "memory/box", memory__limit_in_bytes=f"{2 * GIB}", memory__usage_in_bytes=f"{GIB}", memory__stat="cache 5\n")
    cgroup(host, "cpu/box", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert GIB == read_memory(host).available_bytes
    assert 1 == read_cores(host)


def test_in_a_container_the_mounted_root_is_the_group(host: Path) -> None:
    self_cgroup(host, "0::/docker/0123\n")
    cgroup(host, "", memory__max=f"{GIB}", memory__current="0", cpu__max="50000 100000")
    assert GIB == read_memory(host).available_bytes
    assert 1 == read_cores(host)


def test_a_limit_of_address_space_limits_memory(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GIB, GIB))
    memory = read_memory(host)
    assert (GIB, GIB) == (memory.available_bytes, memory.address_space_bytes)
    assert "RLIMIT_AS" in memory.limited_by


def test_processor_name_and_flags_come_from_the_first_processor(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A CPU\nflags\t\t: avx2 avx512f\n\nmodel name\t: Another\nflags: none\n")
    assert ("A CPU", frozenset({"avx2", "avx512f"})) == read_cpu(tmp_path)


def test_a_machine_without_proc_is_still_described(tmp_path: Path) -> None:
    environment = read_environment({}, root=tmp_path)
    assert "unknown" == environment.cpu
    assert environment.memory.total_bytes > 0


@pytest.mark.parametrize(
    ("version", "files", "can"),
    [
        ("2.13.0+cpu", ["torch/lib/libtorch_cuda.so"], False),
        ("2.13.0", ["torch/lib/libtorch_cuda.so"], True),
        ("2.13.0+rocm7", ["torch/lib/libtorch_hip.so"], True),
        ("2.13.0", [], False),
    ],
)
def test_a_build_of_torch_for_gpus_is_known_by_its_files(tmp_path: Path, version: str, files: list[str], can: bool) -> None:
    info = tmp_path / "torch.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert can == has_gpu_support(PathDistribution(info))


def test_this_machine_is_read_quickly_and_without_torch() -> None:
    code = (
        "import sys; from modelrig.planning.environment import read_environment; read_environment(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "False" == done.stdout.strip()
    started = time.perf_counter()
    environment = read_environment()
    assert time.perf_counter() - started < 0.2  # 10 ms on a quiet machine
    assert isinstance(environment, Environment)
    assert environment.packages["torch"] == environment.torch
