"""What is known of this machine without importing torch.

    environment = read_environment()
    environment.memory.available_bytes, environment.gpus, environment.torch_cuda

Everything is read from `/proc`, the control groups, NVML and distribution metadata; plans take an `Environment` as an
argument, so a plan for another machine is a plan with another `Environment`.
"""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

from attrs import Factory, asdict, frozen

from modelrig.errors import quoted
from modelrig.planning.nvml import Gpu, visible_gpus

__all__ = ["Environment", "Gpu", "Memory", "read_environment"]

#: distributions whose versions decide what a plan means
PACKAGES = ("modelrig", "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub")
#: libraries that only a torch build for GPUs has, beside the package's Python files
GPU_LIBRARIES = ("torch/lib/libtorch_cuda.so", "torch/lib/libtorch_hip.so")
UNLIMITED = 1 << 60  # control groups write "no limit" as a number about this large


@frozen(kw_only=True)
class Memory:
    """Main memory in bytes. `available_bytes` is what this process can still take, and `limited_by` says what sets that."""

    total_bytes: int
    available_bytes: int
    limited_by: str = "free memory"
    #: what is left of RLIMIT_AS, which counts mapped files too; None without such a limit
    address_space_bytes: int | None = None


@frozen(kw_only=True)
class Environment:
    """One machine as this process sees it."""

    cpu: str = "unknown"
    cpu_flags: frozenset[str] = frozenset()
    cores: int = 1  # that this process may run on, by affinity and quota
    threads: int = 1  # that OMP_NUM_THREADS or MKL_NUM_THREADS says, else `cores`
    memory: Memory
    gpus: tuple[Gpu, ...] = ()  # in the order of torch's indices
    hidden_gpus: int = 0  # that CUDA_VISIBLE_DEVICES hides
    driver: str | None = None
    torch: str | None = None  # version
    torch_cuda: bool = False  # this build of torch can use GPUs
    packages: Mapping[str, str] = Factory(dict)
    lacks_cpp: str | None = None  # why nothing can be compiled from C++; None if it can
    is_here: bool = False  # it is the machine this process runs on, so something may be tried out

    def available_bytes(self, device: str) -> int | None:
        """What is free on `device` (`"cpu"`, `"cuda:0"`) for this process; None if that is not known."""
        if device == "cpu":
            return self.memory.available_bytes
        return next((gpu.free_bytes for gpu in self.gpus if gpu.device == device), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "cpu": self.cpu,
            "cores": self.cores,
            "memory": asdict(self.memory),
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "driver": self.driver,
            "torch": self.torch,
            "torch_cuda": self.torch_cuda,
            "packages": dict(self.packages),
        }


def read_environment(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Environment:
    """This machine. `environ` and `root` (where `/proc` and `/sys` are found) can be replaced."""
    environ = os.environ if environ is None else environ
    model, flags = read_cpu(root)
    cores = read_cores(root)
    gpus, hidden, driver = visible_gpus(environ)
    torch = _find("torch")
    return Environment(
        cpu=model,
        cpu_flags=flags,
        cores=cores,
        threads=_asked_threads(environ) or cores,
        memory=read_memory(root),
        gpus=gpus,
        hidden_gpus=hidden,
        driver=driver,
        torch=torch.version if torch else None,
        torch_cuda=torch is not None and has_gpu_support(torch),
        packages={name: found.version for name in PACKAGES if (found := _find(name))},
        lacks_cpp=find_lack_of_cpp(environ),
        is_here=root == Path("/"),
    )


# ------------------------------------------------------------------------------------------------ processor


def read_cpu(root: Path) -> tuple[str, frozenset[str]]:
    """The model name and feature flags of the first processor in `/proc/cpuinfo`."""
    model, flags = "unknown", frozenset[str]()
    for line in _text(root / "proc/cpuinfo").partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):  # x86, arm
            flags = frozenset(value.split())
    return model, flags


def read_cores(root: Path) -> int:
    """Processors this process may use: those of its affinity, or fewer if the control group's quota is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(root, "cpu"):
        quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _asked_threads(environ: Mapping[str, str]) -> int | None:
    texts = (environ.get(name, "").strip() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return next((int(text) for text in texts if text.isdecimal() and 0 < len(text) < 5 and int(text)), None)


# ------------------------------------------------------------------------------------------------ memory


def read_memory(root: Path) -> Memory:
    """The least of free memory, what the control groups (v1 and v2) leave, and what RLIMIT_AS leaves."""
    info = {}
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            info[key] = int(value.split()[0]) * 1024
    total = info.get("MemTotal", 0) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = {"free memory": info.get("MemAvailable", info.get("MemFree", total))}
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is not None and limit < UNLIMITED:
            used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
            # Clean file pages are given back when memory is asked for.
            reclaimable = _counters(folder / "memory.stat").get("inactive_file", 0)
            left[f"control group limit of {limit:,} bytes"] = max(0, limit - used + reclaimable)
            total = min(total, limit)
    address_space = None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        mapped = int((_text(root / "proc/self/statm").split() or ["0"])[0]) * os.sysconf("SC_PAGE_SIZE")
        address_space = max(0, soft - mapped)
        left[f"RLIMIT_AS of {soft:,} bytes"] = address_space
    limited_by = min(left, key=left.__getitem__)
    return Memory(total_bytes=total, available_bytes=left[limited_by], limited_by=limited_by, address_space_bytes=address_space)


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control groups that may limit `controller`, from its own up to the root's."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be the host's and not exist here; the mounted root is then the container's own.
        steps = [step for step in path.split("/") if step and step != ".."]
        folders += [base.joinpath(*steps[:count]) for count in range(len(steps), -1, -1)]
    return folders


# ------------------------------------------------------------------------------------------------ torch


def has_gpu_support(torch: Distribution) -> bool:
    """Whether this build of torch can use a GPU, from its metadata and file names."""
    if torch.version.partition("+")[2] == "cpu":
        return False
    if any(Path(str(torch.locate_file(library))).exists() for library in GPU_LIBRARIES):
        return True
    # A development build lies elsewhere; the CUDA runtime installed beside it is the next best sign.
    return any((found.metadata["Name"] or "").startswith("nvidia-cuda-runtime") for found in distributions())


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ compiler


def find_lack_of_cpp(environ: Mapping[str, str]) -> str | None:
    """What is missing to compile C++ against Python, as torch does it: the compiler of CXX, or g++, and Python's headers."""
    compiler = environ.get("CXX", "g++")
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        return f"there is no C++ compiler {quoted(compiler)}"
    headers = Path(sysconfig.get_path("include"))
    return None if (headers / "Python.h").is_file() else f"Python's headers are not in {headers}"


# ------------------------------------------------------------------------------------------------ small files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(*paths: Path) -> int | None:
    """The number in the first of `paths` that holds one; "max" is none."""
    return next((int(text) for path in paths if (text := _text(path).strip()).isdigit()), None)


def _counters(path: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in _text(path).splitlines())
    return {key: int(value) for key, _, value in pairs if value.isdigit()}
