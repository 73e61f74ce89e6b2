"""Every bad config.json is one typed error that names file and key, from Python and on the command line, and does no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import Factory, frozen

import modelrig
from commands import Command, Told, run_commands
from hostile_checkpoints import CONFIG, tensors, write_checkpoint
from modelrig.errors import ConfigError, LoadError, ModelrigError

NAN, INFINITY = float("nan"), float("inf")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta")
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")
NAMES = ("hidden_act", "torch_dtype", "dtype")
EVIL = "__import__('os').system('touch owned')"

#: values no whole number may have
NO_SIZE = {
    "CF-RANGE": [-1, 0, 1 << 40, -(1 << 40), 10**18],
    "CF-TYPE": ["64", 64.0, 6.5, True, [], [64], {}, {"a": {"b": [1]}}, "", "x" * 100_000, "\x1b]0;owned\x07", EVIL],
    "CF-JSON": [10**400, NAN, INFINITY, -INFINITY],
}
NO_NUMBER = {
    "CF-RANGE": [-1, 0, -1e-9, 1e300],
    "CF-TYPE": ["1e-5", True, [], [1e-5], {}, EVIL],
    "CF-JSON": [10**400, NAN, INFINITY],
}
NO_FLAG = {"CF-TYPE": ["true", 1, 0, 1.0, [], [True], {}], "CF-JSON": [NAN]}
NO_NAME = {
    "CF-ENUM": ["load", "float99", "torch.float16", "int8", "__class__", EVIL, "x" * 100_000],
    "CF-TYPE": [16, True, ["silu"], {}],
}
NO_MODEL_TYPE = {
    "CF-ARCH": ["", "Llama", " llama", "llama.py", "../../llama", "/etc/passwd", "os.system", "falcon", "\0", "x" * 1_000_000],
    "CF-TYPE": [None, 5, True, ["llama"], {"llama": 1}],
    "CF-JSON": [NAN],
}
NO_ROPE = {"CF-TYPE": ["linear", 2, True, [], ["linear", 2.0]], "CF-JSON": [NAN]}
NO_SCALING = {
    "CF-ENUM rope_type": [{"rope_type": name, "factor": 2.0} for name in ("magic", "../../x", "su", "")],
    "CF-ENUM type": [{"type": "longer", "factor": 2.0}],
    "CF-TYPE rope_type": [{"rope_type": value, "factor": 2.0} for value in (3, ["linear"], {})],
    "CF-MISSING factor": [{"rope_type": kind} for kind in ("linear", "dynamic")],
    "CF-RANGE factor": [{"rope_type": "linear", "factor": value} for value in (0, -2, 1e300, 1e-300)],
    "CF-TYPE factor": [{"rope_type": "linear", "factor": value} for value in ("2", True, [2])],
    "CF-JSON factor": [{"rope_type": "linear", "factor": NAN}],
    "CF-RANGE rope_theta": [{"rope_type": "default", "rope_theta": value} for value in (0, -1, 1e300)],
    "CF-REL high_freq_factor": [
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": low, "high_freq_factor": 4} for low in (4, 5)
    ],
    "CF-RANGE original_max_position_embeddings": [
        {"rope_type": kind, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": value}
        for kind in ("yarn", "llama3")
        for value in (0, -1, 1 << 41)
    ],
    "CF-TYPE original_max_position_embeddings": [{"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 32.5}],
}
NO_QUANTIZATION = {
    "CF-TYPE": ["gptq", 4, True, []],
    "CF-MISSING quant_method": [{}, {"bits": 4}],
    "CF-TYPE quant_method": [{"quant_method": 4}, {"quant_method": ["gptq"]}],
    "CF-ENUM quant_method": [{"quant_method": name} for name in ("", "../evil", "\x1b[2J", EVIL, "x" * 100_000)],
    "CF-ENUM bnb_4bit_quant_type": [{"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int3"}],
    "CF-REL load_in_8bit": [{"load_in_4bit": True, "load_in_8bit": True}],
}
BROKEN_FILES: dict[str, tuple[str, str | None, str | bytes]] = {
    "empty": ("CF-JSON", None, b""),
    "a list": ("CF-JSON", None, "[1]"),
    "a text": ("CF-JSON", None, '"llama"'),
    "null": ("CF-JSON", None, "null"),
    "cut short": ("CF-JSON", None, json.dumps(CONFIG)[:60]),
    "twice": ("CF-JSON", None, json.dumps(CONFIG) * 2),
    "with a comment": ("CF-JSON", None, "// x\n" + json.dumps(CONFIG)),
    "zeros": ("CF-JSON", None, bytes(4096)),
    "a byte order mark": ("CF-JSON", None, b"\xef\xbb\xbf" + json.dumps(CONFIG).encode()),
    "UTF-16": ("CF-JSON", None, json.dumps(CONFIG).encode("utf-16")),
    "UTF-16 without a mark": ("CF-JSON", None, json.dumps(CONFIG).encode("utf-16-le")),
    "UTF-32": ("CF-JSON", None, json.dumps(CONFIG).encode("utf-32")),
    "Latin-1": ("CF-JSON", None, '{"model_type": "é"}'.encode("latin-1")),
    "half of a surrogate pair": ("CF-JSON", None, '{"model_type": "\\ud800"}'),
    "a key twice": ("CF-DUPKEY", "hidden_size", '{"hidden_size": 32, "hidden_size": 64}'),
    "a key twice, once with an escape": ("CF-DUPKEY", "a", '{"\\u0061": 1, "a": 2}'),
    "65 levels": ("CF-LIMIT", None, '{"a":' * 65 + "1" + "}" * 65),
    "a million levels": ("CF-LIMIT", None, '{"a":' * 1_000_000),
    "five million digits": ("CF-JSON", "a", '{"a":' + "9" * 5_000_000 + "}"),
    "five million lists": ("CF-LIMIT", None, '{"a":[' + "[]," * 5_000_000 + "1]}"),
    "two million objects": ("CF-LIMIT", None, '{"a":[' + '{"b":1},' * 2_000_000 + "1]}"),
    "five million numbers": ("CF-MISSING", "model_type", '{"a":[' + "1," * 5_000_000 + "1]}"),
    "two million escapes": ("CF-MISSING", "model_type", '{"a":"' + "\\u0041" * 2_000_000 + '"}'),
    "four million quotes": ("CF-MISSING", "model_type", '{"a":[' + '"",' * 4_000_000 + "1]}"),
    "300,000 keys": ("CF-MISSING", "model_type", json.dumps({f"k{number}": number for number in range(300_000)})),
    "17 MB": ("CF-LIMIT", None, b" " * (17 << 20)),
}


@frozen(kw_only=True)
class Case:
    code: str
    locus: str | None
    changes: dict[str, Any] = Factory(dict)
    content: str | bytes | None = None  # the whole file
    stored: Any = None  # its tensors, if not the usual ones

    @property
    def is_about_tensors(self) -> bool:
        return self.code.startswith("LD-")

    @property
    def names(self) -> str:
        """The file or folder the error is about."""
        return "model.safetensors" if self.code == "LD-DTYPE" else "" if self.is_about_tensors else "config.json"


def listed(field: str, wrong: dict[str, list[Any]], **others: Any) -> Iterator[tuple[str, Case]]:
    """A case for each value. A key of `wrong` is the code, and what follows the field in the locus."""
    for what, values in wrong.items():
        code, _, inner = what.partition(" ")
        for number, value in enumerate(values):
            where = f"{field}.{inner}" if inner else field
            yield f"{field} {what} {number}", Case(code=code, locus=where, changes={field: value, **others})


def cases() -> Iterator[tuple[str, Case]]:
    for field in SIZES:
        yield from listed(field, NO_SIZE)
    for field in REQUIRED:
        yield f"{field} missing", Case(code="CF-MISSING", locus=field, changes={field: ...})
        yield f"{field} null", Case(code="CF-TYPE", locus=field, changes={field: None})
    for field in NUMBERS:
        yield from listed(field, NO_NUMBER)
    for field in FLAGS:
        yield from listed(field, NO_FLAG)
    for field in NAMES:
        yield from listed(field, NO_NAME)
    yield from listed("model_type", NO_MODEL_TYPE)
    yield "model_type missing", Case(code="CF-MISSING", locus="model_type", changes={"model_type": ...})
    for name in ("falcon", "../../evil", EVIL):
        changes = {"model_type": name, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
        yield f"auto_map and {name}", Case(code="CR-CODE", locus="auto_map", changes=changes)
    for spelling in ("rope_scaling", "rope_parameters"):
        yield from listed(spelling, NO_ROPE)
        yield from listed(spelling, NO_SCALING, rope_theta=...)
    yield from listed("quantization_config", NO_QUANTIZATION)
    yield from ((name, Case(code=code, locus=locus, content=content)) for name, (code, locus, content) in BROKEN_FILES.items())
    yield from CONTRADICTIONS.items()


def case(code: str, locus: str, *, stored: Any = None, **changes: Any) -> Case:
    return Case(code=code, locus=locus, stored=stored, changes=changes)


LINEAR = {"rope_type": "linear", "factor": 2.0}
EMBEDDING, FIRST, UP = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj.weight"
CONTRADICTIONS = {
    "kv heads that do not divide": case("CF-REL", "num_key_value_heads", num_key_value_heads=3),
    "more kv heads than heads": case("CF-REL", "num_key_value_heads", num_key_value_heads=8),
    "heads that do not divide the width": case("CF-REL", "hidden_size", num_attention_heads=5, num_key_value_heads=5),
    "an odd head_dim": case("CF-REL", "head_dim", head_dim=7),
    "dynamic rope on two dimensions": case(
        "CF-REL", "rope_scaling.rope_type", head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "v4 and v5 rope that differ": case(
        "CF-REL", "rope_scaling.factor", rope_scaling=LINEAR, rope_parameters={**LINEAR, "factor": 4.0}
    ),
    "two thetas": case("CF-REL", "rope_theta", rope_parameters={**LINEAR, "rope_theta": 5e5}),
    "fewer layers than stored": case("CF-REL", "num_hidden_layers", num_hidden_layers=1),
    "more layers than stored": case("CF-REL", "num_hidden_layers", num_hidden_layers=3),
    "far more layers than stored": case("CF-REL", "num_hidden_layers", num_hidden_layers=1 << 14),
    "layers where none is stored": case(
        "LD-TENSORS", "model.layers.0.input_layernorm.weight", num_hidden_layers=1 << 14, stored={EMBEDDING: ("F32", [16, 32])}
    ),
    "no layers": case("CF-RANGE", "num_hidden_layers", num_hidden_layers=0, stored=tensors(0)),
    "another vocabulary": case("LD-TENSORS", EMBEDDING, vocab_size=17),
    "another width": case("LD-TENSORS", EMBEDDING, hidden_size=64),
    "another feed-forward width": case("LD-TENSORS", "model.layers.0.mlp.gate_proj.weight", intermediate_size=64),
    "another head_dim": case("LD-TENSORS", f"{FIRST}.weight", head_dim=16),
    "everything as large as may be": case(
        "LD-TENSORS", EMBEDDING,
        **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "head_dim"), 1 << 24),
    ),
    "biases that are not stored": case("LD-TENSORS", f"{FIRST}.bias", attention_bias=True),
    "feed-forward biases that are not stored": case("LD-TENSORS", "model.layers.0.mlp.gate_proj.bias", mlp_bias=True),
    "biases nobody asked for": case("LD-TENSORS", f"{FIRST}.bias", stored=tensors(biases=("q_proj", "down_proj"))),
    "no head, and not tied": case("LD-TENSORS", "lm_head.weight", stored=tensors(head=False)),
    "no tensor": case("LD-TENSORS", EMBEDDING, stored={}),
    "a layer in the middle missing": case(
        "LD-TENSORS", "model.layers.1.input_layernorm.weight", num_hidden_layers=3,
        stored={name: value for name, value in tensors(3).items() if ".1." not in name},
    ),
    "tensors under both names": case(
        "LD-TENSORS", EMBEDDING, stored={**tensors(), **{name.removeprefix("model."): value for name, value in tensors().items()}}
    ),
    "scalars": case("LD-TENSORS", EMBEDDING, stored={name: ("F32", []) for name in tensors()}),
    "tensors without elements": case(
        "LD-TENSORS", EMBEDDING, stored={name: ("F32", [0] * len(shape)) for name, (_, shape) in tensors().items()}
    ),
    "a layer of a far number": case(
        "LD-TENSORS", "model.layers.99999999.x", stored={**tensors(), "model.layers.99999999.x": ("F32", [1])}
    ),
    **{
        f"weights stored as {dtype}": case(
            "LD-DTYPE", EMBEDDING, stored={name: (dtype, shape) for name, (_, shape) in tensors().items()}
        )
        for dtype in ("I8", "U8", "I32", "I64", "BOOL", "C64", "F4", "F6_E2M3")
    },
    "one weight of integers": case("LD-DTYPE", UP, stored={**tensors(), UP: ("I8", [48, 32])}),
}  # fmt: skip
CASES = dict(cases())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("configs")
    return {
        name: write_checkpoint(root / str(number), one.content, one.stored, **one.changes)
        for number, (name, one) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def told(folders: dict[str, Path]) -> dict[tuple[str, str], Told]:
    keys = [(name, command) for name in CASES for command in ("plan", "inspect")]
    commands = [Command([command, str(folders[name])], folder=str(folders[name])) for name, command in keys]
    return dict(zip(keys, run_commands(commands), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_bad_config_is_one_typed_error_that_names_file_and_key(folders: dict[str, Path], name: str) -> None:
    one, folder = CASES[name], folders[name]
    with pytest.raises(ModelrigError) as caught:
        modelrig.plan(folder)
    error = caught.value
    assert (one.code, str(folder / one.names), one.locus) == (error.code, error.path, error.locus)
    assert isinstance(
        error, LoadError if one.is_about_tensors else modelrig.errors.CodeRefused if one.code == "CR-CODE" else ConfigError
    )
    assert "problems:" not in error.reason  # what follows from a stand-in is no problem of the user's
    assert len(str(error)) < 4000


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_says_the_same_and_does_nothing_else(told: dict[tuple[str, str], Told], folders: Any, name: str) -> None:
    one, plan = CASES[name], told[name, "plan"]
    where = f"{folders[name]}/{one.names}".rstrip("/") + (f": {one.locus}: " if one.locus else ": ")
    assert (1, "", []) == (plan.code, plan.out, plan.harm())
    assert plan.err.startswith(f"Error: [{one.code}] {where}")


@pytest.mark.parametrize("name", CASES)
def test_inspect_shows_the_tensors_of_what_no_architecture_here_can_run(told: dict[tuple[str, str], Told], name: str) -> None:
    one, shown = CASES[name], told[name, "inspect"]
    is_shown = one.is_about_tensors or one.code in ("CF-ARCH", "CR-CODE") or (one.code, one.locus) == ("CF-MISSING", "model_type")
    is_shown = is_shown or str(one.locus).startswith("quantization_config")  # only a plan has to understand it
    assert (0 if is_shown else 1, []) == (shown.code, shown.harm())
    assert ("tensors" in shown.out) == (shown.code == 0)


def test_all_problems_of_a_config_are_told_at_once(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, hidden_size=-1, vocab_size="x", rms_norm_eps=0, rope_scaling={"rope_type": "no"}, mlp_bias=1
    )
    with pytest.raises(ConfigError, match="5 problems") as caught:
        modelrig.plan(folder)
    for key in ("hidden_size", "vocab_size", "rms_norm_eps", "rope_scaling.rope_type", "mlp_bias"):
        assert f"- {key}: " in str(caught.value)


def test_everything_wrong_with_the_tensors_is_listed_at_once(tmp_path: Path) -> None:
    stored = {name: value for name, value in tensors().items() if "layernorm" not in name} | {
        UP: ("F32", [1, 2]),
        "x": ("F32", [1]),
    }
    with pytest.raises(LoadError) as caught:
        modelrig.plan(write_checkpoint(tmp_path, stored=stored))
    assert (4, ["x"], 1) == (len(caught.value.missing), list(caught.value.unexpected), len(caught.value.misshapen))
    for part in ("4 missing", "1 unexpected", "1 of another shape", UP, "'x'"):
        assert part in str(caught.value)
