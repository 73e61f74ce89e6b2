"""Beam search against transformers' at the same weights: the same texts, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import tokens, write_decoder, write_llama
from modelrig.errors import GenerateError, PlanError

EOS = [5, 17, 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beam")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Weights are small, so that what is likely is close together and texts end at different lengths."""
    model = write_llama(folder, eos_token_id=EOS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.6)
    model.save_pretrained(folder)
    return model


def searched(reference: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **how: Any) -> list[list[int]]:
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        do_sample=False,
        pad_token_id=96,
        eos_token_id=EOS,
        **how,
    )
    found = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in EOS), len(row))
        found.append(row[:end])
    return found


def ours(folder: Path, prompts: Any, *, num_beams: int, cache: str = "dynamic", **how: Any) -> list[list[int]]:
    decoder = {
        "name": "beam",
        "num_beams": num_beams,
        **{key: how.pop(key) for key in ("length_penalty", "early_stopping") if key in how},
    }
    with modelrig.load(folder, decoder=decoder, cache=cache, dtype="float32") as model:
        results = model.generate(prompts, **how)
        return [list(one.tokens) for one in (results if isinstance(results, list) else [results])]


@pytest.mark.parametrize(("stopping", "theirs"), [("estimate", False), ("first", True), ("never", "never")])
@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.5, 2.5])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_same_texts_as_transformers(
    folder: Path, reference: Any, num_beams: int, penalty: float, stopping: str, theirs: Any
) -> None:
    ids, returns = tokens(3, 9), min(num_beams, 3)
    how = {"length_penalty": penalty, "max_new_tokens": 24, "num_return_sequences": returns}
    expected = searched(reference, ids, num_beams=num_beams, early_stopping=theirs, **how)
    assert expected == ours(folder, ids, num_beams=num_beams, early_stopping=stopping, **how)
    assert penalty > 1 or len({len(one) for one in expected}) > 1  # some ended before the limit


def test_one_beam_that_stops_at_its_first_end_is_greedy(folder: Path, reference: Any) -> None:
    ids = tokens(3, 9)
    with modelrig.load(folder, dtype="float32") as model:
        greedy = [list(one.tokens) for one in model.generate(ids, max_new_tokens=24)]
    assert greedy == ours(folder, ids, num_beams=1, early_stopping="first", max_new_tokens=24)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_padded_rows_are_searched_as_alone(folder: Path, reference: Any, cache: str) -> None:
    prompts = [tokens(1, count, seed=count)[0].tolist() for count in (3, 11, 7)]
    together = ours(folder, prompts, num_beams=4, cache=cache, max_new_tokens=12)
    alone = [ours(folder, prompt, num_beams=4, cache=cache, max_new_tokens=12)[0] for prompt in prompts]
    assert alone == together
    assert searched(reference, torch.tensor(prompts[:1]), num_beams=4, max_new_tokens=12)[0] == together[0]


def test_penalties_count_each_beams_own_text(folder: Path, reference: Any) -> None:
    ids = tokens(2, 6, seed=4)
    how = {"num_beams": 3, "max_new_tokens": 16, "repetition_penalty": 1.7}
    assert searched(reference, ids, **how) == ours(folder, ids, **how)


@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Gemma3Text"])
def test_other_layers_too(tmp_path: Path, family: str) -> None:
    more: dict[str, Any] = {"sliding_window": 5}
    if family == "Mixtral":
        more |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "Gemma3Text":
        more |= {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    reference = write_decoder(tmp_path, family, **more)
    ids = tokens(2, 9)
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=14, do_sample=False, pad_token_id=0
    )
    for cache in ("dynamic", "sliding"):
        assert expected[:, 9:].tolist() == ours(tmp_path, ids, num_beams=3, cache=cache, max_new_tokens=14)


