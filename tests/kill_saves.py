"""Saves that are killed, thousands of them: at random instants, at every system call, and with every refusal of a disk.

python tests/kill_saves.py [--kills 10000] [--quick] [--baseline 300] [--out kill]

A process that has everything imported forks a child for each save and kills it with SIGKILL after a random part of 1.3 times as
long as a save takes. Then the folder must hold the old checkpoint or the new one, for a reader that goes by files as
transformers does, and for our own; and after the next save there must be no leftover, and everything that others wrote.
The same is done to transformers' `save_pretrained`, for comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from modelrig.checkpoint.folder import consistently  # noqa: E402
from modelrig.checkpoint.saving import protocol  # noqa: E402
from modelrig.errors import SaveError, SaveInProgress  # noqa: E402
from saves import ERRNOS, Faulty, Recording, leftovers, our_state, save, state  # noqa: E402

#: scenario → layouts of the old and the new save; None: there is no old one
SCENARIOS: dict[str, tuple[str | None, str]] = {
    "new folder": (None, "3 shards"),
    "same shards": ("3 shards", "3 shards"),
    "fewer shards": ("6 shards", "2 shards"),
    "more shards": ("2 shards", "6 shards"),
    "single to shards": ("single", "3 shards"),
    "shards to single": ("3 shards", "single"),
    "a reader meanwhile": ("3 shards", "2 shards"),
    "a writer meanwhile": ("3 shards", "2 shards"),
    "a shell in it": ("3 shards", "2 shards"),
    "a shell in it, to single": ("3 shards", "single"),
    "a shell and a writer": ("2 shards", "3 shards"),
    "a shell and a reader": ("single", "3 shards"),
    "two savers": ("3 shards", "2 shards"),
}


# ------------------------------------------------------------------------------------------------ processes


class Child:
    """A forked process that does `work` when told to go, and reports how it ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        go, self._go = os.pipe()
        self._ready, ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._go)
                os.close(self._ready)
                os.write(ready, b"r")
                os.read(go, 1)
                work()
                code = 0
            except SaveInProgress:
                code = 2
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(code)
        os.close(go)
        os.close(ready)
        os.read(self._ready, 1)

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, negative for the signal that ended it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._go)
        os.close(self._ready)
        return code


class Writer:
    """Somebody else, who writes files of his own into the folder: made under another name first, then renamed, then changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            number = 0
            while True:
                number += 1
                with contextlib.suppress(OSError):  # the folder is not there yet
                    name = folder / f"log-{number % 8}.txt"
                    text = f"{number}" * 20
                    (folder / "log.tmp").write_text(text)
                    os.replace(folder / "log.tmp", name)
                    os.write(write, f"{name.name} {number}\n".encode())
                time.sleep(random.random() * 0.002)
        os.close(write)
        self._said = b""
        self.last: dict[str, int] = {}

    def stop(self) -> None:
        """Stand still between two files, so that what is there can be judged."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)
        while select.select([self._read], [], [], 0)[0]:
            self._said += os.read(self._read, 65536)
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            name, number = line.decode().split()
            self.last[name] = int(number)

    def lost(self) -> list[str]:
        """Files that he wrote and that are not there, or are an older state; he may be one file ahead of what he said."""
        missing = []
        for name, number in self.last.items():
            try:
                text = (self.folder / name).read_text()
            except OSError:
                missing.append(name)
                continue
            if text not in (f"{number}" * 20, f"{number + 8}" * 20):
                missing.append(f"{name}: {text[:12]} instead of {number}")
        return missing

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


class Reader:
    """Somebody who reads the folder all the time, as our loader does: what he sees is one save, whole."""

    def __init__(self, folder: Path) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            while True:
                try:
                    seen = consistently(folder, lambda: our_state(folder), attempts=1000)
                except BaseException as error:
                    seen = f"{type(error).__name__}: {error}"
                os.write(write, f"{seen if isinstance(seen, int) else 'BAD ' + str(seen)[:150]}\n".encode())
        os.close(write)

    def seen(self) -> list[str]:
        lines = b""
        while select.select([self._read], [], [], 0)[0] and (part := os.read(self._read, 65536)):
            lines += part
        return lines.decode().split("\n")[:-1]

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


@contextlib.contextmanager
def shell_in(folder: Path) -> Iterator[int]:
    process = subprocess.Popen(["sleep", "100000"], cwd=folder)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------ one scenario


