"""Files of a checkpoint that are no files, or lie elsewhere: one rule for all of them, whoever reads them.

A link may stay in the folder, or lead to the blobs of the hub's cache. What leaves is refused before it is opened, and what is no
regular file is never waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelrig
from commands import MEBIBYTE, Command, Told, run_commands
from hostile_checkpoints import write, write_checkpoint
from modelrig.errors import ModelrigError

PLANNED = ("config.json", "generation_config.json", "model.safetensors")
LOADED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/x.jinja",
)
LIMITS = {"config.json": "CF-LIMIT", "generation_config.json": "CF-LIMIT", "model.safetensors": "ST-TRAIL"}


def beside(path: Path) -> Path:
    """A place outside the checkpoint's folder."""
    folder = next(parent for parent in path.parents if parent.name == "model")
    return folder.parent / f"outside-{path.name}"


def move_out(path: Path) -> None:
    """The file's content lies beside the folder, and a link in its place."""
    outside = beside(path)
    path.rename(outside)
    path.symlink_to(outside)


def link(target: str) -> Callable[[Path], Any]:
    def build(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return build


def through_a_folder(path: Path) -> None:
    """A link that stays in the folder by its name, through a folder that is a link out."""
    outside = beside(path)
    outside.mkdir()
    path.rename(outside / "x")
    (path.parent / "sub").symlink_to(outside)
    path.symlink_to("sub/x")


def sparse(path: Path) -> None:
    os.truncate(path, 4 << 30)


def replace(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: (path.unlink(), make(path))


KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # what is done with the file, code, part of the message
    "a link to a file outside": (move_out, "IO-PATH", "leaves the checkpoint's folder"),
    "a link to passwords": (link("/etc/passwd"), "IO-PATH", "leaves the checkpoint's folder"),
    "a link to an endless device": (link("/dev/zero"), "IO-PATH", "leaves the checkpoint's folder"),
    "a link up": (link("../../../etc/passwd"), "IO-PATH", "leaves the checkpoint's folder"),
    "a link to nothing outside": (link("/nowhere/x"), "IO-PATH", "leaves the checkpoint's folder"),
    "a link through a folder": (through_a_folder, "IO-PATH", "leaves the checkpoint's folder"),
    "a link to nothing": (link("gone"), "IO-READ", "points to nothing"),
    "a link to itself": (lambda path: link(path.name)(path), "IO-READ", "symbolic links"),
    "a named pipe": (replace(os.mkfifo), "IO-TYPE", "a named pipe"),
    "a folder": (replace(Path.mkdir), "IO-TYPE", "a folder"),
    "four gigabytes": (sparse, "limit", ""),
}
#: a folder with a tensor file's name is not taken for one: there are no tensor files then
KEYS = [(kind, name) for kind in KINDS for name in (*PLANNED, *LOADED) if (kind, name) != ("a folder", "model.safetensors")]
#: which command meets the file first, and another one that must not do worse
COMMANDS = {**dict.fromkeys(PLANNED, ("plan", "run", "inspect")), **dict.fromkeys(LOADED, ("run", "chat", "plan"))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root, made = tmp_path_factory.mktemp("files"), {}
    for number, (kind, name) in enumerate(KEYS):
        folder = write_checkpoint(root / str(number) / "model")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write(path, {} if name.endswith(".json") else "x")
        KINDS[kind][0](path)
        made[kind, name] = folder
    return made


@pytest.fixture(scope="module")
def told(folders: dict[tuple[str, str], Path]) -> dict[tuple[str, str, str], Told]:
    keys = [(*key, command) for key in KEYS for command in COMMANDS[key[1]]]
    commands = []
    for kind, name, command in keys:
        folder = str(folders[kind, name])
        options = ["--max-new-tokens", "2"] if command in ("run", "chat") else []
        prompt = ["a b"] if command == "run" else []
        arguments = [command, folder, *prompt, *options]
        commands.append(Command(arguments, folder=folder, stdin="a\n" if command == "chat" else "", room=768 * MEBIBYTE))
    return dict(zip(keys, run_commands(commands, with_torch=True), strict=True))


def expected(kind: str, name: str) -> tuple[str, str]:
    _, code, says = KINDS[kind]
    return (LIMITS.get(name, "TK-LIMIT"), "") if code == "limit" else (code, says)


@pytest.mark.parametrize(("kind", "name"), KEYS)
def test_a_file_that_is_none_or_lies_elsewhere_is_one_typed_error(told: Any, folders: Any, kind: str, name: str) -> None:
    code, says = expected(kind, name)
    for command in COMMANDS[name][:2]:
        seen = told[kind, name, command]
        assert (1, "", []) == (seen.code, seen.out, seen.harm())
        assert seen.err.startswith(f"Error: [{code}] {folders[kind, name] / name}: ")
        assert says in seen.err


@pytest.mark.parametrize(("kind", "name"), KEYS)
def test_a_command_that_does_not_need_the_file_does_no_harm_either(told: Any, kind: str, name: str) -> None:
    seen = told[kind, name, COMMANDS[name][2]]
    needs_it = name in ("config.json", "model.safetensors")
    assert (1 if needs_it else 0, []) == (seen.code, seen.harm())


@pytest.mark.parametrize("name", [*PLANNED, *LOADED])
def test_python_raises_the_same(folders: Any, name: str) -> None:
    folder = folders["a link to a file outside", name]
    with pytest.raises(ModelrigError) as caught:
        modelrig.load(folder)
    assert ("IO-PATH", str(folder / name)) == (caught.value.code, caught.value.path)


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (seen,) = run_commands([Command(["plan", str(folder)])])  # without leave to read the folder
    assert [str(folder), str(folder / "config.json")] == sorted(seen.outside)[:2]
    assert seen.harm() != []


def test_a_folder_of_the_hubs_cache_may_link_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    folder = write_checkpoint(repository / "snapshots" / "main")
    write(folder / "special_tokens_map.json", {"eos_token": "a"})
    (folder / "additional_chat_templates").mkdir()
    write(folder / "additional_chat_templates" / "x.jinja", "x")
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = repository / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (tmp_path / "link").symlink_to(folder)
    commands = [
        Command([*arguments, "--max-new-tokens", "2", "--quiet"], folder=str(repository), stdin="a\n", room=768 * MEBIBYTE)
        for place in (folder, tmp_path / "link")
        for arguments in (["run", str(place), "a b"], ["chat", str(place)])
    ]
    for seen in run_commands(commands, with_torch=True):
        assert (0, "? ?\n", "", []) == (seen.code, seen.out, seen.err, seen.harm())


def test_the_templates_of_a_folder_are_counted_before_they_are_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    for number in range(101):
        (folder / "additional_chat_templates" / f"{number}.jinja").touch()
    with pytest.raises(ModelrigError) as caught:
        modelrig.load(folder)
    assert ("TK-LIMIT", str(folder / "additional_chat_templates")) == (caught.value.code, caught.value.path)