def test_your_own_cache_holds_the_best_text(folder: Path, reference: Any) -> None:
    prompt = tokens(1, 8)[0].tolist()
    with modelrig.load(folder, decoder="beam", dtype="float32") as model:
        alone = model.generate(prompt, max_new_tokens=10)
        cache = model.new_cache(max_len=64)
        kept = model.generate(prompt, cache=cache, max_new_tokens=10)
        assert alone.tokens == kept.tokens
        assert len(prompt) + len(kept.tokens) == cache.length
        expected = model(torch.tensor([[*prompt, *kept.tokens, 3]]))[:, -1]
        torch.testing.assert_close(expected, model(torch.tensor([[3]]), cache=cache)[:, -1])
        two = model.new_cache(batch=2, max_len=64)
        best = model.generate(prompt, cache=two, max_new_tokens=10, num_return_sequences=2)
        assert [one.tokens for one in model.generate(prompt, max_new_tokens=10, num_return_sequences=2)] == [
            one.tokens for one in best
        ]


@pytest.mark.parametrize("bias", [-1e9, 1e9])
def test_the_largest_bias_neither_ends_a_beam_nor_wakes_a_dead_one(tmp_path: Path, bias: float) -> None:
    """What all tokens get alike changes nothing but how float32 rounds."""
    write_llama(tmp_path, vocab_size=5)
    with modelrig.load(tmp_path, dtype="float32", decoder={"name": "beam", "num_beams": 4}) as model:
        rows = model.generate([0], max_new_tokens=3, num_return_sequences=4, logit_bias=dict.fromkeys(range(5), bias))
    assert 4 == len({row.tokens for row in rows}) and all(3 == len(row.tokens) for row in rows)


def test_a_stream_has_all_at_its_end(folder: Path, reference: Any) -> None:
    with modelrig.load(folder, decoder="beam", dtype="float32") as model:
        pieces = list(model.stream([3, 4, 5], max_new_tokens=9))
        assert [model.generate([3, 4, 5], max_new_tokens=9).tokens] == [piece.tokens for piece in pieces]
        assert pieces[0].finish_reason in ("stop", "length")


def test_with_a_temperature_beams_are_drawn_and_a_seed_draws_them_again(folder: Path, reference: Any) -> None:
    with modelrig.load(folder, decoder="beam", dtype="float32") as model:
        first, again, other = (
            [one.tokens for one in model.generate([[3, 4, 5], [6, 7]], max_new_tokens=9, temperature=1.5, seed=seed)]
            for seed in (1, 1, 2)
        )
        assert first == again != other
        cold = model.generate([3, 4, 5], max_new_tokens=9, temperature=1e-4, seed=1)
        assert cold.tokens == model.generate([3, 4, 5], max_new_tokens=9, temperature=1e-4, seed=2).tokens


def test_more_texts_than_beams_are_refused(folder: Path, reference: Any) -> None:
    with modelrig.load(folder, decoder={"name": "beam", "num_beams": 2}) as model:
        with pytest.raises(GenerateError, match="3 texts are wanted of a search with 2 beams"):
            model.generate([3], num_return_sequences=3)
        assert 5 == len(model.generate([3], max_new_tokens=5, ignore_eos=True).tokens)


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"num_beams": 0}, "decoder.num_beams"),
        ({"num_beams": 1000}, "decoder.num_beams"),
        ({"length_penalty": 1e9}, "decoder.length_penalty"),
        ({"early_stopping": "yes"}, "decoder.early_stopping"),
    ],
)
def test_impossible_options_are_refused(folder: Path, reference: Any, option: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError, match=code):
        modelrig.plan(folder, decoder={"name": "beam", **option})


def test_the_plan_counts_every_beam(folder: Path, reference: Any) -> None:
    def cache_bytes(**request: Any) -> int:
        return modelrig.plan(folder, **request).ledger.bytes_of("key/value cache", "cpu", "run")

    assert 6 * cache_bytes() == cache_bytes(decoder={"name": "beam", "num_beams": 5})


def test_drawn_beams_are_the_same_in_a_cache_of_yours(folder: Path, reference: Any) -> None:
    with modelrig.load(folder, decoder="beam", dtype="float32") as model:
        how: dict[str, Any] = {"max_new_tokens": 8, "num_return_sequences": 2, "temperature": 1.2, "seed": 3}
        cache = model.new_cache(batch=2, max_len=40)
        assert [one.tokens for one in model.generate([3, 4, 5], **how)] == [
            one.tokens for one in model.generate([3, 4, 5], cache=cache, **how)
        ]
