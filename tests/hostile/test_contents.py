"""What only loading, generating or talking meets: weights, tokenizers, templates and side files made to hurt."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import Factory, frozen

import modelrig
from commands import MEBIBYTE, Command, Told, run_commands
from hostile_checkpoints import TEMPLATE, TOKENIZER, tensors, write, write_checkpoint
from modelrig.errors import LoadError, NotFiniteError
from tensorfiles import encode

STALLED = {"type": "Split", "pattern": {"Regex": "(.+)+$$x"}, "behavior": "Isolated", "invert": False}
GROWING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPECIAL = {"X": {"id": "X", "ids": [1] * 20_000, "tokens": ["a"] * 20_000}}
BOMB = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X"}}] * 20_000, "pair": [], "special_tokens": SPECIAL}


@frozen(kw_only=True)
class Case:
    """A checkpoint and what running it says. `file` is the one that is named; "" is none."""

    code: str
    file: str
    says: str = ""
    exit_code: int = 1
    files: dict[str, Any] = Factory(dict)
    changes: dict[str, Any] = Factory(dict)
    stored: Any = None
    after: Callable[[Path], Any] | None = None
    options: tuple[str, ...] = ()


def tokenizer(code: str, says: str = "", **parts: Any) -> Case:
    return Case(code=code, file="tokenizer.json", says=says, files={"tokenizer.json": {**TOKENIZER, **parts}})


def file(name: str, content: Any, code: str, says: str = "") -> Case:
    return Case(code=code, file=name, says=says, files={name: content})


def filled_with(value: float) -> Callable[[Path], None]:
    """Every weight is `value`."""

    def fill(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        path.write_bytes(raw[:start] + struct.pack("<f", value) * ((len(raw) - start) // 4))

    return fill


def not_finite(value: float, *options: str) -> Case:
    return Case(code="GN-NAN", file="", says="NaN or infinite", after=filled_with(value), options=options)


RUN = {
    # weights
    "weights of NaN": not_finite(float("nan")),
    "weights of NaN, sampled": not_finite(float("nan"), "--temperature", "1"),
    "weights of infinity": not_finite(float("inf")),
    "weights too large for the dtype": not_finite(3e38, "--dtype", "float16"),
    # tokenizer.json; more in test_tokenizer_files.py
    "a tokenizer that is no JSON": file("tokenizer.json", "<html>", "TK-JSON"),
    "a tokenizer that is a list": file("tokenizer.json", [], "TK-JSON"),
    "a tokenizer of a million levels": file("tokenizer.json", "[" * 1_000_000, "TK-JSON"),
    "a tokenizer with a key twice": file(
        "tokenizer.json", json.dumps(TOKENIZER)[:-1] + ', "normalizer": ' + json.dumps(GROWING) + "}", "TK-JSON", "normalizer: "
    ),
    "a tokenizer that panics when read": tokenizer(
        "TK-PANIC", model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["ab a"]}
    ),
    "a tokenizer that panics when used": tokenizer("TK-PANIC", pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a tokenizer that searches for ever": tokenizer("TK-PANIC", pre_tokenizer=STALLED),
    "a tokenizer with ids beyond the model": tokenizer(
        "TK-VOCAB", "id 16", model={**TOKENIZER["model"], "vocab": {"?": 0, "a": 16}}
    ),
    "a tokenizer whose texts grow": tokenizer("TK-LIMIT", "normalizer: ", normalizer=GROWING),
    "a tokenizer whose texts grow, written with escapes": file(
        "tokenizer.json", json.dumps({**TOKENIZER, "normalizer": GROWING}).replace('"Repl', '"\\u0052epl'), "TK-LIMIT",
        "normalizer: ",
    ),
    "a tokenizer of bytes of bytes": tokenizer(
        "TK-LIMIT", "pre_tokenizer: ",
        normalizer={"type": "Prepend", "prepend": "é"}, pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES] * 40},
    ),
    "a decoder whose texts grow": tokenizer(
        "TK-LIMIT", "decoder: ", decoder={"type": "Sequence", "decoders": GROWING["normalizers"]}
    ),
    "a post-processor of 400 million tokens": tokenizer("TK-LIMIT", "post_processor: ", post_processor=BOMB),
    # the files beside it
    "a tokenizer config that is a list": file("tokenizer_config.json", "[]", "TK-JSON"),
    "a tokenizer config of a million levels": file("tokenizer_config.json", '{"a":' * 1_000_000, "TK-LIMIT"),
    "a tokenizer config with NaN": file("tokenizer_config.json", '{"model_max_length": NaN}', "TK-JSON", "model_max_length: "),
    "a tokenizer config in UTF-16": file("tokenizer_config.json", "{}".encode("utf-16"), "TK-JSON"),
    "a token that is a number": file("special_tokens_map.json", {"eos_token": 5}, "TK-JSON", "eos_token: "),
    "a special tokens map with a key twice": file("special_tokens_map.json", '{"a": 1, "a": 2}', "TK-JSON", "a: "),
    "a template that is no text": file("chat_template.jinja", b"\xff", "TK-JSON"),
    "templates without names": file("chat_template.json", {"chat_template": [{"name": 1}]}, "TK-JSON", "chat_template: "),
    # generation_config.json
    "a generation config that is no object": file("generation_config.json", "[1]", "CF-JSON"),
    "a generation config with a key twice": file("generation_config.json", '{"eos_token_id": 1, "eos_token_id": 2}', "CF-DUPKEY"),
    **{
        f"eos_token_id {value!r}"[:40]: file("generation_config.json", json.dumps({"eos_token_id": value}), code, "eos_token_id: ")
        for value, code in (
            ("</s>", "CF-TYPE"), (1.5, "CF-TYPE"), (True, "CF-TYPE"), ({}, "CF-TYPE"), ([[1]], "CF-TYPE"), (1 << 40, "CF-RANGE"),
            ([1, -5], "CF-RANGE"), (10**400, "CF-JSON"), (float("nan"), "CF-JSON"),
        )
    },
}  # fmt: skip

#: templates that a conversation meets; more in test_chat_templates.py
CHAT = {
    "a template that loops": ("{% for i in range(99999999) %}{% for j in range(99999999) %}x{% endfor %}{% endfor %}", "TM-BUDGET"),
    "a template that calls itself": ("{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}", "TM-BUDGET"),
    "a template that grows": (
        "{% set x = namespace(v='a') %}{% for i in range(99) %}{% set x.v = x.v * 2 %}{% endfor %}{{ x.v }}", "TM-BUDGET"
    ),
    "a template that reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "TM-SANDBOX"),
    "a template that imports": ("{% import 'os' as os %}{{ os.system('touch owned') }}", "TM-SANDBOX"),
    "a template that includes": ("{% include '/etc/passwd' %}", "TM-SANDBOX"),
    "a template that is none": ("{% for %}", "TM-SYNTAX"),
    "a template that refuses": ("{{ raise_exception('\x1b[2Jno') }}", "TM-RAISED"),
    "a template that asks for what is not there": ("{{ messages[0].nothing.here }}", "TM-INPUT"),
}  # fmt: skip


def build(folder: Path, one: Case) -> Path:
    write_checkpoint(folder, None, one.stored, **one.changes)
    for name, content in one.files.items():
        write(folder / name, content)
    if one.after is not None:
        one.after(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contents")


@pytest.fixture(scope="module")
def ran(root: Path) -> dict[str, tuple[Path, Told]]:
    folders = {name: build(root / f"run{number}", one) for number, (name, one) in enumerate(RUN.items())}
    commands = [
        Command(
            ["run", str(folder), "a b c", "--max-new-tokens", "3", "--quiet", *RUN[name].options],
            folder=str(folder),
            room=768 * MEBIBYTE,
        )
        for name, folder in folders.items()
    ]
    told = run_commands(commands, with_torch=True)
    return {name: (folder, seen) for (name, folder), seen in zip(folders.items(), told, strict=True)}


@pytest.fixture(scope="module")
def talked(root: Path) -> dict[str, tuple[Path, Told]]:
    folders = {
        name: build(root / f"chat{number}", file("chat_template.jinja", source, code))
        for number, (name, (source, code)) in enumerate(CHAT.items())
    }
    commands = [
        Command(["chat", str(folder), "--max-new-tokens", "3", "--quiet"], folder=str(folder), stdin="a b\n", room=768 * MEBIBYTE)
        for folder in folders.values()
    ]
    told = run_commands(commands, with_torch=True)
    return {name: (folder, seen) for (name, folder), seen in zip(folders.items(), told, strict=True)}


@pytest.mark.parametrize("name", RUN)
def test_running_what_is_made_to_hurt_is_one_typed_error(ran: dict[str, tuple[Path, Told]], name: str) -> None:
    one, (folder, seen) = RUN[name], ran[name]
    assert (one.exit_code, "", []) == (seen.code, seen.out.strip("\n"), seen.harm())
    assert seen.err.startswith(f"Error: [{one.code}] " + (f"{folder / one.file}: " if one.file else ""))
    assert one.says in seen.err


@pytest.mark.parametrize("name", CHAT)
def test_talking_through_a_template_made_to_hurt_is_one_typed_error(talked: dict[str, tuple[Path, Told]], name: str) -> None:
    (folder, seen), (_, code) = talked[name], CHAT[name]
    assert (1, "", []) == (seen.code, seen.out.strip("\n"), seen.harm())
    assert seen.err.startswith(f"Error: [{code}] {folder / 'chat_template.jinja'}: ")


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    """Every way in which a checkpoint may name code, with code there to be found; the working directory is the folder."""
    evil = "import os, pathlib\npathlib.Path(__file__).with_name('owned').touch()\nraise SystemExit('owned')\n"
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    folder = write_checkpoint(
        tmp_path / "model",
        auto_map=names, custom_pipelines={"x": {"impl": "evil.Evil"}}, trust_remote_code=True, _attn_implementation="evil",
        attn_implementation="evil/kernels", _attn_implementation_internal="evil", use_kernels=True, kernel_config={"a": "evil"},
        base_model_name_or_path="/etc", tokenizer_class="evil.Evil", __class__="evil", plugin="evil", attention="evil",
    )  # fmt: skip
    config = {"auto_map": names, "tokenizer_class": "evil.Evil", "processor_class": "evil.Evil", "tokenizer_file": "/etc/passwd"}
    write(folder / "tokenizer_config.json", config)
    write(folder / "generation_config.json", {"custom_generate": "evil", "eos_token_id": 15, "cache_implementation": "evil"})
    (folder / "custom_generate").mkdir()
    for name in (
        "evil",
        "modeling_evil",
        "torch",
        "attrs",
        "modelrig",
        "sitecustomize",
        "conftest",
        "setup",
        "custom_generate/generate",
    ):
        write(folder / f"{name}.py", evil)
    before = sorted(folder.rglob("*"))
    commands = [
        Command([*arguments, "--max-new-tokens", "3", "--quiet"] if arguments[0] in ("run", "chat") else arguments,
                folder=str(folder), cwd=str(folder), stdin="a\n", room=768 * MEBIBYTE)
        for arguments in (["plan", "."], ["inspect", "."], ["run", ".", "a b"], ["chat", "."])
    ]  # fmt: skip
    for command, seen in zip(commands, run_commands(commands, with_torch=True), strict=True):
        assert (0, "", []) == (seen.code, seen.err, seen.harm()), command
    assert before == sorted(folder.rglob("*"))


def test_what_a_model_writes_does_not_steer_a_terminal(tmp_path: Path) -> None:
    """A vocabulary of escape sequences: into a pipe they go as they are, a terminal shows them as text."""
    vocab = {"\x1b]0;owned\x07": 0, "a": 1, "b": 2}
    parts = {"decoder": {"type": "Fuse"}, "model": {**TOKENIZER["model"], "vocab": vocab, "unk_token": "a"}}
    folder = build(tmp_path / "model", tokenizer("", **parts))
    command = [str(Path(sys.executable).with_name("modelrig")), "run", str(folder), "a b", "--max-new-tokens", "2", "--quiet"]
    piped = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout
    assert b"\x1b]0;owned\x07" * 2 + b"\n" == piped
    leader, terminal = os.openpty()
    try:
        subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, timeout=120, check=True)
        assert b"\\x1b]0;owned\\x07" * 2 + b"\r\n" == os.read(leader, 4096)
    finally:
        os.close(leader)
        os.close(terminal)


def test_the_installed_command_is_as_quiet_and_as_safe_in_that_folder(tmp_path: Path) -> None:
    """Without the watch and the fork: the process a user starts, in a folder with modules of names it imports."""
    folder = build(tmp_path / "model", RUN["a tokenizer that panics when used"])
    for name in ("torch", "numpy", "tokenizers", "attrs", "click", "modelrig", "sitecustomize", "usercustomize"):
        write(folder / f"{name}.py", "import pathlib\npathlib.Path(__file__).with_name('owned').touch()\n")
    before = sorted(folder.rglob("*"))
    for arguments, code, says in (
        (["plan", "."], 0, ""),
        (["plan", ".", "--dtype", "load"], 2, "Error: [RQ-VALUE] dtype: "),
        (["plan", ".", "--max-memory", "1KB"], 3, "Error: [RL-MEM] "),
        (["run", ".", "a b"], 1, f"Error: [TK-PANIC] {folder / 'tokenizer.json'}: "),
    ):
        command = [str(Path(sys.executable).with_name("modelrig")), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert (code, says) == (done.returncode, done.stderr[: len(says)])
        assert done.stderr.count("\n") <= 8
    assert before == sorted(folder.rglob("*"))


def test_a_million_tensors_are_read_in_bounded_memory_and_one_more_is_refused_at_once(tmp_path: Path) -> None:
    """As many as the format's limits let pass take seconds, five for each million; what is not taken costs next to nothing."""
    entry = b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}'
    commands = []
    for count in (1_000_000, 1_000_001):
        folder = write_checkpoint(tmp_path / str(count))
        header = b"{" + b",".join(entry % (number, number, number + 1) for number in range(count)) + b"}"
        (folder / "model.safetensors").write_bytes(encode(header, count))
        commands.append(Command(["plan", str(folder)], folder=str(folder), room=1536 * MEBIBYTE))
    most, more = run_commands(commands)
    assert (1, True) == (most.code, "1000000 unexpected" in most.err)
    assert (1, []) == (more.code, more.harm())
    assert more.err.startswith(f"Error: [ST-COUNT] {tmp_path / '1000001' / 'model.safetensors'}: ")


