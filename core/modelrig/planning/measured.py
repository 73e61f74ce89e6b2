"""What was measured of this machine's kernels, in one file for all machines that share a home.

    {"version": 1, "machines": {"<machine>": {"<component id>": {"<weight>": {"<rows>": {"<kernel>": seconds}}}}}}

`modelrig bench --tune` writes it, and a component whose options ask for measured kernels reads it when it plans. It lies where the
freedesktop rule has caches: `$XDG_CACHE_HOME/modelrig/kernels.json`, by default under `~/.cache`. A machine is its CPU, the CPU's
flags, the version of torch and the number of threads: another one of any of them needs measurements of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelrig.checkpoint.strict_json import load_json
from modelrig.errors import CheckpointError, ConfigError, SaveError, quoted
from modelrig.planning.environment import Environment
from modelrig.planning.kept import kept_folder, replace_text

VERSION = 1
MAX_BYTES = 8 << 20

#: weight → rows → kernel → seconds
Measured = Mapping[str, Mapping[int, Mapping[str, float]]]


class NotMeasuredError(Exception):
    """There is nothing that can be used; the text says why, and where."""


def kernels_file(environ: Mapping[str, str] | None = None) -> Path:
    """Where measurements are kept. Raises `NotMeasuredError` where there is no home for them."""
    try:
        return kept_folder(environ) / "kernels.json"
    except RuntimeError as error:
        raise NotMeasuredError(f"there is no folder for measurements: {error}") from error


def machine_of(environment: Environment) -> str:
    """The name under which measurements of this machine are kept."""
    flags = hashlib.sha256(" ".join(sorted(environment.cpu_flags)).encode()).hexdigest()[:12]
    return f"{environment.cpu}, flags {flags}, torch {environment.torch}, {environment.threads} threads"


def read_measured(machine: str, component: str, path: Path | None = None) -> Measured:
    """What was measured of `component` (its full id) on `machine`.

    Raises:
        NotMeasuredError: the file is missing, is not what it should be, or says nothing of this machine and component.
    """
    path = kernels_file() if path is None else path
    if not os.path.lexists(path):
        raise NotMeasuredError(f"nothing was measured yet: {path} does not exist")
    machines = _machines(path)
    if machine not in machines:
        raise NotMeasuredError(f"{path} has nothing of this machine ({machine}), but of {len(machines)} others")
    sections = _mapping(machines[machine], path, machine)
    if component not in sections:
        raise NotMeasuredError(f"{path} has nothing of {component} on this machine")
    weights = _mapping(sections[component], path, component)
    return {weight: _rows(rows, path, weight) for weight, rows in weights.items()}


def keep_measured(machine: str, component: str, measured: Measured, path: Path | None = None) -> Path:
    """Add to the file what was measured; the same weights and rows are replaced, and so is a file that cannot be read.

    Raises:
        SaveError: SV-IO when it cannot be written; the file is as it was then.
    """
    try:
        path = kernels_file() if path is None else path
        machines: dict[str, Any] = {}
        known: dict[str, Any] = {}
        with contextlib.suppress(NotMeasuredError):
            machines = dict(_machines(path))
            known = {name: dict(rows) for name, rows in read_measured(machine, component, path).items()}
        for weight, rows in measured.items():
            known[weight] = {**known.get(weight, {}), **rows}
        sections = machines.get(machine)
        machines[machine] = {**(sections if isinstance(sections, dict) else {}), component: known}
        replace_text(path, json.dumps({"version": VERSION, "machines": machines}, indent=1))
    except NotMeasuredError as error:
        raise SaveError("SV-IO", str(error)) from error
    except OSError as error:
        raise SaveError("SV-IO", f"cannot be written: {error.strerror or error}", path=path) from error
    return path


# ------------------------------------------------------------------------------------------------ the file, read strictly


def _machines(path: Path) -> Mapping[str, Any]:
    try:
        document = load_json(path, error=ConfigError, prefix="CF", max_bytes=MAX_BYTES)
    except CheckpointError as error:
        raise NotMeasuredError(f"{path} cannot be used: {error.reason}") from error
    if document.get("version") != VERSION:
        raise NotMeasuredError(f"{path} cannot be used: its version is {quoted(document.get('version'))}, {VERSION} is needed")
    return _mapping(document.get("machines"), path, "machines")


def _mapping(value: Any, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise NotMeasuredError(f"{path} cannot be used: {quoted(where)} is {quoted(value)}, an object is needed")
    return value


def _rows(value: Any, path: Path, where: str) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for count, kernels in _mapping(value, path, where).items():
        if not count.isdecimal() or len(count) > 9 or int(count) < 1:
            raise NotMeasuredError(f"{path} cannot be used: {quoted(count)} in {quoted(where)} is no number of rows")
        rows[int(count)] = {}
        for kernel, seconds in _mapping(kernels, path, where).items():
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not is_number or not math.isfinite(seconds) or seconds <= 0:
                raise NotMeasuredError(f"{path} cannot be used: {quoted(seconds)} in {quoted(where)} is no time")
            rows[int(count)][kernel] = float(seconds)
    return rows
