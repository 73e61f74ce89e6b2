"""Runs command lines of modelrig, each in a child of its own: limited in memory and time, watched by an audit hook.

    (told,) = run_commands([Command(["plan", str(folder)], folder=str(folder))])
    assert (1, "", []) == (told.code, told.out, told.harm())

One process imports everything once and forks for each command, so that hundreds of them take seconds, and the figures of a command
are its own. Started as a program it is that process: a JSON list of commands on standard input, a JSON line for each on standard
output.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

MEBIBYTE = 1 << 20
PATIENCE_SECONDS = 30  # of the wall clock, for a loaded machine; what is held is the processor time
BAR_SECONDS = 2.0
#: audit events that mean that something was started, or somebody talked to
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "pickle.find_class", "pty.spawn")
CHANGING = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.")
READING = ("open", "os.listdir", "os.scandir")


@define(kw_only=True)
class Command:
    """A command line and its surroundings.

    Attributes:
        folder: the checkpoint's folder, which it may read; it may read its working directory too.
        room: bytes it may take beyond what the imports took.
    """

    arguments: Sequence[str] = field(kw_only=False)
    folder: str | None = None
    cwd: str | None = None
    environ: dict[str, str] = field(factory=dict)
    stdin: str = ""
    room: int = 256 * MEBIBYTE


@define(kw_only=True)
class Told:
    """What a command did. `cpu_seconds` are its own; `left` is what it left in its home and temporary folder.

    Of what it did to files: `outside` are real paths it read beyond its folder, Python's and ours; `changed` are those it wrote,
    removed or made, its temporary folder excepted. `ran` is code of other files than Python's and ours that it compiled, ran or
    imported; `started` are processes and connections.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float
    left: list[str]
    outside: list[str]
    changed: list[str]
    ran: list[str]
    started: list[str]

    def harm(self) -> list[str]:
        """Everything it did that no input may make it do, beside what it said."""
        found = [
            f"{name}: {values}" for name in ("left", "outside", "changed", "ran", "started") if (values := getattr(self, name))
        ]
        if self.code not in (0, 1, 2, 3, 4):
            found.append(f"ended with {self.code}: {self.err[-500:]}")
        if self.cpu_seconds >= BAR_SECONDS:
            found.append(f"took {self.cpu_seconds:.2f} s")
        for text in ("Traceback", "unexpected error", "panicked", "stack backtrace", "\x1b", "Warning:"):
            if text in self.err or text in self.out:
                found.append(f"said {text!r}: {self.err[-500:]}")
        if len(self.err) > 10_000:
            found.append(f"said {len(self.err):,} characters")
        return found


def run_commands(commands: Sequence[Command], *, with_torch: bool = False) -> list[Told]:
    """Run each, in this order. `with_torch` imports what loading needs beforehand, so that no command pays for it."""
    done = subprocess.run(
        [sys.executable, __file__, *(["torch"] if with_torch else [])],
        input=json.dumps([asdict(command) for command in commands]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a forked child has none of its parent's threads
        capture_output=True,
        text=True,
        timeout=120 + len(commands),
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-500:] + done.stderr[-2000:]
    return [Told(**json.loads(line)) for line in done.stdout.splitlines()]


# ------------------------------------------------------------------------------------------------ in the process of its own


def _main() -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        _import_everything(with_torch="torch" in sys.argv)
    for command in json.load(sys.stdin):
        print(json.dumps(_watched(Command(**command))), flush=True)


def _import_everything(with_torch: bool) -> None:
    """What is imported on first use, so that no command pays for it."""
    import modelrig
    from modelrig.cli import main

    for command in (["plan", "tiny"], ["plan", "tiny", "--json"], ["inspect", "tiny"], ["plan", "no-such-model", "--batch", "0"]):
        with contextlib.redirect_stderr(io.StringIO()):
            main(command)
    for module in ("modelrig.cli.run", "modelrig.cli.chat", "modelrig.model"):
        __import__(module)
    if with_torch:
        with modelrig.load("tiny") as model:
            model.session().send("a", max_new_tokens=1)


def _watched(command: Command) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="told-") as kept, tempfile.TemporaryDirectory(prefix="home-") as home:
        (Path(kept) / "in").write_text(command.stdin)
        child = os.fork()
        if child == 0:
            try:
                _in_child(command, Path(kept), home)
            finally:
                os._exit(99)
        _, status, usage = os.wait4(child, 0)
        seen = Path(kept) / "events"
        events = json.loads(seen.read_text()) if seen.exists() else {name: [] for name in _EVENTS}
        return {
            **events,
            **{name: (Path(kept) / name).read_text(errors="replace") for name in ("out", "err")},
            "code": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "left": sorted(str(path.relative_to(home)) for path in Path(home).rglob("*")),
        }


def _in_child(command: Command, kept: Path, home: str) -> None:
    for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY | os.O_CREAT), (2, "err", os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(kept / name, flags), number)
    signal.alarm(PATIENCE_SECONDS)
    os.environ.update({"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, **command.environ})
    tempfile.tempdir = None
    os.chdir(command.cwd or home)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + command.room, resource.RLIM_INFINITY))
    from modelrig.cli import main

    watch = _Watch([home, os.getcwd(), *([command.folder] if command.folder else [])], home)
    sys.addaudithook(watch)
    code = 99
    try:
        code = main(command.arguments)
    except BaseException:
        traceback.print_exc()
    watch.is_on = False
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    sys.stderr.flush()
    (kept / "events").write_text(json.dumps({name: list(found) for name, found in watch.events.items()}))
    os._exit(code)


_EVENTS = ("outside", "changed", "ran", "started")


class _Watch:
    """An audit hook that notes what nobody's checkpoint may bring about."""

    def __init__(self, readable: Sequence[str], home: str) -> None:
        import modelrig
        import modelrig_plugins

        packages = [str(Path(package.__path__[0])) for package in (modelrig, modelrig_plugins)]
        self.code = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, *packages)))
        self.readable = (*self.code, "/proc", "/sys", *map(os.path.realpath, readable))
        self.home = (os.path.realpath(home),)
        self.events: dict[str, dict[str, None]] = {name: {} for name in _EVENTS}
        self.is_on = True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        self.is_on = False  # what the notes need is no event
        try:
            self._note(event, arguments)
        finally:
            self.is_on = True

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            self.events["started"][f"{event} {str(arguments)[:200]}"] = None
        elif event in READING or event.startswith(CHANGING):
            self._note_path(event, arguments)
        elif event in ("exec", "compile"):
            name = arguments[0].co_filename if event == "exec" else str(arguments[1])
            if os.path.isabs(name) and not _is_in(os.path.realpath(name), self.code):  # others are made by attrs and jinja2
                self.events["ran"][name] = None
        elif event == "import" and arguments[1] is not None and not _is_in(os.path.realpath(arguments[1]), self.code):
            self.events["ran"][str(arguments[1])] = None

    def _note_path(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not isinstance(arguments[0], str | bytes | os.PathLike):  # a file descriptor: it was opened before
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not _is_in(path, self.readable) and os.path.exists(path):
            self.events["outside"][path] = None
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        is_writing = event.startswith(CHANGING) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_writing and not _is_in(path, self.home):
            self.events["changed"][path] = None


def _is_in(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


if __name__ == "__main__":
    _main()