class Run:
    """Kills in one scenario, and what came of them."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.old, self.new = SCENARIOS[name]
        self.folder = root / name.replace(" ", "-").replace(",", "") / "model"
        self.folder.parent.mkdir()
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []
        self.generation = 1
        self.shell: int | None = None
        self.writer: Writer | None = None
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Run:
        self.prepare()
        if "shell" in self.name:
            self.shell = self.stack.enter_context(shell_in(self.folder))
        if "writer" in self.name:
            self.writer = Writer(self.folder)
            self.stack.callback(self.writer.end)
        if "reader" in self.name:
            self.reader = Reader(self.folder)
            self.stack.callback(self.reader.end)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def prepare(self) -> None:
        """The old save; it is the next save after the last kill, too."""
        self.generation += 1
        if self.old is None:
            save(self.folder, self.generation, self.new)
            self.judge_leftovers()
            shutil.rmtree(self.folder)
        else:
            save(self.folder, self.generation, self.old)
            self.judge_leftovers()

    def judge_leftovers(self) -> None:
        if self.writer:
            self.writer.stop()
            if lost := self.writer.lost():
                self.bad("foreign lost", str(lost))
                for name in [one.split(":")[0] for one in lost]:
                    self.writer.last.pop(name)
        if found := leftovers(self.folder):
            self.bad("leftovers", str(found))
        if state(self.folder) != self.generation:
            self.bad("not saved", str(state(self.folder)))
        if self.writer:
            self.writer.resume()

    def bad(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{kind}: {what}"[:400])

    def new_save(self) -> None:
        save(self.folder, self.generation + 1, self.new)

    def judge(self) -> None:
        """What a kill has left."""
        wanted = {"absent" if self.old is None else self.generation: "old", self.generation + 1: "new"}
        if "savers" in self.name:
            wanted[self.generation + 2] = "new"
        found = state(self.folder)
        if found in wanted:
            self.counts[wanted[found]] += 1
        else:
            self.bad(str(found).split(":")[0], str(found))
        if found != "absent":
            try:
                ours = our_state(self.folder)
            except Exception as error:
                ours = f"unloadable: {type(error).__name__}: {error}"
            if ours != found:
                self.bad("read otherwise by us", f"{found} {ours}")
        if self.shell is not None and (there := state(Path(f"/proc/{self.shell}/cwd"))) != found:
            self.bad("the shell is elsewhere", f"{found} {there}")

    def seconds(self, repeats: int) -> float:
        """How long a save takes in a child."""
        times = []
        for _ in range(repeats):
            child = Child(self.new_save)
            began = time.perf_counter()
            child.go()
            assert child.wait() == 0
            times.append(time.perf_counter() - began)
            self.generation += 1
            self.prepare()
        return statistics.median(times)

    def kill_at_random(self, kills: int) -> float:
        seconds = self.seconds(3 if kills < 50 else 25)
        for _ in range(kills):
            child, delay = Child(self.new_save), random.random() * 1.3 * seconds
            other = Child(lambda: save(self.folder, self.generation + 2, "3 shards")) if "savers" in self.name else None
            child.go()
            if other:
                other.go()
            time.sleep(delay)
            child.kill()
            if child.wait() > 0 and other is None:
                self.bad("failed", "a save that was not disturbed raised")
            if other and other.wait() not in (0, 2):
                self.bad("failed", "the second saver raised something else than SaveInProgress")
            self.judge()
            self.generation += 2
            self.prepare()
            if "reader" in self.name:
                seen = self.reader.seen()
                self.counts["reads"] += len(seen)
                for line in seen:
                    if line.startswith("BAD"):
                        self.bad("read badly", line)
        return seconds

    def kill_at_every_system_call(self, step: int = 1) -> int:
        """With strace, which sends the signal on entering the n-th call of each kind."""
        log = self.folder.parent / "strace"
        child = Child(self.new_save)
        tracer = attach(child.pid, "-o", str(log))
        child.go()
        assert child.wait() == 0
        tracer.wait()
        calls = Counter(
            line.split("(")[0].split()[-1]
            for line in log.read_text().splitlines()
            if "(" in line and "+++" not in line and "resumed" not in line
        )
        log.unlink()
        self.generation += 1
        self.prepare()
        points = [(name, number) for name, count in calls.items() for number in range(1, count + 1)]
        for name, number in points[::step]:
            child = Child(self.new_save)
            tracer = attach(child.pid, "-o", os.devnull, "-e", f"inject={name}:signal=KILL:when={number}")
            child.go()
            child.wait()
            tracer.wait()
            self.judge()
            self.generation += 2
            self.prepare()
        return len(points[::step])


def attach(pid: int, *options: str) -> subprocess.Popen[str]:
    tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    while "attached" not in (line := tracer.stderr.readline()):
        assert line, "strace cannot attach"
    return tracer


# ------------------------------------------------------------------------------------------------ refusals of a disk


def refuse_everything(root: Path) -> Counter[str]:
    """Every operation × every errno × {once, persistent} × {exchange, in place}, over an existing checkpoint."""
    counts: Counter[str] = Counter()
    why_in_place = protocol.why_in_place
    for way in ("exchange", "in place"):
        if way == "in place":
            protocol.why_in_place = lambda folder, vfs: "asked for"
        for old, new in (("3 shards", "2 shards"), ("single", "3 shards")):
            folder = root / "refused" / "model"
            folder.parent.mkdir()
            save(folder, 1, old)
            recorded = Recording()
            save(folder, 2, new, vfs=recorded)
            for at in range(len(recorded.operations)):
                for code in ERRNOS:
                    for persistent in (False, True):
                        save(folder, 1, old)
                        vfs = Faulty(at, code, persistent=persistent)
                        committed = "yes"
                        try:
                            save(folder, 2, new, vfs=vfs)
                        except SaveError as error:
                            committed = error.committed
                        except Exception:
                            counts["untyped error"] += 1
                        counts[f"committed {committed}"] += 1
                        found = state(folder)
                        if found not in {"no": (1,), "yes": (2,)}.get(committed, (1, 2)):
                            counts["lost"] += 1
                        save(folder, 4, old)
                        if leftovers(folder):
                            counts["leftovers"] += 1
            shutil.rmtree(folder.parent)
    protocol.why_in_place = why_in_place
    return counts


# ------------------------------------------------------------------------------------------------ transformers


def baseline(root: Path, kills: int) -> Counter[str]:
    """`save_pretrained` over an existing checkpoint of as many shards, killed likewise. Every weight says of which save it is."""
    import torch
    from safetensors.numpy import load_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    shape = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    kept, folder = root / "kept", root / "transformers"
    limit = sum(one.numel() * 4 for one in model.parameters()) // 6 + 70_000

    def fill(value: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)

    def look() -> str:
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            values = {name: value for shard in set(index.values()) for name, value in load_file(folder / shard).items()}
            assert set(values) == set(index)
            seen = {float(number) for value in values.values() for number in (value.min(), value.max())}
        except Exception:
            return "unloadable"
        return {frozenset({1.0}): "old", frozenset({2.0}): "new"}.get(frozenset(seen), "mixed")

    fill(1.0)
    model.save_pretrained(kept, max_shard_size=limit)
    fill(2.0)
    times = []
    for _ in range(9):
        child = Child(lambda: model.save_pretrained(folder, max_shard_size=limit))
        began = time.perf_counter()
        child.go()
        child.wait()
        times.append(time.perf_counter() - began)
    files = list(kept.glob("*.safetensors"))
    counts = Counter({"shards": len(files), "bytes": sum(file.stat().st_size for file in files)})
    for _ in range(kills):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        child = Child(lambda: model.save_pretrained(folder, max_shard_size=limit))
        child.go()
        time.sleep(random.random() * 1.3 * statistics.median(times))
        child.kill()
        child.wait()
        counts[look()] += 1
        counts["temporary files left"] += len([one for one in os.listdir(folder) if one.startswith(".tmp")])
    return counts


# ------------------------------------------------------------------------------------------------ all of it

GOOD = ("old", "new", "reads")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--kills", type=int, default=13_000, help="in all, at random instants")
    options.add_argument("--quick", action="store_true", help="some kills of every kind, nothing written")
    options.add_argument("--baseline", type=int, default=300, help="kills of transformers' save_pretrained")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", help="where to save; a temporary folder by default")
    options.add_argument("--out", default="kill", help="name of the file in benchmarks/results")
    given = options.parse_args()
    random.seed(given.seed)
    has_strace = shutil.which("strace") is not None
    root = Path(tempfile.mkdtemp(prefix=f"modelrig-kill-{os.getpid()}-", dir=given.folder))
    rows: list[dict[str, Any]] = []
    began = time.time()
    try:
        for name in SCENARIOS:
            with Run(name, root) as run:
                kills = given.kills // len(SCENARIOS)
                seconds = run.kill_at_random(kills)
                calls = 0
                if has_strace and "savers" not in name and (not given.quick or name in ("fewer shards", "a shell in it")):
                    calls = run.kill_at_every_system_call(40 if given.quick else 1)
                rows.append({"scenario": name, "kills": kills, "system calls": calls, "ms": round(1000 * seconds, 1), **run.counts})
                print(rows[-1], *run.examples, sep="\n  ", file=sys.stderr, flush=True)
        refused = {} if given.quick else refuse_everything(root)
        print(dict(refused), file=sys.stderr, flush=True)
        compared = baseline(root, given.baseline) if given.baseline and not given.quick else {}
    finally:
        shutil.rmtree(root, ignore_errors=True)
    wrong = sum(
        count for row in rows for kind, count in row.items() if kind not in ("scenario", "kills", "system calls", "ms", *GOOD)
    )
    wrong += sum(count for kind, count in refused.items() if not kind.startswith("committed"))
    figures = {
        "kills": sum(row["kills"] for row in rows),
        "system_calls": sum(row["system calls"] for row in rows),
        "wrong": wrong,
        "seconds": round(time.time() - began),
        "strace": has_strace,
        "scenarios": rows,
        "refused": dict(refused),
        "transformers": dict(compared),
    }
    if given.quick:
        print(json.dumps({**figures, "pid": os.getpid()}))
        return int(wrong > 0)
    from benchmarks.common import table, write

    write(given.out, figures)
    columns = ("scenario", "kills", "system calls", "ms", "old", "new", "mixed", "unloadable", "foreign lost", "leftovers")
    others = sorted({key for row in rows for key in row} - set(columns))
    print(table([*columns, *others], [[row.get(column, 0) for column in (*columns, *others)] for row in rows]))
    print("refused by the disk:", dict(refused))
    print("transformers:", dict(compared))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
