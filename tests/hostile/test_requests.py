"""What a careless user writes: in arguments, variables and modelrig.toml. One message that names what was written and where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

import modelrig
from commands import MEBIBYTE, Command, Told, run_commands
from hostile_checkpoints import write, write_checkpoint
from modelrig.errors import ModelrigError, PlanError, RequestError, ResourceLimitError

USAGE, INFEASIBLE = 2, 3


@frozen
class Bad:
    """A value on the command line: what is said, and the exit code."""

    value: str
    says: str
    code: int = USAGE


def bad(*values: str, says: str, code: int = USAGE) -> list[Bad]:
    return [Bad(value, says, code) for value in values]


FLAGS = {
    "context": bad("0", "-1", "1000000000000", "x", "", "1.5", "true", "nan", "[1]", "\n", says="[RQ-VALUE] context: "),
    "batch": [
        *bad("0", "-1", "x", "2147483648", "1e3", "true", says="[RQ-VALUE] batch: "),
        Bad("100000000", "[RL-MEM] cpu needs ", INFEASIBLE),
    ],
    "dtype": bad("float99", "int8", "16", "load", "__class__", "x" * 10_000, says="[RQ-VALUE] dtype: "),
    "device-map": [
        *bad("gpu", "mps", "meta", "-1", "99999", "cuda:-1", "cpu:0", "{}", '{"" = "tpu"}', says="[RQ-VALUE] device_map: "),
        *bad('{"model" = "cpu"}', '{"" = "cpu", "modle" = "cpu"}', says="[PN-MAP-", code=INFEASIBLE),
        *bad("cuda", "cuda:7", "0", says="[PN-DEVICE] device_map: ", code=INFEASIBLE),
    ],
    "max-memory": [
        *bad("0", "-1", "10XB", "nan", "", "1e9", '{gpu="1GB"}', '{auto="1GB"}', "9" * 30, says="[RQ-VALUE] max_memory: "),
        *bad("1", "1KB", '{cpu="1KB"}', says="[RL-MEM] cpu needs ", code=INFEASIBLE),
    ],
    "quantizer": [
        *bad("no_such", "../x", "os.system", "x" * 10_000, "\x1b[2J", "a:b:c", says="[RQ-NAME] quantizer: "),
        *bad("!", "[]", "[1]", says="[RQ-VALUE] quantizer: "),
        Bad('{name="none", zzz=1}', "'zzz' is unknown; known are ", USAGE),
        Bad("!none", "[PN-NONE] ", INFEASIBLE),
    ],
    "attention": [
        *bad("no_such", says="[RQ-NAME] attention: no component of kind attention is called 'no_such'"),
        Bad("no_such,neither", "'neither'", INFEASIBLE),
        Bad("!sdpa,!eager,!flex", "excluded by argument", INFEASIBLE),
    ],
    "set": [
        *bad("x", "=", "quantizer.kernel", says="is not written as SLOT.OPTION=VALUE"),
        *bad("a=b", "quantizer=1", "quantizer.=1", "quantiser.kernel=1", says="[RQ-VALUE] set: "),
        *bad("quantizer.zzz=1", "quantizer.kernel.deep=1", says="is unknown; known are "),
        *bad("attention.x=1", "cache.block=1e999", says="is unknown: the component has no options"),
        *bad("quantizer.kernel=zzz", "quantizer.kernel=__import__('os')", says="there is no kernel ", code=INFEASIBLE),
    ],
    "config": bad("missing.toml", ".", "/dev/null", "/dev/zero", "", says="[RQ-FILE] "),
}
GENERATION = {
    "max-new-tokens": ["0", "-3", "1000000000000", "x", "1.5"],
    "min-new-tokens": ["-1", "99"],
    "temperature": ["nan", "-1", "inf", "x"],
    "top-k": ["0", "-1", "1.5"],
    "top-p": ["0", "1.5", "nan", "-1"],
    "min-p": ["2", "-1", "nan"],
    "repetition-penalty": ["0", "-1", "nan", "inf"],
    "presence-penalty": ["nan", "1e9"],
    "frequency-penalty": ["inf"],
    "logit-bias": ["x", "1", "99999=1", "-1=1", "1=nan", "1=x"],
    "stop": [""],
    "stop-ids": ["99999", "-1", "x"],
    "seed": ["-1", str(1 << 70), "x"],
    "num-return-sequences": ["0", "-1", "100000000"],
}
MODELS = {
    "": "[RQ-VALUE] model: ",
    "./no-such": "[SR-UNKNOWN] ./no-such: there is no such folder",
    "../no-such": "[SR-UNKNOWN] ../no-such: there is no such folder",
    "no-such": "[SR-UNKNOWN] 'no-such' is no existing path",
    "tinny": "did you mean 'tiny'",
    "~no-such-user/x": "[SR-UNKNOWN] '~no-such-user/x'",
    "/dev/null": "[SR-UNKNOWN] /dev/null: not a folder",
    "/proc/self": "[CF-MISSING] /proc/self/config.json: ",
    "a/b/c": "[SR-UNKNOWN] 'a/b/c'",
    "org/name@": "[SR-UNKNOWN] 'org/name@'",
    "org/..": "[SR-UNKNOWN] 'org/..'",
    "http://x/y": "[SR-UNKNOWN] 'http://x/y'",
    "\x1b]0;x\x07": "[SR-UNKNOWN] '\\x1b]0;x\\x07'",
    "x" * 5000: "[SR-UNKNOWN] 'xxx",
    "x/" * 3000: "[SR-UNKNOWN] 'x/x/",
}
VARIABLES = {
    "CONTEXT": ("x", "[RQ-VALUE] MODELRIG_CONTEXT: 'x'", USAGE),
    "BATCH": ("0", "[RQ-VALUE] MODELRIG_BATCH: 0", USAGE),
    "DTYPE": ("load", "[RQ-VALUE] MODELRIG_DTYPE: 'load'", USAGE),
    "QUANTIZER": ("no_such", "(asked for by MODELRIG_QUANTIZER)", USAGE),
    "CACHE": ("\x1b[2J", "'\\x1b[2J'", USAGE),
    "ATENTION": ("sdpa", "did you mean 'MODELRIG_ATTENTION'", USAGE),
    "": ("x", "[RQ-UNKNOWN] MODELRIG_: ", USAGE),
    "DEVICE_MAP": ("cuda:9", "(asked for by MODELRIG_DEVICE_MAP)", INFEASIBLE),
    "MAX_MEMORY": ("1KB", "max_memory by MODELRIG_MAX_MEMORY", INFEASIBLE),
    "SET": ("x", "[RQ-VALUE] MODELRIG_SET: 'x'", USAGE),
    "PREFER": ("a,,b", "(prefer: MODELRIG_PREFER)", USAGE),
    "PLUGINS": ("no_such", "[RQ-UNKNOWN] MODELRIG_PLUGINS: ", USAGE),
    "DISABLE": ("no_such", "[RQ-UNKNOWN] MODELRIG_DISABLE: ", USAGE),
    "DEBUG": ("banana", "'banana' is not a valid boolean", USAGE),
}
#: content of modelrig.toml, or what is done with its path → what is said of it
FILES: dict[str, tuple[str | bytes | Callable[[Path], Any], str]] = {
    "an unknown key": ('atention = "sdpa"', "[RQ-UNKNOWN] {}: atention: unknown"),
    "a dunder": ('__class__ = "x"', "[RQ-UNKNOWN] {}: __class__: unknown"),
    "wrong types": ('context = "x"\nbatch = [1]\ndtype = 3', "3 problems"),
    "a date": ("context = 2020-01-01", "[RQ-VALUE] {}: context: "),
    "a number that is none": ("context = nan", "[RQ-VALUE] {}: context: nan"),
    "an unknown component": ('cache = "statc"', "did you mean 'static'"),
    "an unknown option": ('[attention]\nname = "sdpa"\nzz = 1', "(asked for by {})"),
    "no TOML": ("{{{", "[RQ-FILE] {}: not TOML: "),
    "bytes": (bytes(range(256)), "[RQ-FILE] {}: not TOML: "),
    "UTF-16": ("context = 5".encode("utf-16"), "[RQ-FILE] {}: not TOML: "),
    "a key twice": ("context = 1\ncontext = 2", "[RQ-FILE] {}: not TOML: "),
    "many digits": ("context = " + "9" * 5000, "[RQ-FILE] {}: not TOML: "),
    "many levels": ("a = " + "[" * 100_000, "[RQ-FILE] {}: nested too deeply"),
    "many tables": ("".join(f"[a{number}]\n" for number in range(50_000)), "and 49,980 more"),
    "two megabytes": (b"#" * (2 << 20), "[RQ-FILE] {}: larger than"),
    "a terabyte": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "[RQ-FILE] {}: larger than"),
    "a folder": (Path.mkdir, "[RQ-FILE] {}: is a folder"),
    "a named pipe": (os.mkfifo, "[RQ-FILE] {}: is a named pipe"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "[RQ-FILE] {}: a link that points to nothing"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "[RQ-FILE] {}: cannot be read"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("requests") / "model"))


def expect(cases: list[tuple[Any, Command, str, int]], *, with_torch: bool = False) -> list[tuple[Any, str, Told]]:
    """Run all, and return those that did anything else than to say this with that exit code."""
    told = run_commands([command for _, command, _, _ in cases], with_torch=with_torch)
    return [
        (case, says, seen)
        for (case, _, says, code), seen in zip(cases, told, strict=True)
        if code != seen.code or seen.out or says not in seen.err or seen.harm()
    ]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_cannot_be_used_names_itself_and_what_it_takes(model: str, flag: str) -> None:
    cases = [(one.value, Command(["plan", model, f"--{flag}", one.value], folder=model), one.says, one.code) for one in FLAGS[flag]]
    assert [] == expect(cases)


def test_an_option_of_generate_that_cannot_be_used_names_itself(model: str) -> None:
    cases = [
        (
            (flag, value),
            Command(["run", model, "a b", f"--{flag}", value], folder=model, room=768 * MEBIBYTE),
            flag.replace("-", "_"),
            2,
        )
        for flag, values in GENERATION.items()
        for value in values
        if value not in ("x", "1.5")
    ]
    cases += [
        ((flag, value), Command(["run", model, "a b", f"--{flag}", value], folder=model), f"Invalid value for '--{flag}'", 2)
        for flag, values in GENERATION.items()
        for value in values
        if value in ("x", "1.5") and flag not in ("logit-bias", "top-p")
    ]
    assert [] == expect(cases, with_torch=True)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("", "[GN-INPUT] "), ("a " * 100, "[GN-CONTEXT] "), ("\udc80", "[TK-TEXT] "), ("a " * 20_000, "[GN-CONTEXT] ")],
)
def test_a_prompt_that_cannot_be_used_is_one_message(model: str, prompt: str, says: str) -> None:
    command = Command(["run", model, prompt, "--max-new-tokens", "2", "--quiet"], folder=model, room=768 * MEBIBYTE)
    (seen,) = run_commands([command], with_torch=True)
    assert ("", []) == (seen.out, seen.harm())
    assert (1 if "TK" in says else 2, True) == (seen.code, seen.err.startswith(f"Error: {says}"))


def test_a_model_that_is_not_there_is_one_message() -> None:
    cases = [
        (name, Command([command, name]), says, 2 if name == "" else 1)
        for name, says in MODELS.items()
        for command in ("plan", "inspect")
        if (name, command) != ("/proc/self", "inspect")  # which finds no tensors there
    ]
    assert [] == expect(cases)


def test_a_variable_that_cannot_be_used_is_named(model: str) -> None:
    cases = [
        (name, Command(["plan", model], folder=model, environ={f"MODELRIG_{name}": value}), says, code)
        for name, (value, says, code) in VARIABLES.items()
    ]
    assert [] == expect(cases)


def test_a_file_that_cannot_be_used_is_named_with_its_key(model: str, tmp_path: Path) -> None:
    cases = []
    for number, (name, (content, says)) in enumerate(FILES.items()):
        path = tmp_path / str(number) / "modelrig.toml"
        path.parent.mkdir()
        if callable(content):
            content(path)
        else:
            write(path, content)
        cases.append((name, Command(["plan", model], folder=model, cwd=str(path.parent)), says.format(path), USAGE))
        explicit = ["plan", model, "--config", str(path)]
        cases.append((name, Command(explicit, folder=model, cwd=str(path.parent)), says.format(path), USAGE))
    assert [] == expect(cases)


@pytest.mark.parametrize("content", ['cache = "static"\ncontext = 7', "no TOML", "[disable]\nx = 1", 'disable = ["caches"]'])
def test_a_modelrig_toml_in_the_checkpoints_folder_is_not_read(tmp_path: Path, content: str) -> None:
    """By whatever way the folder is reached, and wherever in it the file lies that the working directory shows."""
    folder = write_checkpoint(tmp_path / "model")
    (folder / "sub").mkdir()
    for path in (folder / "modelrig.toml", folder / "sub" / "modelrig.toml"):
        write(path, content)
    (tmp_path / "linked").symlink_to("model")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "modelrig.toml").symlink_to("../model/modelrig.toml")
    ways = [
        (folder, "."), (folder, str(folder)), (folder, "../model"), (folder, "../linked"), (tmp_path / "linked", "."),
        (tmp_path / "linked", str(folder)), (folder / "sub", ".."), (folder / "sub", str(tmp_path / "linked")),
        (tmp_path / "work", "../model"), (tmp_path / "work", str(tmp_path / "linked")),
    ]  # fmt: skip
    commands = [
        Command([command, model, "--json"], folder=str(folder), cwd=str(cwd))
        for cwd, model in ways
        for command in ("plan", "inspect")
    ]
    for command, seen in zip(commands, run_commands(commands), strict=True):
        assert (0, "", []) == (seen.code, seen.err, seen.harm()), command
        document = json.loads(seen.out)
        if command.arguments[0] == "plan":
            assert ("dynamic", 64) == (document["choices"]["caches"]["component"], document["context"])
            assert any("own folder" in note for note in document["notes"])


def test_a_wish_in_order_takes_the_first_that_fits_and_shows_why_the_others_do_not(model: str) -> None:
    for written in ('["no_such", "sdpa"]', "no_such,sdpa"):
        (seen,) = run_commands([Command(["plan", model, "--json", "--attention", written], folder=model)])
        document = json.loads(seen.out)
        assert (0, "sdpa", []) == (seen.code, document["choices"]["attention"]["component"], seen.harm())
        reasons = [reason for row in document["refused"] if row["component"] == "no_such" for reason in row["reasons"]]
        assert ["request.unknown"] == [reason["code"] for reason in reasons]


PYTHON: list[tuple[dict[str, Any], type[ModelrigError], str]] = [
    ({"context": 0}, RequestError, "RQ-VALUE"),
    ({"context": 10**12}, RequestError, "RQ-VALUE"),
    ({"context": True}, RequestError, "RQ-VALUE"),
    ({"batch": 0}, RequestError, "RQ-VALUE"),
    ({"batch": 1.0}, RequestError, "RQ-VALUE"),
    ({"dtype": object()}, RequestError, "RQ-VALUE"),
    ({"device_map": {"model": "cpu"}}, PlanError, "PN-MAP-COVER"),
    ({"device_map": {"model": "tpu"}}, RequestError, "RQ-VALUE"),
    ({"device_map": ["cpu"]}, RequestError, "RQ-VALUE"),
    ({"device_map": "cuda:7"}, PlanError, "PN-DEVICE"),
    ({"max_memory": {1: object()}}, RequestError, "RQ-VALUE"),
    ({"max_memory": float("nan")}, RequestError, "RQ-VALUE"),
    ({"max_memory": {"cpu": "1KB"}}, ResourceLimitError, "RL-MEM"),
    ({"quantizer": object()}, RequestError, "RQ-VALUE"),
    ({"quantizer": {1: 2}}, RequestError, "RQ-VALUE"),
    ({"attention": [[]]}, RequestError, "RQ-VALUE"),
    ({"set": [("a", 1)]}, RequestError, "RQ-VALUE"),
    ({"set": {5: 1}}, RequestError, "RQ-VALUE"),
    ({"prefer": 5}, RequestError, "RQ-VALUE"),
    ({"atention": "sdpa"}, RequestError, "RQ-UNKNOWN"),
    ({"config": 5}, RequestError, "RQ-VALUE"),
    ({"config": {"atention": "sdpa"}}, RequestError, "RQ-UNKNOWN"),
    ({"config": {5: 1}}, RequestError, "RQ-UNKNOWN"),
    ({"config": "a\0b"}, RequestError, "RQ-FILE"),
]


@pytest.mark.parametrize(("request_", "kind", "code"), PYTHON, ids=lambda value: ascii(value)[:40])
def test_python_raises_one_typed_error_too(model: str, request_: Any, kind: type[ModelrigError], code: str) -> None:
    with pytest.raises(kind) as caught:
        modelrig.plan(model, **request_)
    assert code == caught.value.code
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("reference", [None, 5, b"tiny", [], "", "a\0b", object()], ids=ascii)
def test_a_reference_that_is_none_is_one_typed_error(reference: Any) -> None:
    with pytest.raises(RequestError) as caught:
        modelrig.plan(reference)
    assert ("RQ-VALUE", "model") == (caught.value.code, caught.value.locus)
