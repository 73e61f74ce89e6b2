"""Whatever a random model says, what comes is what the grammar allows: with every decoder, drawn or not, alone and in batches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="part of the developers' environment (pip install -e '.[dev]')")

import modelrig
import modelrig_llguidance
from checkpoints import write_llama
from modelrig.errors import GenerateError
from modelrig.registry import current, temporary
from modelrig_llguidance.llguidance_module import GuidanceCompiler
from tokenizer_folders import FAMILIES, byte_level, write

EOS = 0  # <|endoftext|>
VOCAB = 345  # 332 tokens, and rows that pad the model's vocabulary
PROMPTS = ["def add(a, b):", "names", "x = [12, 34, 12, 34, 12"]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 2},
        "done": {"type": ["boolean", "null"]},
    },
    "required": ["name", "size", "tags", "done"],
    "additionalProperties": False,
}
LARK = r"""
start: pair ("; " pair)*
pair: WORD "=" NUMBER
WORD: /[a-z]{1,6}/
NUMBER: /[0-9]{1,3}/
"""


def is_record(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "size", "tags", "done"]
        and isinstance(found["name"], str)
        and 1 <= len(found["name"]) <= 5
        and type(found["size"]) is int
        and 1 <= found["size"] <= 99
        and len(found["tags"]) <= 2
        and {*found["tags"]} <= {"new", "old"}
        and found["done"] in (True, False, None)
    )


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


#: name → (constraint, what its texts are, new tokens that are enough for all)
CASES: dict[str, tuple[dict[str, Any], Callable[[str], bool], int]] = {
    "digits": ({"regex": "[0-9]{1,12}"}, matches("[0-9]{1,12}"), 16),
    "words": ({"regex": "[a-z]{2,5}( [a-z]{2,5}){0,2}"}, matches("[a-z]{2,5}( [a-z]{2,5}){0,2}"), 20),
    "letters of several bytes": ({"regex": "é{2,3}(漢|😀)ü?"}, matches("é{2,3}(漢|😀)ü?"), 24),
    "one of": ({"regex": "yes|no|maybe"}, matches("yes|no|maybe"), 8),
    "record": ({"json_schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}, is_record, 110),
    "anything": ({"regex": "(?s:.{0,40})"}, lambda text: len(text) <= 40, 170),
    "pairs": ({"lark": LARK}, matches("[a-z]{1,6}=[0-9]{1,3}(; [a-z]{1,6}=[0-9]{1,3})*"), 120),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The plugin, unless it is installed."""
    if current().components("constraints"):
        yield
    else:
        with temporary(modelrig_llguidance, "llguidance"):
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("guided")
    write(made, byte_level(), tokenizer_config__json={"eos_token": "<|endoftext|>"})
    model = write_llama(made, vocab_size=VOCAB, eos_token_id=EOS, max_position_embeddings=300)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)  # so that texts differ and end somewhere
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[modelrig.Model]:
    with modelrig.load(folder, dtype="float32") as loaded:
        yield loaded


def decoder(name: str, folder: Path) -> Any:
    return {
        "auto": "auto",
        "beam": {"name": "beam", "num_beams": 3},
        "prompt_lookup": {"name": "prompt_lookup", "min_ngram": 1, "least_gain": 0.0},
        "draft_model": {"name": "draft_model", "model": str(folder), "least_gain": 0.0},
    }[name]


DECODERS = ("auto", "beam", "prompt_lookup", "draft_model")


# ------------------------------------------------------------------------------------------------ what comes


@pytest.mark.parametrize("name", DECODERS)
def test_every_text_is_of_the_grammar(folder: Path, name: str) -> None:
    finished = 0
    with modelrig.load(folder, dtype="float32", decoder=decoder(name, folder)) as model:
        for constraint, is_right, enough in CASES.values():
            for seed in range(4):
                how = {"temperature": 1.2, "seed": seed, "logit_bias": {EOS: 4.0}} if seed else {"logit_bias": {EOS: 4.0}}
                for found in model.generate(PROMPTS, constraint=constraint, max_new_tokens=enough, **how):
                    finished += found.finish_reason == "stop"
                    assert max(found.tokens) < 332
                    if found.finish_reason == "stop":
                        assert is_right(found.text), (constraint, seed, found.text)
    assert finished > 0.8 * len(CASES) * 4 * len(PROMPTS)


@every_case
def test_many_draws_are_of_the_grammar(model: Any, case: str) -> None:
    constraint, is_right, enough = CASES[case]
    texts = set()
    for seed in range(25):
        found = model.generate("a", constraint=constraint, max_new_tokens=enough, temperature=1.5, seed=seed, logit_bias={EOS: 3.0})
        if found.finish_reason == "stop":
            texts.add(found.text)
            assert is_right(found.text), found.text
    assert len(texts) >= (2 if case == "one of" else 4)


