"""What compiled code was made from besides the structure: versions, the processor, and the text of every source file involved.

A name and a version do not say what a function does while someone works on it, so files are read. Those of torch and of the
standard library are told by their versions.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
import types
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from modelrig.planning.environment import read_cpu
from modelrig_plugins.compilers.inductor import find_compiler

#: how artefacts are made and kept; another number when that changes
LAYOUT = "1"
_TOLD_BY_VERSION = sys.stdlib_module_names | {"torch", "numpy", "attr", "attrs", "cattrs", "typing_extensions"}


@functools.cache
def machine() -> str:
    """Everything outside of Python that decides what is compiled, and whether it runs here."""
    model, flags = read_cpu(Path("/"))
    found = find_compiler()
    told = ""
    if found is not None:
        try:
            told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            told = found
    try:
        ours = version("modelrig")
    except PackageNotFoundError:
        ours = "not installed"
    parts = [
        LAYOUT,
        ours,
        sys.version,
        platform.machine(),
        torch.__version__,
        str(torch.version.git_version),
        str(torch._C._GLIBCXX_USE_CXX11_ABI),
        torch.backends.cpu.get_cpu_capability(),
        model,
        " ".join(sorted(flags)),
        told,
    ]
    return _digest(parts)


def sources(homes: Iterable[str]) -> str:
    """Digest of the files of the modules named `homes`, and of those they use, as far as no version tells them."""
    found: dict[str, types.ModuleType] = {}
    left = list(homes)
    while left:
        name = left.pop()
        module = sys.modules.get(name)
        if name in found or module is None or name.partition(".")[0] in _TOLD_BY_VERSION:
            continue
        found[name] = module
        if hasattr(module, "__path__"):  # what a package holds depends on what was imported so far
            continue
        for value in list(vars(module).values()):
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home not in found:
                left.append(home)
    return _digest([f"{name} {_text(module)}" for name, module in sorted(found.items())])


def _text(module: types.ModuleType) -> str:
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    try:
        stat = Path(file).stat()
    except OSError:
        return ""
    return _file(file, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _file(file: str, changed: int, size: int) -> str:  # noqa: ARG001 - a file is read again once it has changed
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
