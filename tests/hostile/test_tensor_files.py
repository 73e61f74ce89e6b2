"""Checkpoints made to do harm: each ends in one typed error that names the file, soon, in bounded memory, leaving nothing behind.

Each runs in a process of its own: what hangs or eats memory must not take the tests with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tensorfiles import describe, encode, write_sharded, write_valid

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
MEBIBYTE = 1 << 20

#: what the child does: catalogue the folder with its address space limited, and tell what came of it
CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.modules["torch"] = None
from modelrig.components import Snapshot
from modelrig.errors import ModelrigError
from modelrig_plugins.formats.safetensors import SafetensorsPlanner

folder, room = Path(sys.argv[1]), int(sys.argv[2])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
started = time.perf_counter()
told = {}
try:
    SafetensorsPlanner.catalog(Snapshot(reference="hostile", root=folder, source="local"))
except ModelrigError as error:
    told = {**error.to_json(), "text": str(error)}
print(json.dumps({**told, "seconds": time.perf_counter() - started, "opened": opened}))
"""


@frozen
class Hostile:
    """A folder to build, and what must be said of it. `file` is the one to be named; `room` is the memory it may take."""

    build: Callable[[Path], Any]
    code: str
    says: str
    file: str = SINGLE
    room: int = 64 * MEBIBYTE


def single(raw: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / SINGLE).write_bytes(raw)


def sparse(size: int, beginning: bytes) -> Callable[[Path], Any]:
    """A file of `size` bytes that takes no room on disk."""

    def build(folder: Path) -> None:
        with (folder / SINGLE).open("wb") as file:
            file.write(beginning)
            for length in (size, 1 << 43, 1 << 40):  # as large as this file system can
                with suppress(OSError):
                    file.truncate(length)
                    break

    return build


def one_tensor(**changes: Any) -> bytes:
    header = describe(weight=("F32", [4]))
    header["weight"].update(changes)
    return encode(header, 16)