@every_case
@pytest.mark.parametrize("name", ["prompt_lookup", "draft_model"])
def test_drafts_change_no_token(folder: Path, model: Any, name: str, case: str) -> None:
    constraint, _, enough = CASES[case]
    expected = model.generate(PROMPTS, constraint=constraint, max_new_tokens=enough)
    with modelrig.load(folder, dtype="float32", decoder=decoder(name, folder)) as drafting:
        found = drafting.generate(PROMPTS, constraint=constraint, max_new_tokens=enough)
    assert [one.tokens for one in expected] == [one.tokens for one in found]
    if (name, case) == ("draft_model", "anything"):
        assert sum(one.stats.accepted_tokens for one in found) > 0


@pytest.mark.parametrize("name", DECODERS)
def test_rows_give_what_they_give_alone(folder: Path, name: str) -> None:
    constraint, _, enough = CASES["words"]
    with modelrig.load(folder, dtype="float32", decoder=decoder(name, folder)) as model:
        together = model.generate(PROMPTS, constraint=constraint, max_new_tokens=enough)
        alone = [model.generate(prompt, constraint=constraint, max_new_tokens=enough) for prompt in PROMPTS]
    assert [one.tokens for one in alone] == [one.tokens for one in together]


def test_streams_and_sessions(model: Any) -> None:
    constraint, is_right, enough = CASES["words"]
    how: dict[str, Any] = {"constraint": constraint, "max_new_tokens": enough, "logit_bias": {EOS: 4.0}}
    assert model.generate("a", **how).text == "".join(piece.text for piece in model.stream("a", **how))
    session = model.session()
    for turn in ("one", " two", " three"):
        answer = session.generate(turn, **how)
        assert answer.finish_reason == "length" or is_right(answer.text)


def test_the_bundled_model() -> None:
    with modelrig.load("tiny") as tiny:
        for seed in range(5):
            found = tiny.generate(
                "The record is ", constraint=CASES["record"][0], temperature=1.0, seed=seed, max_new_tokens=120, logit_bias={0: 2.0}
            )
            assert found.finish_reason == "length" or is_record(found.text)
        assert re.fullmatch(r"def [a-z_]{3,10}\(\):", tiny.generate("#", constraint={"regex": r"def [a-z_]{3,10}\(\):"}).text)


# ------------------------------------------------------------------------------------------------ where it ends


def test_a_text_that_nothing_can_follow_ends_without_an_id(model: Any) -> None:
    for how in ({}, {"ignore_eos": True}, {"min_new_tokens": 30}):
        found = model.generate("a", constraint={"regex": "abc"}, **how)
        assert ("abc", "stop") == (found.text, found.finish_reason) and EOS not in found.tokens


def test_without_end_ids_a_text_goes_on_as_far_as_it_can(model: Any) -> None:
    open_ended = model.generate("a", constraint={"regex": "[ab]+"}, ignore_eos=True, logit_bias={EOS: 100.0}, max_new_tokens=9)
    assert "length" == open_ended.finish_reason and re.fullmatch("[ab]+", open_ended.text)
    closed = model.generate("a", constraint={"regex": "[ab]{4}c?"}, ignore_eos=True, logit_bias={EOS: 100.0}, max_new_tokens=9)
    assert re.fullmatch("[ab]{4}c", closed.text) and "stop" == closed.finish_reason


def test_the_ids_that_end_a_call_end_a_complete_text(model: Any) -> None:
    bias = {1: 100.0}
    found = model.generate("a", constraint={"regex": "[0-9]{3,}"}, stop_ids=[1], logit_bias=bias, max_new_tokens=20)
    assert 1 == found.tokens[-1] and re.fullmatch("[0-9]{3,}", found.text) and len(found.text) <= 5
    found = model.generate("a", constraint={"regex": "[0-9]{3,}"}, logit_bias=bias, max_new_tokens=20)
    assert 1 not in found.tokens


def test_special_tokens_come_where_a_lark_grammar_names_them_and_nowhere_else(model: Any) -> None:
    bias = {2: 100.0}
    found = model.generate("a", constraint={"lark": 'start: "a" <|im_end|> "b"'}, logit_bias=bias)
    assert (2, "ab") == (found.tokens[1], found.text)
    assert 2 not in model.generate("a", constraint={"regex": "(?s:.*)"}, logit_bias=bias, max_new_tokens=9).tokens
    with pytest.raises(GenerateError, match="spelled like a special token"):
        model.generate("a", constraint={"regex": r"<\|im_end\|>"})


# ------------------------------------------------------------------------------------------------ the mask


