"""generation_config.json: what it says with its origin, what is not honoured, and values that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelrig.components import Snapshot
from modelrig.errors import ConfigError
from modelrig.generation.options import GenerateOptions
from modelrig.planning.generation_config import READ, GenerationConfig, read_generation
from modelrig.planning.pipeline import make_plan

FILE = "generation_config.json"
LLAMA_3 = {
    "_from_model_config": True,
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}


def read(root: Path, said: Any, config: dict[str, Any] | None = None) -> GenerationConfig:
    if said is not None:
        (root / FILE).write_text(said if isinstance(said, str) else json.dumps(said))
    return read_generation(config or {}, Snapshot(reference="x", root=root, source="local"))


@pytest.mark.parametrize(
    ("config", "generation", "ids", "origin"),
    [
        ({"eos_token_id": 2}, None, (2,), "config.json"),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 5}, (5,), FILE),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,), "config.json"),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 5]}, (7, 5), FILE),
        ({"eos_token_id": -1}, None, (), "config.json"),
        ({}, {}, (), None),
    ],
)
def test_ids_that_end_a_text_come_from_the_generation_config_first(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, ids: tuple[int, ...], origin: str | None
) -> None:
    found = read(tmp_path, generation, config)
    assert ids == found.eos_ids
    assert origin == (found.values["eos_token_id"].origin if "eos_token_id" in found.values else None)


def test_every_value_has_the_file_it_comes_from(tmp_path: Path) -> None:
    said = {
        "repetition_penalty": 1.1,
        "top_k": 20,
        "min_p": 0,
        "max_new_tokens": 17,
        "min_new_tokens": 2,
        "pad_token_id": [0],
        **LLAMA_3,
    }
    found = read(tmp_path, said, {"repetition_penalty": 9.0, "bos_token_id": 5})
    assert {key: said[key] for key in READ if key in said} | {"pad_token_id": 0} == {
        key: entry["value"] for key, entry in found.to_json().items()
    }
    assert {FILE} == {one.origin for one in found.values.values()}
    assert () == found.notes


def test_of_config_json_nothing_but_the_end_of_a_text_counts(tmp_path: Path) -> None:
    old = {"repetition_penalty": 1.3, "max_length": 50, "temperature": 0.5, "eos_token_id": 2, "bos_token_id": 1}
    assert {"eos_token_id": {"value": [2], "origin": "config.json"}} == read(tmp_path, None, old).to_json()


def test_minus_one_and_null_stand_for_none(tmp_path: Path) -> None:
    assert () == read(tmp_path, {"eos_token_id": -1, "pad_token_id": None}, {"eos_token_id": 2}).eos_ids


def test_what_is_written_down_and_is_nobodys_wish_is_not_honoured_and_said(tmp_path: Path) -> None:
    found = read(tmp_path, {"max_length": 20})
    assert None is found.get("max_length")
    assert "max_length=20" in found.notes[0]


NOT_HONOURED = {
    "num_beams": 4,
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [220],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[1]],
    "min_length": 5,
    "num_return_sequences": 3,
    "typical_p": 0.9,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "sequence_bias": [[[1], 2.0]],
    "stop_strings": ["END"],
    "max_time": 1.5,
    "prompt_lookup_num_tokens": 3,
    "custom_generate": "evil",
    "chat_format": "chatml",
}


@pytest.mark.parametrize("key", NOT_HONOURED)
def test_a_key_that_changes_results_and_is_not_honoured_is_noted(tmp_path: Path, key: str) -> None:
    (note,) = read(tmp_path, {key: NOT_HONOURED[key]}).notes
    assert f"{FILE}: not honoured: {key}=" in note


def test_keys_that_change_nothing_are_not_noted(tmp_path: Path) -> None:
    said = {
        **dict.fromkeys(NOT_HONOURED),
        "num_beams": 1,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "use_cache": False,
        "cache_implementation": "hybrid",
        "output_scores": True,
        "transformers_version": "5.0",
        "suppress_tokens": [],
        "length_penalty": 2.0,
    }
    assert () == read(tmp_path, said).notes


def test_many_and_strange_keys_make_a_note_of_bounded_length(tmp_path: Path) -> None:
    said = {f"key {number}\x1b[31m": "x" * 5000 for number in range(1000)}
    (note,) = read(tmp_path, said).notes
    assert len(note) < 10_000 and "\x1b" not in note and "and 980 more" in note


def test_a_least_number_beyond_the_greatest_is_said(tmp_path: Path) -> None:
    (note,) = read(tmp_path, {"min_new_tokens": 30, "max_new_tokens": 17}).notes
    assert "min_new_tokens=30 is beyond max_new_tokens=17" in note


REFUSED = {
    "eos_token_id": [("</s>", "CF-TYPE"), (2.0, "CF-TYPE"), ([1, None], "CF-TYPE"), (2**31, "CF-RANGE"), (True, "CF-TYPE")],
    "bos_token_id": [("<s>", "CF-TYPE"), (-2, "CF-RANGE")],
    "pad_token_id": [({"id": 1}, "CF-TYPE"), (10**30, "CF-RANGE")],
    "max_new_tokens": [("17", "CF-TYPE"), (0, "CF-RANGE"), (10**12, "CF-RANGE"), (1.5, "CF-TYPE"), (True, "CF-TYPE")],
    "max_length": [([17], "CF-TYPE"), (0, "CF-RANGE"), (-5, "CF-RANGE")],
    "min_new_tokens": [(-1, "CF-RANGE"), ("1", "CF-TYPE")],
    "repetition_penalty": [("1.3", "CF-TYPE"), (0, "CF-RANGE"), (-1.0, "CF-RANGE"), (1e9, "CF-RANGE"), ([1.0], "CF-TYPE")],
    "do_sample": [("true", "CF-TYPE"), (1, "CF-TYPE")],
    "temperature": [(-0.1, "CF-RANGE"), ("hot", "CF-TYPE"), (1e300, "CF-RANGE"), (False, "CF-TYPE")],
    "top_k": [(-1, "CF-RANGE"), (50.0, "CF-TYPE"), (10**20, "CF-RANGE")],
    "top_p": [(1.5, "CF-RANGE"), (0, "CF-RANGE"), ("0.9", "CF-TYPE"), (True, "CF-TYPE")],
    "min_p": [(-0.1, "CF-RANGE"), (1.1, "CF-RANGE"), ({}, "CF-TYPE")],
}


@pytest.mark.parametrize(("key", "value", "code"), [(key, *case) for key, cases in REFUSED.items() for case in cases])
def test_a_value_that_cannot_be_used_is_named_with_file_and_key(tmp_path: Path, key: str, value: Any, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {key: value})
    assert (code, str(tmp_path / FILE), key) == (caught.value.code, caught.value.path, caught.value.locus)


def test_every_key_has_refused_examples() -> None:
    assert set(READ) == set(REFUSED)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_one_typed_error(tmp_path: Path, number: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f'{{"repetition_penalty": {number}}}')
    assert str(tmp_path / FILE) == caught.value.path


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*top_k.*top_p"):
        read(tmp_path, {"top_p": 7, "top_k": "x"})


@pytest.mark.parametrize("key", [key for key in READ if key in attrs.fields_dict(GenerateOptions)])
@pytest.mark.parametrize("value", [0, 1, 1e-3, 1e3, 1e6, 2**31 - 1, 0.5])
def test_what_is_accepted_here_is_accepted_by_generate(tmp_path: Path, key: str, value: Any) -> None:
    if key == "top_k" and value == 0:
        return  # all tokens, which an option says by None
    try:
        found = read(tmp_path, {key: value}).get(key)
    except ConfigError:
        return
    assert found == getattr(GenerateOptions.make(**{key: found}), key)


def test_it_is_read_without_torch() -> None:
    code = "import sys, modelrig.planning.generation_config; sys.exit('torch' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


# ------------------------------------------------------------------------------------------------ in the plan


@pytest.fixture
def folder(edited_checkpoint: Callable[..., Path]) -> Path:
    return edited_checkpoint(eos_token_id=1)


def test_the_plan_has_and_shows_the_values_with_their_origins_and_when_they_count(folder: Path) -> None:
    said = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "eos_token_id": [3, 5],
        "max_length": 64,
    }
    (folder / FILE).write_text(json.dumps({**said, "num_beams": 4}))
    plan = make_plan(folder)
    assert ((3, 5), 1.3) == (plan.eos_ids, plan.generation.get("repetition_penalty"))
    assert {key: {"value": value, "origin": FILE} for key, value in said.items()} == json.loads(json.dumps(plan.to_json()))[
        "generation"
    ]
    section = plan.explain().partition("\ngeneration\n")[2].partition("\n\n")[0]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in section.splitlines()}
    assert {
        "eos_token_id": f"3, 5 {FILE}",
        "max_length": f"64 {FILE}: prompt and new tokens",
        "repetition_penalty": f"1.3 {FILE}",
        "do_sample": f"true {FILE}: a recommendation, calls sample by their own temperature",
        "temperature": f"0.6 {FILE}: a recommendation, calls sample by their own temperature",
        "top_p": f"0.9 {FILE}: in calls with a temperature",
    } == lines
    assert any("num_beams=4" in note for note in plan.notes) and "num_beams=4" in plan.explain()


def test_without_the_file_the_plan_has_what_config_json_says(folder: Path) -> None:
    (folder / FILE).unlink(missing_ok=True)
    plan = make_plan(folder)
    assert {"eos_token_id": {"value": [1], "origin": "config.json"}} == plan.to_json()["generation"]


def test_a_value_that_cannot_be_used_refuses_the_plan(folder: Path) -> None:
    (folder / FILE).write_text('{"top_p": "high"}')
    with pytest.raises(ConfigError, match="top_p"):
        make_plan(folder)


def test_the_hash_is_of_the_rig_and_not_of_what_the_file_recommends(folder: Path) -> None:
    before = make_plan(folder).hash
    (folder / FILE).write_text('{"repetition_penalty": 1.3}')
    assert before == make_plan(folder).hash


def test_a_tokenizer_in_another_form_is_noted(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (note,) = [note for note in make_plan(folder).notes if "tokenizer.model" in note]
    assert "SentencePiece" in note and "pip install transformers sentencepiece protobuf" in note
