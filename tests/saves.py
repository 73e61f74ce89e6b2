"""Tiny checkpoints whose every byte says of which save it is, and judges that know nothing of how they were saved."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from modelrig.checkpoint.saving.protocol import SaveReport, save_checkpoint
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.components import Snapshot, StoredTensor
from modelrig_plugins.formats.pytorch_bin import PytorchBinPlanner
from modelrig_plugins.formats.safetensors import SafetensorsPlanner

TENSORS, SHAPE = 6, (8, 8)
NBYTES = 8 * 8 * 4

#: layout → max_shard_size that makes it of six tensors
LAYOUTS = {"single": TENSORS * NBYTES, "2 shards": 3 * NBYTES, "3 shards": 2 * NBYTES, "6 shards": 1}


def tensors(count: int = TENSORS) -> list[StoredTensor]:
    return [StoredTensor(f"layer.{number}.weight", "float32", SHAPE) for number in range(count)]


def filled(generation: int) -> Callable[[StoredTensor], Iterator[np.ndarray]]:
    """A reader: every value is the number of the save, in two parts."""

    def read(tensor: StoredTensor) -> Iterator[np.ndarray]:
        values = np.full(tensor.shape, generation, dtype=tensor.dtype)
        yield values[:1]
        yield values[1:]

    return read


def save(target: Path, generation: int, layout: str = "3 shards", **options: Any) -> SaveReport:
    """Save number `generation`: its tensors, its config, and one small file that only saves of an even number have."""
    files = {"config.json": json.dumps({"generation": generation}).encode()}
    if generation % 2 == 0:
        files["generation_config.json"] = json.dumps({"generation": generation}).encode()
    format_ = options.pop("format", SafetensorsPlanner)
    options = {"files": files, "max_shard_size": LAYOUTS[layout], **options}
    return save_checkpoint(target, tensors(), filled(generation), format_, **options)


def save_bin(target: Path, generation: int, layout: str = "3 shards", **options: Any) -> SaveReport:
    return save(target, generation, layout, format=PytorchBinPlanner, **options)


# ------------------------------------------------------------------------------------------------ judges


def first_file(folder: Path) -> Path | None:
    """Where transformers starts: the first of these that `os.path.isfile`."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    if file.name.endswith(".safetensors"):
        return load_file(file)
    import torch

    return {name: value.numpy() for name, value in torch.load(file, weights_only=True).items()}


def state(folder: Path) -> int | str:
    """The number of the save a reader sees; "absent", or "mixed ..." or "unloadable ..." with what it saw."""
    if not folder.is_dir():
        return "absent"
    try:
        config = json.loads((folder / "config.json").read_text())["generation"]
        first = first_file(folder)
        if first is None:
            return "unloadable: no tensor file"
        shards = [first]
        if first.name.endswith(".json"):
            shards = sorted({folder / name for name in json.loads(first.read_text())["weight_map"].values()})
        found: dict[str, float] = {}
        for shard in shards:
            for name, value in read_tensors(shard).items():
                assert value.min() == value.max(), name
                assert name not in found, name
                found[name] = float(value.min())
        small = folder / "generation_config.json"
        extra = json.loads(small.read_text())["generation"] if small.is_file() else None
    except Exception as error:
        return f"unloadable: {type(error).__name__}: {error}"
    if {tensor.name for tensor in tensors()} != set(found):
        return f"unloadable: {sorted(found)}"
    seen = {config, *found.values(), *([extra] if extra is not None else [])}
    if len(seen) > 1 or (extra is None) != (config % 2 == 1):
        return f"mixed: config {config}, generation_config {extra}, tensors {sorted(set(found.values()))}"
    return int(config)


def our_state(folder: Path) -> int | str:
    """`state`, asked of our own catalog: which files it would read, and what they hold."""
    planner: Any = SafetensorsPlanner
    snapshot = Snapshot(reference=str(folder), root=folder, source="local")
    if planner.claims(snapshot) is None:
        planner = PytorchBinPlanner
    found = set()
    catalog = planner.catalog(snapshot)
    assert {tensor.name for tensor in tensors()} == set(catalog.entries)
    for entry in catalog.entries.values():
        with open(catalog.files[entry.file].path, "rb") as file:
            file.seek(entry.offset)
            found |= set(np.frombuffer(file.read(entry.nbytes), dtype="float32").tolist())
    config = json.loads((folder / "config.json").read_text())["generation"]
    return int(config) if {float(config)} == found else f"mixed: config {config}, tensors {found}"


def leftovers(folder: Path) -> list[str]:
    """What a save has left in the folder or beside it that is no part of a checkpoint."""
    found = [name for name in os.listdir(folder.parent) if name.startswith(f".{folder.name}.")]
    if folder.is_dir():
        found += [name for name in os.listdir(folder) if name.startswith(".modelrig") or os.path.islink(folder / name)]
    return sorted(found)


def tree(folder: Path) -> Mapping[str, bytes | None]:
    """Every path below `folder` and its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink() or path.exists()
    }


# ------------------------------------------------------------------------------------------------ faults


class Recording(Vfs):
    """Counts operations, and keeps track of what is open."""

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.open_descriptors: set[int] = set()

    def call(self, operation: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
        self.operations.append(f"{operation} {path.name}")
        value = super().call(operation, path, action, *arguments)
        if operation in ("create", "open"):
            self.open_descriptors.add(value)
        elif operation == "close":
            self.open_descriptors.discard(arguments[0])
        return value

    def end_process(self) -> None:
        for descriptor in self.open_descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Faulty(Recording):
    """The `at`-th operation fails, or every one from it on. With `done` it has happened all the same, as a disk may report it."""

    def __init__(self, at: int, code: int, *, persistent: bool = False, done: bool = False) -> None:
        super().__init__()
        self.at, self.code, self.persistent, self.done = at, code, persistent, done
        self.failed: list[str] = []

    def call(self, operation: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
        number = len(self.operations)
        if number == self.at or (self.persistent and number > self.at):
            if operation == "close" or self.done:
                super().call(operation, path, action, *arguments)
                if operation in ("create", "open"):
                    os.close(max(self.open_descriptors))
                    self.open_descriptors.discard(max(self.open_descriptors))
            else:
                self.operations.append(f"{operation} {path.name}")
            self.failed.append(operation)
            raise OperationError(operation, path, OSError(self.code, os.strerror(self.code)))
        return super().call(operation, path, action, *arguments)


class Killed(BaseException):
    """The process ends here."""


class Kill(Recording):
    """Nothing happens any more from the `at`-th operation on, not even cleaning up: what a SIGKILL leaves."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def call(self, operation: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
        if len(self.operations) >= self.at:
            raise Killed
        return super().call(operation, path, action, *arguments)


#: what a disk may answer
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