def mask(tokenizer: Any, pattern: str, end_ids: tuple[int, ...] = (EOS,)) -> Any:
    return GuidanceCompiler(tokenizer, VOCAB).compile("regex", pattern, end_ids)()


def allowed(one: Any) -> set[int]:
    bits = torch.zeros(-(-VOCAB // 32), dtype=torch.int32)
    one.fill(bits)
    return {token for token in range(32 * len(bits)) if int(bits[token // 32]) >> token % 32 & 1}


def test_the_bits_are_those_of_the_tokens_that_go_on(model: Any) -> None:
    pattern = "[a-c]{1,3}"
    one = mask(model.tokenizer, pattern)
    spelled = {token: model.tokenizer.decode([token]) for token in range(332)}
    for before in ("", "a", "ab"):
        expected = {token for token, text in spelled.items() if text and re.fullmatch(pattern, before + text)}
        assert expected | ({EOS} if before else set()) == allowed(one)
        one.accept(model.tokenizer.token_to_id("abc"[len(before)]))
    assert one.is_over


def test_bits_of_rows_that_pad_the_vocabulary_are_never_set(model: Any) -> None:
    assert max(allowed(mask(model.tokenizer, "(?s:.*)", ()))) == 331


@pytest.mark.parametrize("pattern", ["[a-z]{1,9}", "abcabc", "(ab|cd)*e?", "é+漢"])
def test_rolling_back_is_never_having_come(model: Any, pattern: str) -> None:
    one, path = mask(model.tokenizer, pattern), []
    seen = [allowed(one)]
    while not one.is_over and len(path) < 8 and (more := sorted(seen[-1] - {EOS})):
        path.append(more[len(path) * 7 % len(more)])
        one.accept(path[-1])
        seen.append(set() if one.is_over else allowed(one))
    for count in range(1, len(path) + 1):
        one.rollback(count)
        assert seen[-1 - count] == allowed(one)
        for token in path[-count:]:
            one.accept(token)
    assert one.is_over or seen[-1] == allowed(one)


def test_masks_of_one_call_know_nothing_of_each_other(model: Any) -> None:
    make = GuidanceCompiler(model.tokenizer, VOCAB).compile("regex", "[a-c][0-9]", (EOS,))
    first, second = make(), make()
    before = allowed(second)
    first.accept(model.tokenizer.token_to_id("a"))
    assert before == allowed(second) != allowed(first)


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"regex": "("}, "not a regex that llguidance takes.*unclosed group"),
        ({"regex": "a(?=b)"}, "not a regex that llguidance takes.*look-around"),
        ({"regex": "(" * 50_000 + ")" * 50_000}, "not a regex"),
        ({"json_schema": "{"}, "not a json_schema that llguidance takes"),
        ({"json_schema": {"type": "number", "multipleOf": "x"}}, "not a json_schema"),
        ({"json_schema": {"not": {"type": "string"}}}, "not a json_schema.*Unimplemented keys"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "not a json_schema.*does not fetch"),
        ({"json_schema": {"properties": {f"k{n}": {"type": "string"} for n in range(20_000)}}}, "schema too large"),
        ({"json_schema": '{"items":' * 5_000 + "{}" + "}" * 5_000}, "recursion limit"),
        ({"lark": "start: x"}, "not a lark that llguidance takes.*unknown name"),
        ({"lark": "start: " + "(" * 5_000 + '"a"' + ")" * 5_000}, "too deeply nested"),
        ({"regex": "(a{1000}){1000}"}, "llguidance gave up.*too many"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_grammar_or_too_much_of_one_is_an_error_with_the_reason(model: Any, constraint: Any, says: str) -> None:
    with pytest.raises(GenerateError, match=says) as caught:
        model.generate("x", constraint=constraint, max_new_tokens=4)
    assert ("GN-CONSTRAINT", "constraint") == (caught.value.code, caught.value.locus)
    assert len(str(caught.value)) < 1000
    assert 2 == len(model.generate("x", max_new_tokens=2, ignore_eos=True).tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_that_it_cannot_read_are_named(tmp_path: Path, family: str) -> None:
    write(tmp_path, FAMILIES[family]())
    write_llama(tmp_path, vocab_size=VOCAB)
    with modelrig.load(tmp_path, dtype="float32") as model:
        if family in ("byte_level", "byte_fallback"):
            for seed in range(5):
                found = model.generate("ab", constraint={"regex": "[a-zé]{3,9}"}, temperature=1.5, seed=seed)
                assert re.fullmatch("[a-zé]{3,9}", found.text)
        else:
            with pytest.raises(GenerateError, match=r"GN-CONSTRAINT.*llguidance cannot read this tokenizer"):
                model.generate([1], constraint={"regex": "[a-z]{3}"})
