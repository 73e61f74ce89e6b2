"""Pickles and archives made to do harm: each ends in one typed error that names the file, soon, and in little memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen

from binfiles import Member, archive, called, checkpoint, mapping, number, one_tensor, saved, storage, tensor, text, whole, word
from commands import MEBIBYTE, Command, run_commands
from hostile_checkpoints import write_checkpoint

SINGLE = "pytorch_model.bin"


@frozen
class Hostile:
    """What the file holds, and what must be said of it. `room` is the memory it may take."""

    build: bytes | Callable[[Path], Any]
    code: str
    says: str = ""
    room: int = 64 * MEBIBYTE


def marking(path: str) -> bytes:
    """A pickle that makes the file `path` when Python's unpickler reads it."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {path}",)

    return pickle.dumps({"w": Evil()}, protocol=2)


def calling(module: str, name: str, *arguments: bytes) -> bytes:
    return checkpoint(whole(mapping(w=called(word(module, name), *arguments))))


def sparse_pickle(path: Path) -> None:
    """Two GiB of opcodes that take no room on disk."""
    raw = archive(Member("archive/data.pkl", nbytes=1 << 31, crc=0), start=(1 << 31) + 46)
    with path.open("wb") as file:
        file.write(raw[:46])
        file.seek((1 << 31) + 46)
        file.write(raw[46:])


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("archive/data.pkl", "w") as member:
        for _ in range(512):
            member.write(bytes(MEBIBYTE))


def with_zip64(*fields: tuple[int, bytes]) -> bytes:
    """torch's own file with numbers of its zip64 end record changed: (position, eight bytes)."""
    raw = bytearray(saved({"w": torch.ones(3)}))
    begin = raw.rindex(b"PK\6\6")
    for at, value in fields:
        raw[begin + at : begin + at + 8] = value
    return bytes(raw)


most = b"\xff" * 8

