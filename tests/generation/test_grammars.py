"""Constraints in words: which component serves them, and what is said when none does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelrig
from automata import ChainCompiler, constraint, plugin
from checkpoints import write_llama
from modelrig.components import NOTHING_TO_PLAN
from modelrig.errors import GenerateError, PluginError, RequestError
from modelrig.generation.grammars import find
from modelrig.generation.options import GenerateOptions, Grammar
from modelrig.registry import temporary
from rigs import registry
from tokenizer_folders import byte_level, write

IDS = Grammar("ids", "[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("grammars")
    write(made, byte_level(), tokenizer_config__json={"eos_token": "<|endoftext|>"})
    write_llama(made, vocab_size=340, eos_token_id=0)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[modelrig.Model]:
    with modelrig.load(folder, dtype="float32") as loaded:
        yield loaded


# ------------------------------------------------------------------------------------------------ how they are written


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"json_schema": {"type": "string", "const": "é"}}, Grammar("json_schema", '{"type": "string", "const": "é"}')),
        ({"json_schema": True}, Grammar("json_schema", "true")),
        ({"lark": "start: x", "name": "acme:some"}, Grammar("lark", "start: x", "acme:some")),
        ({"name": None, "ids": [[1]]}, Grammar("ids", "[[1]]")),
        (Grammar("regex", "a"), Grammar("regex", "a")),
    ],
)
def test_a_constraint_in_words_is_a_language_and_a_text(given: Any, expected: Grammar) -> None:
    assert expected == GenerateOptions(constraint=given).constraint


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": "x"},
        {"regex": "a", "lark": "b"},
        {"regex": None},
        {"regex": 7},
        {"regex": b"a"},
        {"regex": "\ud800"},
        {"json_schema": {"a": {1, 2}}},
        {"json_schema": {"a": float("nan")}},
        {"regex": "a", "name": 3},
        {3: "a"},
        {"regex": "a" * (1 << 20) + "a"},
        "a+",
        7,
    ],
    ids=lambda given: repr(given)[:30],
)
def test_what_is_no_constraint_is_refused(given: Any) -> None:
    with pytest.raises(GenerateError, match=r'constraint=.*accepted is a language with its text .*"regex"'):
        GenerateOptions(constraint=given)


def test_a_value_that_contains_itself_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(GenerateError, match="GN-ARGS"):
        GenerateOptions(constraint={"json_schema": schema})


# ------------------------------------------------------------------------------------------------ who serves them


def test_the_first_of_those_that_speak_the_language_serves_in_the_order_of_the_registry() -> None:
    installed = registry(
        constraint("other", languages={"regex"}),
        constraint("late", rank=60),
        outside={"acme": [constraint("early", rank=1), constraint("words", languages={"words", "ids"}, rank=70)]},
    )
    assert "modelrig:late" == find(IDS, installed).id  # ours come first
    assert "acme:words" == find(Grammar("words", ""), installed).id
    assert "acme:early" == find(IDS, installed, prefer=["early"]).id
    assert "acme:words" == find(Grammar("ids", "", "words"), installed).id
    assert "acme:words" == find(Grammar("ids", "", "acme:words"), installed).id


def test_one_that_is_not_active_is_passed_over() -> None:
    installed = registry(constraint("first"), constraint("second"), first=("unavailable", "needs x"))
    assert "second" == find(IDS, installed).name


def test_where_nothing_serves_it_is_said_what_is_there_and_what_to_install() -> None:
    installed = registry(
        constraint("words", languages={"words"}),
        constraint("chains", install="pip install chains"),
        chains=("unavailable", "it needs chains"),
    )
    with pytest.raises(GenerateError) as caught:
        find(IDS, installed)
    assert ("GN-CONSTRAINT", "constraint", "pip install chains") == (caught.value.code, caught.value.locus, caught.value.hint)
    assert "in the language 'ids'; did you mean" not in str(caught.value)
    assert "installed: chains (ids; unavailable: it needs chains), words (words)" in str(caught.value)
    with pytest.raises(GenerateError, match=r"'word'; did you mean 'words'\?; .*\nHint: install a plugin that serves it"):
        find(Grammar("word", ""), installed)
    with pytest.raises(GenerateError, match="installed: no component of this kind"):
        find(IDS, registry())


def test_one_that_was_named_serves_or_says_why_not() -> None:
    installed = registry(constraint("chains"), constraint("old"), old=("disabled", "disabled by you"))
    with pytest.raises(GenerateError, match="chains does not serve constraints in the language 'regex'"):
        find(Grammar("regex", "", "chains"), installed)
    with pytest.raises(RequestError, match=r"RQ-NAME.*no component of kind constraints is called 'chain'; did you mean 'chains'\?"):
        find(Grammar("ids", "", "chain"), installed)
    with pytest.raises(PluginError, match="disabled by you"):
        find(Grammar("ids", "", "old"), installed)


# ------------------------------------------------------------------------------------------------ calls


def test_a_call_is_served_by_what_is_installed_then(model: Any) -> None:
    with pytest.raises(GenerateError, match="in the language 'ids'"):
        model.generate("x", constraint={"ids": [[70, 71], [80]]})
    before = ChainCompiler.made
    with temporary(plugin(constraint()), "acme"):
        for how in ({}, {"ignore_eos": True}):
            for found in model.generate(["x", "some more"], constraint={"ids": [[70, 71], [80]]}, **how):
                assert found.tokens[0] in (70, 71)
                assert (80,) == found.tokens[1:2]
                assert ((0,) if not how else ()) == found.tokens[2:] and "stop" == found.finish_reason
    assert 1 == ChainCompiler.made - before  # one for a model


def test_stop_ids_of_the_call_end_a_complete_text_too(model: Any) -> None:
    with temporary(plugin(constraint()), "acme"):
        found = model.generate("x", constraint={"ids": [[70]]}, stop_ids=[9], logit_bias={9: 1e3})
    assert (70, 9) == found.tokens


def test_nothing_of_it_is_planned_and_the_plan_does_not_change(folder: Path) -> None:
    expected = modelrig.plan(folder)
    with temporary(plugin(constraint()), "acme"):
        found = modelrig.plan(folder, prefer=["chains"])
        assert NOTHING_TO_PLAN == constraint().planner
    assert (expected.hash, expected.to_json()["choices"]) == (found.hash, found.to_json()["choices"])
    assert "constraints" not in found.to_json()["choices"]


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("[[340]]", GenerateError, "GN-CONSTRAINT.*an id beyond the vocabulary"),
        ("fails", PluginError, "PL-CONTRACT.*constraint acme:chains failed with ZeroDivisionError: 'a bug'"),
        ("[]", PluginError, "PL-CONTRACT.*compile returned None, which makes no masks"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_and_the_model_goes_on(model: Any, text: str, kind: Any, says: str) -> None:
    with temporary(plugin(constraint()), "acme"), pytest.raises(kind, match=says):
        model.generate("x", constraint={"ids": text})
    assert 3 == len(model.generate("x", max_new_tokens=3, ignore_eos=True).tokens)


def test_one_that_cannot_be_imported_fails_only_who_asked(model: Any) -> None:
    broken = constraint(implementation="no_such_module:Compiler")
    with temporary(plugin(broken), "acme"):
        assert model.generate("x", max_new_tokens=1).tokens
        with pytest.raises(PluginError, match=r"PL-IMPORT.*no_such_module"):
            model.generate("x", constraint={"ids": [[70]]})


def test_a_model_without_a_tokenizer_takes_masks_and_no_grammars(llama_folder: Path) -> None:
    with (
        modelrig.load(llama_folder, dtype="float32") as model,
        temporary(plugin(constraint()), "acme"),
        pytest.raises(GenerateError, match=r"GN-TOKENIZER.*constraint.*cannot follow a grammar of texts"),
    ):
        model.generate([1, 2], constraint={"ids": [[70]]})


@pytest.mark.parametrize(
    ("languages", "says"),
    [
        (set(), "languages is frozenset"),
        ({"name"}, "languages is frozenset.*none 'name'"),
        ({"Regex"}, "languages is"),
        ({7}, "languages is"),
    ],
)
def test_what_a_descriptor_may_not_say(languages: Any, says: str) -> None:
    with pytest.raises(PluginError, match=says), temporary(plugin(constraint(languages=languages)), "acme"):
        pass


def test_other_kinds_cannot_need_anything_of_constraints() -> None:
    with (
        pytest.raises(PluginError, match=r"needs is .*it must map kinds"),
        temporary(plugin(constraint(needs={"constraints": {"x"}})), "acme"),
    ):
        pass
