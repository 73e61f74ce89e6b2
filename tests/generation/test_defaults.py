"""Options of a call over generation_config.json: what is given counts, None too; what is left out is as the file says."""

from __future__ import annotations

from typing import Any

import pytest

from modelrig.errors import GenerateError
from modelrig.generation.defaults import Call
from modelrig.generation.options import DEFAULT_NEW_TOKENS, GenerateOptions
from modelrig.planning.generation_config import GenerationConfig, Sourced

PENALTY = {"repetition_penalty": 1.3}
SHAPE = {"top_k": 5, "top_p": 0.9, "min_p": 0.1}
NOTHING = dict.fromkeys(SHAPE)


def call(said: dict[str, Any], **given: Any) -> Call:
    return Call.make(GenerationConfig(values={key: Sourced(value, "file") for key, value in said.items()}), given)


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ({}, {}, {"repetition_penalty": None, "min_new_tokens": 0, **NOTHING}),
        (PENALTY, {}, PENALTY),
        (PENALTY, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        (PENALTY, {"repetition_penalty": None}, {"repetition_penalty": None}),
        (PENALTY, {"temperature": 0.7}, PENALTY),
        (SHAPE, {}, NOTHING),
        (SHAPE, {"temperature": 0}, NOTHING),
        (SHAPE, {"temperature": 0.7}, SHAPE),
        (SHAPE, {"temperature": 0.7, "top_k": None, "top_p": 0.5, "min_p": 0}, {"top_k": None, "top_p": 0.5, "min_p": 0.0}),
        ({"top_k": 0}, {"temperature": 0.7}, {"top_k": None}),
        ({"do_sample": True, "temperature": 0.6}, {}, {"temperature": None}),
        ({"temperature": 0.6}, {"temperature": 0.9}, {"temperature": 0.9}),
        ({"min_new_tokens": 8}, {}, {"min_new_tokens": 8}),
        ({"min_new_tokens": 8}, {"min_new_tokens": 0}, {"min_new_tokens": 0}),
        ({"min_new_tokens": 8}, {"max_new_tokens": 5}, {"min_new_tokens": 5, "max_new_tokens": 5}),
    ],
    ids=str,
)
def test_what_is_given_counts_and_what_is_left_out_is_as_the_file_says(
    said: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    options = call(said, **given).options
    assert expected == {name: getattr(options, name) for name in expected}


def test_without_a_file_the_options_are_those_that_were_given() -> None:
    assert GenerateOptions.make(temperature=0.5, top_k=3) == call({}, temperature=0.5, top_k=3).options


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ({}, {}, DEFAULT_NEW_TOKENS),
        ({"max_new_tokens": 17}, {}, 17),
        ({"max_new_tokens": 17}, {"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 17}, {"max_new_tokens": None}, DEFAULT_NEW_TOKENS),
        ({"max_new_tokens": 17}, {"min_new_tokens": 30}, 30),
        ({"max_new_tokens": 10_000}, {}, 990),  # cut to what fits: nobody asked for it
        ({"max_length": 64}, {}, 54),
        ({"max_length": 64}, {"max_new_tokens": None}, DEFAULT_NEW_TOKENS),
        ({"max_length": 64, "max_new_tokens": 17}, {}, 17),
        ({"max_length": 10}, {}, DEFAULT_NEW_TOKENS),  # the prompt has used it up
        ({"max_length": 100_000}, {}, 990),
        ({"min_new_tokens": 300}, {}, 300),
        ({"min_new_tokens": 5000}, {}, 990),
        ({"min_new_tokens": 30, "max_new_tokens": 17}, {}, 17),
    ],
    ids=str,
)
def test_the_length_of_an_answer(said: dict[str, Any], given: dict[str, Any], expected: int) -> None:
    assert expected == call(said, **given).limit(10, 0, 1000, 2000, unfed=0)
    assert expected == call(said, **given).limit(4, 6, 1000, 2000, unfed=0)


def test_what_was_asked_for_and_does_not_fit_is_an_error_still() -> None:
    for given in ({"max_new_tokens": 2000}, {"min_new_tokens": 2000}):
        with pytest.raises(GenerateError, match="GN-CONTEXT"):
            call({"max_new_tokens": 17}, **given).limit(10, 0, 1000, 2000, unfed=0)


def test_errors_are_about_what_was_given() -> None:
    with pytest.raises(GenerateError, match="GN-UNKNOWN"):
        call(PENALTY, repetition_penalti=1)
    with pytest.raises(GenerateError, match="min_new_tokens=9"):
        call({"max_new_tokens": 17}, min_new_tokens=9, max_new_tokens=8)
