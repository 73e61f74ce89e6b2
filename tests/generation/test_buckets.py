"""`pad_to_multiple_of`: prompts are padded on the left to a multiple, and the text is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelrig
from checkpoints import tokens


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Iterator[modelrig.Model]:
    with modelrig.load(llama_folder, context=40) as made:
        yield made


@pytest.mark.parametrize("count", [1, 7, 8, 9, 25])
@pytest.mark.parametrize("multiple", [1, 8, 1000])
def test_the_text_is_the_same(model: modelrig.Model, count: int, multiple: int) -> None:
    prompt = tokens(1, count, seed=count)[0].tolist()
    expected = model.generate(prompt, max_new_tokens=12)
    found = model.generate(prompt, max_new_tokens=12, pad_to_multiple_of=multiple)
    assert (expected.tokens, expected.stats.prompt_tokens) == (found.tokens, found.stats.prompt_tokens)


def test_steps_have_the_rounded_lengths_where_they_fit(model: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    step = model.step
    monkeypatch.setattr(model, "_step", lambda ids, *more: (shapes.append(tuple(ids.shape)), step(ids, *more))[1])
    model.generate([[1, 2, 3], [4] * 9], max_new_tokens=1, pad_to_multiple_of=8)
    model.generate([5] * 16, max_new_tokens=1, pad_to_multiple_of=8)
    model.generate([5] * 17, max_new_tokens=20, pad_to_multiple_of=32)  # 32 and 20 would be more than the context holds
    assert [(2, 16), (1, 16), (1, 21)] == [shape for shape in shapes if shape[1] > 1]


def test_every_bucket_is_padded_as_far_as_a_graph_can_tell(model: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[bool] = []
    step = model.step
    monkeypatch.setattr(
        model, "_step", lambda ids, slots, *more: (masked.append(slots.starts is not None), step(ids, slots, *more))[1]
    )
    for count in (15, 16):
        model.generate([5] * count, max_new_tokens=2, pad_to_multiple_of=16)
    assert {True} == set(masked)
    masked.clear()
    model.generate([5] * 16, max_new_tokens=2)
    assert {False} == set(masked)


def test_a_cache_of_yours_is_padded_at_its_beginning_only(model: modelrig.Model) -> None:
    found: list[Any] = []
    for multiple in (None, 8):
        cache = model.new_cache(max_len=40)
        turns = [model.generate(ids, cache=cache, max_new_tokens=4, pad_to_multiple_of=multiple).tokens for ids in ([3, 4, 5], [6])]
        found.append((turns, cache.length))
    assert found[0][0] == found[1][0]
    assert (12, 17) == (found[0][1], found[1][1])