def test_an_index_of_millions_of_lists_is_refused_before_they_are_made(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    write(index, '{"weight_map": {"a": [' + "[]," * 10_000_000 + "0]}}")
    (seen,) = run_commands([Command(["plan", str(folder)], folder=str(folder))])
    assert (1, []) == (seen.code, seen.harm())
    assert seen.err.startswith(f"Error: [IX-LIMIT] {index}: made of 10,000,003 lists and objects")


def test_the_model_can_be_used_after_weights_that_are_not_finite(tmp_path: Path) -> None:
    with modelrig.load(build(tmp_path / "model", RUN["weights of NaN"])) as model:
        for _ in range(2):
            with pytest.raises(NotFiniteError):
                model.generate("a b", max_new_tokens=2)


def test_python_raises_what_the_command_line_says(tmp_path: Path) -> None:
    stored = {name: ("I64", shape) for name, (_, shape) in tensors().items()}
    with pytest.raises(LoadError) as caught:
        modelrig.plan(write_checkpoint(tmp_path, stored=stored))
    assert ("LD-DTYPE", str(tmp_path / "model.safetensors")) == (caught.value.code, caught.value.path)
    assert f"{len(stored)} such tensors" in caught.value.reason


def test_the_checkpoint_all_of_these_are_made_from_is_a_good_one(tmp_path: Path) -> None:
    with modelrig.load(write_checkpoint(tmp_path)) as model:
        assert "? ?" == model.generate(messages=[{"role": "user", "content": "a"}], max_new_tokens=2).text
        assert TEMPLATE == model.tokenizer.chat_template
