"""What tokenizer_config.json adds to tokenizer.json, against transformers that reads the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import tokenizer_folders
from modelrig.errors import TokenizerError
from modelrig.generation.tokenizer import Tokenizer

VOCAB = 400
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXT = "<tool call> def add <|im_start|>user x<extra>y <|im_end|> z<extra> add(a, b): sorted"
MADE = tokenizer_folders.byte_level()
NEXT = MADE.get_vocab_size()


def token(content: str, **switches: Any) -> dict[str, Any]:
    said = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **said, **switches}


CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tokens that are missing": {
        "added_tokens_decoder": {str(NEXT): token("<extra>"), str(NEXT + 1): token("sorted", special=False)}
    },
    "tokens that are missing, in another order": {
        "added_tokens_decoder": {str(NEXT + 1): token("sorted"), str(NEXT): token("<extra>", lstrip=True)}
    },
    "tokens that are there": {"added_tokens_decoder": {"1": token("<|im_start|>"), "2": token("<|im_end|>")}},
    "tokens that are there with other switches": {"added_tokens_decoder": {"2": token("<|im_end|>", lstrip=True, rstrip=True)}},
    "a named token of the plain vocabulary": {"eos_token": "de"},
    "a named token that was added, but not as a special one": {"eos_token": "<tool call>"},
    "a named token, as an object": {"eos_token": {"__type": "AddedToken", **token("<tool call>")}},
    "extra tokens of the plain vocabulary": {"extra_special_tokens": ["de", "dd"]},
    "extra tokens, as before transformers 5": {"additional_special_tokens": ["de", "<|im_end|>"]},
    "a switch for the beginning, which is for tokenizer.json to say": {"bos_token": "<|im_start|>", "add_bos_token": True},
    "switches for both": {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "add_eos_token": True,
    },
    "a switch for the end alone": {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "add_eos_token": True,
    },
    "a switch for neither": {"bos_token": "<|im_start|>", "add_bos_token": False},
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    tokenizer_folders.write(tmp_path, MADE, tokenizer_config__json={**FAST, **CASES[name]})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path, VOCAB)
    assert ours is not None
    for add_special_tokens in (True, False):
        ids = theirs.encode(TEXT, add_special_tokens=add_special_tokens)
        assert ids == ours.encode(TEXT, add_special_tokens)
        for skip_special_tokens in (True, False):
            assert theirs.decode(ids, skip_special_tokens=skip_special_tokens) == ours.decode(ids, skip_special_tokens)


def test_tokens_of_the_older_file_are_added(tmp_path: Path) -> None:
    tokenizer_folders.write(
        tmp_path, MADE, tokenizer_config__json={**FAST, "pad_token": "<extra>"}, added_tokens__json={"<extra>": NEXT}
    )
    ours = Tokenizer.from_folder(tmp_path, VOCAB)
    assert ours is not None
    assert (NEXT, [NEXT], "") == (ours.pad_id, ours.encode("<extra>", False), ours.decode([NEXT]))


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {str(NEXT): token("<extra>")}, "pad_token": "<extra>"},
        {"added_tokens_decoder": {str(NEXT + 7): token("<extra>")}},
        {"added_tokens_decoder": {"5": token("<|im_end|>")}},
        {"pad_token": "<extra>", "extra_special_tokens": ["<more>", {"content": "<most>"}, 5]},
    ],
    ids=["beyond the weights", "under an id that is not next", "under two ids", "without an id"],
)
def test_a_token_that_the_weights_have_no_row_for_is_not_made_up(tmp_path: Path, config: dict[str, Any]) -> None:
    tokenizer_folders.write(tmp_path, MADE, tokenizer_config__json={**FAST, **config})
    ours = Tokenizer.from_folder(tmp_path, NEXT)
    assert ours is not None
    assert (None, NEXT, 2) == (ours.token_to_id("<extra>"), ours.vocab_size, ours.token_to_id("<|im_end|>"))


@pytest.mark.parametrize(
    ("decoder", "code"),
    [
        ([], "TK-JSON"),
        ({"x": token("a")}, "TK-JSON"),
        ({"-1": token("a")}, "TK-JSON"),
        ({"1": "a"}, "TK-JSON"),
        ({"1": {"content": 5}}, "TK-JSON"),
        ({"1": {"content": ""}}, "TK-JSON"),
        ({"9" * 30: token("a")}, "TK-JSON"),
    ],
    ids=str,
)
def test_entries_that_are_no_tokens_are_named(tmp_path: Path, decoder: Any, code: str) -> None:
    tokenizer_folders.write(tmp_path, MADE, tokenizer_config__json={"added_tokens_decoder": decoder})
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    path = str(tmp_path / "tokenizer_config.json")
    assert (code, path, "added_tokens_decoder") == (caught.value.code, caught.value.path, caught.value.locus)


def test_an_id_that_the_library_would_not_give_is_refused(tmp_path: Path) -> None:
    document = json.loads(MADE.to_str())
    vocab = document["model"]["vocab"]
    vocab["moved"] = vocab.pop(next(text for text, number in vocab.items() if number == NEXT - 3)) + 50  # leaves a gap
    said = {"added_tokens_decoder": {str(NEXT): token("<extra>")}}
    tokenizer_folders.write(tmp_path, json.dumps(document), tokenizer_config__json=said)
    try:
        found = Tokenizer.from_folder(tmp_path, VOCAB)
    except TokenizerError as error:
        assert error.code in ("TK-VOCAB", "TK-JSON")
    else:
        assert found is not None and found.token_to_id("<extra>") in (None, NEXT)


def test_many_added_tokens_take_no_time(tmp_path: Path) -> None:
    added = {str(NEXT + number): token(f"<extra {number}>") for number in range(20_000)}
    tokenizer_folders.write(tmp_path, MADE, tokenizer_config__json=json.dumps({"added_tokens_decoder": added}))
    ours = Tokenizer.from_folder(tmp_path, 10**6)
    assert ours is not None
    assert NEXT + 19_999 == ours.token_to_id("<extra 19999>")
