"""Greedy tokens with a generation_config.json, against transformers' generate(do_sample=False) that reads the same file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import modelrig
from checkpoints import write_llama

PROMPTS = [[5, 17, 3, 60], [9, 9, 9], [80, 2, 41, 7, 33, 12]]
FILE = "generation_config.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, seed=4)
    return folder


def theirs(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
    return made[0, len(prompt) :].tolist()


def often(folder: Path) -> list[int]:
    """Two ids that the model likes, so that ending at them matters."""
    with modelrig.load(folder) as model:
        tokens = [
            token for prompt in PROMPTS for token in model.generate(prompt, max_new_tokens=30, repetition_penalty=1.3).tokens[4:]
        ]
    return sorted(set(tokens), key=tokens.count)[-2:]


SAID = {
    "penalty and length": {"repetition_penalty": 1.3, "max_new_tokens": 17},
    "sampling that greedy decoding leaves out": {
        "repetition_penalty": 1.3,
        "max_new_tokens": 17,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.2,
    },
    "ends": {"repetition_penalty": 1.3, "max_new_tokens": 40, "eos_token_id": "often"},
    "ends, not too early": {"repetition_penalty": 1.1, "max_new_tokens": 40, "min_new_tokens": 12, "eos_token_id": "often"},
    "prompt and answer": {"max_length": 31},
    "both lengths": {"max_length": 31, "max_new_tokens": 9},
    "at least more than at most": {"min_new_tokens": 20, "max_new_tokens": 9, "eos_token_id": "often"},
}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers(written: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    said = {key: often(written) if value == "often" else value for key, value in SAID[name].items()}
    (folder / FILE).write_text(json.dumps(said))
    with modelrig.load(folder) as model:
        session = model.session()
        for prompt in PROMPTS:
            expected = theirs(folder, prompt)
            assert expected == list(model.generate(prompt).tokens)
            assert expected == [token for piece in model.stream(prompt) for token in piece.tokens]
            session.reset()
            assert expected == list(session.generate(prompt).tokens)
            assert theirs(folder, prompt, max_new_tokens=5, min_new_tokens=0, repetition_penalty=1.0) == list(
                model.generate(prompt, max_new_tokens=5, min_new_tokens=0, repetition_penalty=None).tokens
            )


def test_sampling_uses_what_the_file_says_unless_the_call_says_otherwise(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    (folder / FILE).write_text(json.dumps({"top_k": 2, "top_p": 0.7, "min_p": 0.05, "max_new_tokens": 17}))
    with modelrig.load(written) as plain, modelrig.load(folder) as model:
        said = {"top_k": 2, "top_p": 0.7, "min_p": 0.05}
        for given in ({}, {"top_k": None}, dict.fromkeys(said), {"top_p": 0.3, "min_p": 0}):
            expected = plain.generate(PROMPTS[0], temperature=1.5, seed=3, max_new_tokens=17, **{**said, **given})
            assert expected.tokens == model.generate(PROMPTS[0], temperature=1.5, seed=3, **given).tokens
        assert 17 == len(model.generate(PROMPTS[0]).tokens)
        assert 156 == len(model.generate(PROMPTS[0], max_new_tokens=None, ignore_eos=True).tokens) - 1


def test_a_saved_model_has_the_file_unchanged(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "model"))
    text = '{ "repetition_penalty": 1.3,\n"num_beams": 4, "max_new_tokens": 17 }'
    (folder / FILE).write_text(text)
    with modelrig.load(folder) as model:
        expected = model.generate(PROMPTS[0]).tokens
        model.save(tmp_path / "saved")
    assert text == (tmp_path / "saved" / FILE).read_text()
    with modelrig.load(tmp_path / "saved") as again:
        assert expected == again.generate(PROMPTS[0]).tokens
