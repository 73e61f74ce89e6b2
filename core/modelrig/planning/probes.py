"""What only running it can tell, found out in a child process and kept on disk: whether a kernel's package loads and computes.

    finding = find(Probe(module="some_package.probe", arguments={"head_dim": 64}, packages=("torch",), machine=("H100", "580")))
    finding.found, finding.problem

A planner asks through `need.probe`, which answers None unless its component was asked for by name on this machine: `auto` and
plans for other machines run nothing. The module is run as `python -m`: it reads its arguments as JSON from standard input, and
`answer` writes what it found. The answer is kept by the versions of Python and the packages, the machine and the arguments, in
`$XDG_CACHE_HOME/modelrig/probes`; a crash or a timeout is no answer and is tried again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from modelrig.errors import quoted
from modelrig.planning.kept import kept_folder, replace_text

MARK = "modelrig-probe: "  # what an answer's line begins with
TIMEOUT_SECONDS = 180.0
MAX_OUTPUT = 1 << 16  # bytes of a child's output that are kept, and of a file that is read


@frozen(kw_only=True)
class Probe:
    """A module to run in a child process. `packages` are distributions and `machine` facts that the answer depends on."""

    module: str
    arguments: Mapping[str, Any] = Factory(dict)
    packages: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str | None]:
        """Of Python and the packages; None for one that is not installed."""
        found: dict[str, str | None] = {"python": platform.python_version()}
        for name in self.packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        return found

    @property
    def key(self) -> str:
        """All that the answer depends on, as text."""
        parts = {
            "module": self.module,
            "arguments": self.arguments,
            "versions": self.versions,
            "machine": [platform.machine(), *self.machine],
        }
        return json.dumps(parts, sort_keys=True, default=str)


@frozen
class Finding:
    """What a probe answered, or the `problem` why it did not."""

    found: Mapping[str, Any] | None
    problem: str | None = None


_known: dict[str, Finding] = {}


def not_asked(probe: Probe) -> Finding | None:  # noqa: ARG001 - the signature of `find`
    """What `need.probe` is for a component that nobody asked for by name: nothing is run."""
    return None


def find(probe: Probe) -> Finding:
    """The answer, from this process, from disk, or from a child process run now."""
    key = probe.key
    if key not in _known:
        finding = _read(_file_of(key), key)
        if finding is None:
            finding = run(probe)
            if finding.found is not None:
                _keep(_file_of(key), key, finding.found)
        _known[key] = finding
    return _known[key]


def answer(found: Mapping[str, Any]) -> None:
    """Called in the child, by the module of a probe: what it found."""
    sys.stdout.flush()
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


def arguments() -> dict[str, Any]:
    """Called in the child: the probe's arguments."""
    read: dict[str, Any] = json.load(sys.stdin)
    return read


# ------------------------------------------------------------------------------------------------ the child


def run(probe: Probe, timeout_seconds: float = TIMEOUT_SECONDS) -> Finding:
    """The answer of a child process started now, which sees the modules that this one sees."""
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    command = [sys.executable or "python3", "-P", "-m", probe.module]
    try:
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(probe.arguments).encode())
            given.seek(0)
            child = subprocess.Popen(
                command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
    except OSError as error:
        return Finding(None, f"a probe could not be started: {error}")
    try:
        output = _last_of(child, time.monotonic() + timeout_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # what it started and left behind
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if output is None:
        return Finding(None, f"a probe gave no answer within {timeout_seconds:g} s")
    lines = output.decode(errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):
                found = json.loads(line.removeprefix(MARK))
                if isinstance(found, dict):
                    return Finding(found)
    ended = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Finding(None, f"a probe ended with {ended}" + (f", saying {quoted(said)}" if said else ""))


def _last_of(child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """The end of what it writes until it closes its output; None if it does not in time."""
    assert child.stdout is not None
    kept = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([child.stdout], [], [], left)[0]:
            continue
        part = os.read(child.stdout.fileno(), MAX_OUTPUT)
        if not part:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, left))
                return kept
            return None
        kept = (kept + part)[-MAX_OUTPUT:]
    return None


# ------------------------------------------------------------------------------------------------ on disk


def _file_of(key: str) -> Path:
    return kept_folder() / "probes" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(file: Path, key: str) -> Finding | None:
    """What was kept, or None for a file that is not there, not whole or of something else."""
    try:
        with file.open("rb") as opened:
            kept = json.loads(opened.read(MAX_OUTPUT + 1))
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(kept, dict) and kept.get("key") == key and isinstance(kept.get("found"), dict)
    return Finding(kept["found"]) if is_whole else None


def _keep(file: Path, key: str, found: Mapping[str, Any]) -> None:
    """Write it whole or not at all; a folder that cannot be written to keeps nothing."""
    with contextlib.suppress(OSError):
        replace_text(file, json.dumps({"key": key, "found": found}))