CASES = {
    "os.system": Hostile(checkpoint(marking("harm")), "PK-GLOBAL", "system"),
    "eval": Hostile(calling("builtins", "eval", text("open('harm', 'w')")), "PK-GLOBAL", "builtins.eval"),
    "resolve_name": Hostile(calling("pkgutil", "resolve_name", text("os:system")), "PK-GLOBAL", "pkgutil.resolve_name"),
    "a module that is there to be imported": Hostile(calling("harm", "run"), "PK-GLOBAL", "harm.run"),
    "a gibibyte of bytearray": Hostile(calling("builtins", "bytearray", number(1 << 30)), "PK-GLOBAL", "bytearray"),
    "a gibibyte of tensor": Hostile(calling("torch", "Tensor", number(1 << 28)), "PK-REDUCE", "torch.Tensor"),
    "a gibibyte of storage": Hostile(calling("torch.storage", "UntypedStorage", number(1 << 30)), "PK-REDUCE", "UntypedStorage"),
    "a terabyte of one number": Hostile(
        checkpoint(one_tensor(shape=(1 << 39,), strides=(0,), of=storage(numel=6))), "PK-STRIDE", "not dense"
    ),
    "a storage of exabytes": Hostile(checkpoint(one_tensor(of=storage(numel=1 << 61))), "ZP-SIZE", "24 bytes"),
    "a hundred million opcodes": Hostile(checkpoint(whole(b"N" * 100_000_000)), "PK-LIMIT", "100,000,003 bytes"),
    "as many as are accepted": Hostile(checkpoint(whole(b"N" * 4_000_000)), "PK-BAD", "belongs to nothing"),
    "gibibytes of pickle": Hostile(sparse_pickle, "PK-LIMIT", "2,147,483,648 bytes"),
    "tuples two million deep": Hostile(checkpoint(whole(b")" + b"\x85" * 2_000_000)), "PK-LIMIT", "tuples"),
    "marks two million deep": Hostile(checkpoint(whole(b"(" * 2_000_000)), "PK-LIMIT", "deep"),
    "millions of lists": Hostile(checkpoint(whole(b"]" * 4_000_000)), "PK-LIMIT", "lists"),
    "a key as deep as allowed": Hostile(
        checkpoint(whole(b"})" + b"\x85" * 1000 + b"Ns" + b"N" * 9000)), "PK-KEY", "a tuple"
    ),
    "a string as long as none": Hostile(checkpoint(b"\x80\x02X\xff\xff\xff\xff."), "PK-TRUNC", "4,294,967,295 bytes"),
    "memo four billion": Hostile(checkpoint(b"\x80\x02Nr\xff\xff\xff\xff."), "PK-LIMIT", "4,294,967,295"),
    "a shape of a hundred thousand dimensions": Hostile(
        checkpoint(one_tensor(shape=(1,) * 100_000, strides=(1,) * 100_000)), "PK-LIMIT", "100,000 dimensions"
    ),
    "a name of a megabyte": Hostile(
        checkpoint(whole(mapping(**{"x" * MEBIBYTE: tensor(offset=9)}))), "PK-STRIDE", "x" * 100
    ),
    "a name of control characters": Hostile(
        checkpoint(whole(mapping(**{"\x1b[2J\0": tensor(offset=9)}))), "PK-STRIDE", "\\x1b[2J\\x00"
    ),
    "half a gibibyte in half a megabyte": Hostile(deflated, "ZP-METHOD", "archive/data.pkl"),
    "entries without number": Hostile(with_zip64((24, most), (32, most)), "ZP-DIRECTORY", "18,446,744,073,709,551,615"),
    "a directory of exabytes": Hostile(with_zip64((40, most)), "ZP-DIRECTORY", "18,446,744,073,709,551,615"),
    "a thousand records of one name": Hostile(
        archive(*[Member("archive/data.pkl")] * 1000), "ZP-DUP", "archive/data.pkl"
    ),
    "a record for every tensor there could be": Hostile(
        archive(Member("archive/data.pkl", b"\x80\x02}."), *(Member(f"archive/x/{n}") for n in range(20_000)), Member("../harm")),
        "ZP-NAME", "../harm",
    ),
    "a tar of the first versions": Hostile(bytes(257) + b"ustar\x0000" + bytes(255), "PK-LEGACY", "tar"),
    "a pickle without an archive": Hostile(marking("harm"), "PK-LEGACY", "without executing"),
    "text": Hostile(b"<html>", "ZP-MAGIC", "HTML"),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    commands, folders = [], []
    for number_, case in enumerate(CASES.values()):
        folder = write_checkpoint(tmp_path_factory.mktemp("hostile") / f"model-{number_}")
        (folder / "model.safetensors").unlink()
        (folder / "harm.py").write_text("import os; os.system('touch harm')")
        if callable(case.build):
            case.build(folder / SINGLE)
        else:
            (folder / SINGLE).write_bytes(case.build)
        folders.append(folder)
        commands.append(Command(["inspect", str(folder)], folder=str(folder), cwd=str(folder), room=case.room))
    return dict(zip(CASES, zip(folders, run_commands(commands), strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_ends_in_one_typed_error_and_runs_nothing(told: dict[str, tuple[Path, Any]], name: str) -> None:
    case, (folder, seen) = CASES[name], told[name]
    assert (1, []) == (seen.code, seen.harm())
    assert seen.err.startswith(f"Error: [{case.code}] {folder / SINGLE}: ")
    assert case.says in seen.err
    assert not (folder / "harm").exists()


def test_the_pickles_made_here_would_do_harm_to_who_runs_them(tmp_path: Path) -> None:
    pickle.loads(marking(str(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_no_variable_makes_it_run_a_pickle(tmp_path: Path, variable: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / SINGLE).write_bytes(checkpoint(marking(str(tmp_path / "harm"))))
    done = subprocess.run(
        [sys.executable, "-m", "modelrig", "inspect", str(folder)],
        env={**os.environ, variable: "1"},
        capture_output=True,
        text=True,
    )
    assert (1, True) == (done.returncode, "PK-GLOBAL" in done.stderr)
    assert not (tmp_path / "harm").exists()


def test_what_trainers_and_other_formats_leave_beside_the_weights_is_never_opened(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    beside = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", ".metadata", "x.pkl")
    for name in beside:
        os.mkfifo(folder / name)  # whoever opens it waits for ever
    (seen,) = run_commands([Command(["inspect", str(folder)], folder=str(folder))])
    assert (0, []) == (seen.code, seen.harm())
    assert "pytorch_model.bin is not used" in seen.out


def test_a_checkpoint_of_a_hundred_thousand_tensors_is_catalogued_in_bounded_memory(tmp_path: Path) -> None:
    from modelrig.components import StoredTensor
    from modelrig_plugins.formats.pytorch_bin import PytorchBinPlanner

    folder = write_checkpoint(tmp_path / "model", model_type="unheard_of")
    (folder / "model.safetensors").unlink()
    many = [StoredTensor(f"model.layers.{number}.weight", "bfloat16", (2, 3)) for number in range(100_000)]
    with (folder / SINGLE).open("wb") as file:
        PytorchBinPlanner.write(many, {}, lambda _: [bytes(12)], file.write)
    (seen,) = run_commands([Command(["inspect", str(folder)], folder=str(folder), room=512 * MEBIBYTE)])
    assert (0, True) == (seen.code, "100,000 tensors" in seen.out)
    assert not [harm for harm in seen.harm() if not harm.startswith("took")]


def test_the_metadata_of_a_state_dict_is_thrown_away(tmp_path: Path) -> None:
    attributes = b"}" + text("_metadata") + called(word("collections", "OrderedDict")) + b"sb"
    root = called(word("collections", "OrderedDict")) + b"(" + text("w") + tensor() + b"u" + attributes
    folder = write_checkpoint(tmp_path / "model", model_type="unheard_of")
    (folder / "model.safetensors").unlink()
    (folder / SINGLE).write_bytes(checkpoint(whole(root)))
    (seen,) = run_commands([Command(["inspect", str(folder)], folder=str(folder))])
    assert (0, []) == (seen.code, seen.harm())