def with_shards(edit: Callable[[Path, dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Two valid shards and their index, then an edit of the folder and the decoded index."""

    def build(folder: Path) -> None:
        write_sharded(folder, {SHARD: ["a", "b"], OTHER: ["c"]})
        table = json.loads((folder / INDEX).read_text())
        edit(folder, table["weight_map"])
        (folder / INDEX).write_text(json.dumps(table))

    return build


def placing(shard: str) -> Callable[[Path], Any]:
    return with_shards(lambda folder, weight_map: weight_map.update(a=shard))


def beside(folder: Path) -> None:
    """An index that names a valid file outside the folder, reached by going up."""
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    write_valid(outside, a=("F32", [2, 3]), b=("F32", [2, 3]))
    placing(f"../{outside.name}")(folder)


def linking(folder: Path, weight_map: dict[str, str]) -> None:
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)


def many_tensors(count: int) -> bytes:
    entry = b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    return encode(b"{" + b",".join(entry % (n, n, n + 1) for n in range(count)) + b"}", count)


big_length = (100_000_001).to_bytes(8, "little")
brackets_8_mb = b'{"a": ' + b"[" * (8 * MEBIBYTE)
quotes_8_mb = b'{"a": ' + b'"[' * (4 * MEBIBYTE)

one_range_twice = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{"dtype":"I32","shape":[4],"data_offsets":[0,16]}}'
half_over_another = {**describe(a=("F32", [4])), "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}
LEAVES = "leaves the checkpoint's folder"
lfs_pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n"

CASES = {
    # headers
    "length of 2^64 - 1": Hostile(single(b"\xff" * 8 + b"{}"), "ST-HDRLEN", "18,446,744,073,709,551,615"),
    "length beyond the file": Hostile(single((1 << 40).to_bytes(8, "little") + b"{}"), "ST-HDRLEN", "the file has 10 bytes"),
    "header of 100 MB and one byte": Hostile(sparse(100_000_100, big_length + b"{"), "ST-HDRBIG", "100,000,000"),
    "header of zeros as long as allowed": Hostile(
        sparse(100_000_100, (100_000_000).to_bytes(8, "little") + b"{"), "ST-JSON", "line 1", room=1024 * MEBIBYTE
    ),
    "file of exabytes": Hostile(sparse((1 << 63) - 1, one_tensor()), "ST-TRAIL", "belong to none"),
    "tensor of exabytes": Hostile(single(one_tensor(shape=[1 << 40], data_offsets=[0, 1 << 42])), "ST-TRUNC", "ends at byte"),
    "shape that overflows": Hostile(single(one_tensor(shape=[1 << 40] * 16)), "ST-OVERFLOW", "too large to exist"),
    "shape of a million dimensions": Hostile(single(one_tensor(shape=[1] * 1_000_000)), "ST-SHAPE", "1000000 dimensions"),
    "offsets of 5,000 digits": Hostile(
        single(encode(b'{"w":{"dtype":"U8","shape":[],"data_offsets":[0,' + b"9" * 5000 + b"]}}")), "ST-JSON", "5000 digits"
    ),
    "a million levels": Hostile(single(encode(b'{"a":' * 1_000_000)), "ST-DEPTH", "nested more than 8"),
    "8 MB of brackets": Hostile(single(encode(brackets_8_mb)), "ST-DEPTH", "nested", room=128 * MEBIBYTE),
    "8 MB of quotes": Hostile(single(encode(quotes_8_mb)), "ST-DEPTH", "nested", room=128 * MEBIBYTE),
    "8 MB of closed brackets": Hostile(
        single(encode(b'{"a":[' + b"[]," * (2 * MEBIBYTE) + b"0]}")), "ST-FIELD", "object with dtype", room=512 * MEBIBYTE
    ),
    "a name of 1 MB": Hostile(single(encode(describe(**{"x" * MEBIBYTE: ("U8", [2])}), 1)), "ST-TRUNC", "x" * 100),
    "a name with a terminal's escapes": Hostile(
        single(encode(describe(**{"\x1b]0;owned\x07": ("U8", [2])}), 1)), "ST-TRUNC", "\\x1b]0;"
    ),
    "a dtype of 1 MB": Hostile(single(one_tensor(dtype="F" * MEBIBYTE)), "ST-DTYPE", "known are"),
    "a program as dtype": Hostile(single(one_tensor(dtype="__import__('os').system('id')")), "ST-DTYPE", "known are"),
    "duplicate tensor of another dtype": Hostile(single(encode(one_range_twice, 16)), "ST-DUPKEY", "named twice"),
    "overlapping tensors": Hostile(single(encode(half_over_another, 24)), "ST-OVERLAP", "'a'"),
    "cut in half": Hostile(single(encode(describe(a=("F32", [64]), b=("F32", [64])), 200)), "ST-TRUNC", "ends at byte"),
    "a pointer of git-lfs": Hostile(single(lfs_pointer), "ST-MAGIC", "git lfs pull"),
    # files that are none
    "a pipe": Hostile(lambda folder: os.mkfifo(folder / SINGLE), "IO-TYPE", "named pipe"),
    "a folder": Hostile(lambda folder: (folder / SINGLE).mkdir(), "IO-TYPE", "a folder"),
    "an endless device": Hostile(lambda folder: (folder / SINGLE).symlink_to("/dev/zero"), "IO-PATH", LEAVES),
    "a link to itself": Hostile(lambda folder: (folder / SINGLE).symlink_to(SINGLE), "IO-READ", "cannot be read"),
    "a link to nothing": Hostile(lambda folder: (folder / SINGLE).symlink_to("gone"), "IO-READ", "points to nothing"),
    # indexes
    "an index going up": Hostile(beside, "IX-PATH", "plain file name", INDEX),
    "an index with a path from the root": Hostile(placing("/etc/passwd"), "IX-PATH", "/etc/passwd", INDEX),
    "an index with a Windows path": Hostile(placing("C:\\Windows\\x.safetensors"), "IX-PATH", "plain file name", INDEX),
    "an index that names itself": Hostile(placing(INDEX), "IX-TYPE", "not the name of a .safetensors file", INDEX),
    "an index that names a pickle": Hostile(placing("evil.bin"), "IX-TYPE", "not the name of a .safetensors file", INDEX),
    "an index that names a pipe": Hostile(
        with_shards(lambda folder, weight_map: (os.mkfifo(folder / "p.safetensors"), weight_map.update(a="p.safetensors"))),
        "IO-TYPE", "named pipe", "p.safetensors"),
    "a shard that links out": Hostile(with_shards(linking), "IO-PATH", LEAVES, SHARD),
    "a shard that is missing": Hostile(
        with_shards(lambda folder, _: (folder / OTHER).unlink()), "IX-MISSING", f"{OTHER} (1 tensors)", INDEX
    ),
    "a tensor the shard lacks": Hostile(placing(OTHER), "IX-NOTENSOR", f"{SHARD} has it", INDEX),
    "a tensor in two shards": Hostile(
        with_shards(lambda folder, _: (folder / OTHER).write_bytes((folder / SHARD).read_bytes())), "IX-DUP", OTHER, INDEX
    ),
    "an index of a million levels": Hostile(
        lambda folder: (folder / INDEX).write_bytes(b'{"a":' * 1_000_000), "IX-LIMIT", "nested", INDEX
    ),
    "an index larger than the limit": Hostile(
        lambda folder: ((folder / INDEX).touch(), os.truncate(folder / INDEX, 1 << 40)), "IX-LIMIT", "bytes", INDEX
    ),
    "an index that is a pipe": Hostile(lambda folder: os.mkfifo(folder / INDEX), "IO-TYPE", "named pipe", INDEX),
}  # fmt: skip


def state_of(folder: Path) -> dict[str, Any]:
    """Everything in a folder: kind, size, time, and the content where it is small."""

    def digest(path: Path) -> Any:
        is_small = path.is_file() and path.stat().st_size < MEBIBYTE
        return hashlib.sha256(path.read_bytes()).hexdigest() if is_small else None

    return {
        str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns, digest(path))
        for path in folder.rglob("*")
    }


def catalogue(folder: Path, room: int) -> dict[str, Any]:
    """What a child process with that much memory to spare says of the folder; its TMPDIR and HOME are watched."""
    home = folder.parent / f"{folder.name}-home"
    home.mkdir()
    environment = {**os.environ, "TMPDIR": str(home), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(room)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=environment, check=False,
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)
    assert [] == list(home.iterdir())
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_checkpoint_ends_in_one_typed_error(tmp_path, case):
    hostile = CASES[case]
    folder = tmp_path / "model"
    folder.mkdir()
    hostile.build(folder)
    before = state_of(tmp_path)
    told = catalogue(folder, hostile.room)
    assert (hostile.code, str(folder / hostile.file)) == (told["code"], told["path"])
    assert hostile.says in told["text"]
    assert "\x1b" not in told["text"]
    assert len(told["text"]) < 2000
    assert told["seconds"] < 2
    assert before == {path: seen for path, seen in state_of(tmp_path).items() if "model-home" not in path}
    assert all(str(folder) in path for path in told["opened"] if path.endswith((".safetensors", ".bin", "passwd", "zero"))), told[
        "opened"
    ]


def test_a_large_honest_checkpoint_is_no_hostile_one(tmp_path):
    """The limits must not hit what is merely large: 100,000 tensors in one file, in a fraction of the hostile cases' memory."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / SINGLE).write_bytes(many_tensors(100_000))
    told = catalogue(tmp_path / "model", 256 * MEBIBYTE)
    assert (None, True) == (told.get("code"), told["seconds"] < 2)


def test_more_tensors_than_the_limit_are_refused_in_linear_time(tmp_path):
    (tmp_path / "model").mkdir()
    raw = many_tensors(1_000_002)
    (tmp_path / "model" / SINGLE).write_bytes(raw)
    told = catalogue(tmp_path / "model", 8 * len(raw) + 64 * MEBIBYTE)
    assert ("ST-COUNT", True) == (told["code"], told["seconds"] < 10)


def test_each_code_of_headers_and_indexes_has_a_test_that_raises_it():
    from modelrig.errors import CODES

    names = ("checkpoint/test_headers.py", "checkpoint/test_index.py", "checkpoint/test_catalog.py", "hostile/test_tensor_files.py")
    told = "".join((Path(__file__).parents[1] / name).read_text() for name in names)
    assert [] == [code for code in CODES if code.startswith(("ST-", "IX-")) and f'"{code}"' not in told]
