"""Decoders that draft: the tokens of plain decoding, in fewer steps, whatever the drafts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelrig
from checkpoints import TINY_LLAMA, tokens, write_bert, write_decoder, write_llama
from modelrig.errors import PlanError
from modelrig.generation.decoding import DraftLength
from modelrig_plugins.decoders.prompt_lookup_module import Text
from tokenizer_folders import byte_level, write

DECODERS = ("prompt_lookup", "draft_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose text repeats itself, so that drafts are right for a while."""
    made = tmp_path_factory.mktemp("large")
    write_llama(made, eos_token_id=[11], max_position_embeddings=400)
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same model with its last block nearly gone: right now and then."""
    made = tmp_path_factory.mktemp("small")
    model = write_llama(made, eos_token_id=[11], max_position_embeddings=400)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2." in name and "proj" in name:
                parameter.mul_(0.3)
    model.save_pretrained(made)
    return made


def decoder(name: str, small: Path, **more: Any) -> dict[str, Any]:
    return {"name": name, **({"model": str(small)} if name == "draft_model" else {}), "least_gain": 0.0, **more}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[modelrig.Model]:
    with modelrig.load(folder, dtype="float32", context=300) as model:
        yield model


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_do_not_change_and_steps_are_saved(folder: Path, small: Path, plain: Any, name: str, cache: str) -> None:
    prompt = tokens(1, 9, seed=2)[0].tolist() * 3
    expected = plain.generate(prompt, max_new_tokens=120, ignore_eos=True)
    with modelrig.load(folder, dtype="float32", context=300, cache=cache, decoder=decoder(name, small)) as model:
        found = model.generate(prompt, max_new_tokens=120, ignore_eos=True)
    assert expected.tokens == found.tokens
    assert found.stats.accepted_tokens > 0 < found.stats.drafted_tokens
    assert found.stats.steps < expected.stats.steps == 119


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_a_padded_batch_are_as_alone(folder: Path, small: Path, plain: Any, name: str, cache: str) -> None:
    """Rows accept different numbers of drafts, and end at different places."""
    prompts = [tokens(1, count, seed=count)[0].tolist() for count in (3, 17, 8, 11)]
    prompts[1] = prompts[1][:5] * 6
    expected = [plain.generate(prompt, max_new_tokens=70) for prompt in prompts]
    assert len({len(one.tokens) for one in expected}) > 1
    with modelrig.load(folder, dtype="float32", context=300, cache=cache, decoder=decoder(name, small)) as model:
        found = model.generate(prompts, max_new_tokens=70)
        assert [one.tokens for one in expected] == [one.tokens for one in found]
        assert [one.finish_reason for one in expected] == [one.finish_reason for one in found]
        streamed: list[list[int]] = [[] for _ in prompts]
        for piece in model.stream(prompts, max_new_tokens=70):
            streamed[piece.row] += piece.tokens
        assert [list(one.tokens) for one in expected] == streamed


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "how",
    [
        {"max_new_tokens": 7},
        {"max_new_tokens": 1},
        {"stop_ids": [30, 31, 32, 33, 34]},
        {"max_new_tokens": 90, "min_new_tokens": 60},
        {"max_new_tokens": 60, "repetition_penalty": 1.3},
        {"max_new_tokens": 60, "frequency_penalty": 0.9, "presence_penalty": 0.4, "logit_bias": {5: 3.0}},
        {"max_new_tokens": 60, "temperature": 0.7, "seed": 4, "ignore_eos": True},
        {"max_new_tokens": 60, "temperature": 1.1, "top_k": 7, "top_p": 0.8, "seed": 9},
        {"max_new_tokens": 30, "temperature": 0.6, "seed": 2, "num_return_sequences": 3},
        {"max_new_tokens": 30, "pad_to_multiple_of": 16},
    ],
    ids=str,
)
def test_every_option_does_what_it_does_without_drafts(
    folder: Path, small: Path, plain: Any, name: str, how: dict[str, Any]
) -> None:
    """A draw with a seed is the same draw too: noise is spent on what is chosen, not on what was drafted."""
    prompt = tokens(1, 7, seed=3)[0].tolist() * 2
    expected, found = plain.generate(prompt, **how), None
    with modelrig.load(folder, dtype="float32", context=300, decoder=decoder(name, small)) as model:
        found = model.generate(prompt, **how)
    if not isinstance(expected, list):
        expected, found = [expected], [found]
    assert [(one.tokens, one.finish_reason) for one in expected] == [(one.tokens, one.finish_reason) for one in found]


@pytest.mark.parametrize("name", DECODERS)
def test_a_full_context_ends_the_text_where_it_would_without_drafts(folder: Path, small: Path, name: str) -> None:
    prompt = tokens(1, 5, seed=8)[0].tolist() * 4
    results = []
    for one in ("greedy", decoder(name, small)):
        with modelrig.load(folder, dtype="float32", context=64, decoder=one) as model:
            results.append(model.generate(prompt, ignore_eos=True).tokens)
            cache = model.new_cache(max_len=40)
            results.append(model.generate(prompt, cache=cache, ignore_eos=True).tokens)
            assert 40 == cache.length
    assert results[:2] == results[2:]
    assert [45, 20] == [len(one) for one in results[:2]]


@pytest.mark.parametrize("name", DECODERS)
def test_turns_of_a_session_and_your_own_cache_continue_exactly(folder: Path, small: Path, plain: Any, name: str) -> None:
    turns = [tokens(1, count, seed=count)[0].tolist() for count in (6, 3, 9)]
    with modelrig.load(folder, dtype="float32", context=300, decoder=decoder(name, small)) as model:
        for make in ("session", "cache"):
            texts = []
            for one in (plain, model):
                if make == "session":
                    session = one.session()
                    texts.append([session.generate([turn], max_new_tokens=20).tokens for turn in turns])
                else:
                    cache = one.new_cache(max_len=200)
                    texts.append([one.generate(turn, cache=cache, max_new_tokens=20).tokens for turn in turns])
                    assert cache.length == sum(map(len, turns)) + sum(map(len, texts[-1]))
            assert texts[0] == texts[1]


@pytest.mark.parametrize("name", DECODERS)
def test_rows_in_a_cache_of_yours_hold_their_whole_answers(folder: Path, small: Path, name: str) -> None:
    prompts = [tokens(1, 8, seed=seed)[0].tolist() for seed in (5, 21, 34)]
    with modelrig.load(folder, dtype="float32", context=300, decoder=decoder(name, small)) as model:
        cache = model.new_cache(batch=3, max_len=120)
        results = model.generate(prompts, cache=cache, max_new_tokens=60)
        longest = max(len(one.tokens) for one in results)
        assert cache.length >= 8 + longest
        for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            whole = model(torch.tensor([[*prompt, *result.tokens]]))[0, -1]
            alone = model.new_cache(batch=3, max_len=120)
            alone.adopt(cache.export())
            alone.rewind(8 + len(result.tokens) - 1)
            last = torch.tensor([[one.tokens[min(len(result.tokens), len(one.tokens)) - 1]] for one in results])
            torch.testing.assert_close(whole, model(last, cache=alone)[row, -1], rtol=1e-4, atol=1e-4)


def test_a_stop_string_within_drafts_is_not_leaked(tmp_path: Path, small: Path) -> None:
    large, little = tmp_path / "large", tmp_path / "small"
    for place, scale in ((large, 1.0), (little, 0.5)):
        model = write_llama(place, vocab_size=340, max_position_embeddings=400)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers.2." in name and "proj" in name:
                    parameter.mul_(scale)
        model.save_pretrained(place)
        write(place, byte_level())
    with modelrig.load(large, dtype="float32") as plain:
        whole = plain.generate("ab", max_new_tokens=60, ignore_eos=True).text
        stops = [whole[len(whole) // 2 : len(whole) // 2 + 3]]
        expected = plain.generate("ab", max_new_tokens=60, ignore_eos=True, stop=stops)
    for name in DECODERS:
        with modelrig.load(large, dtype="float32", decoder=decoder(name, little)) as model:
            pieces = [piece.text for piece in model.stream("ab", max_new_tokens=60, ignore_eos=True, stop=stops)]
            found = model.generate("ab", max_new_tokens=60, ignore_eos=True, stop=stops)
        assert (expected.text, expected.tokens, "stop") == (found.text, found.tokens, found.finish_reason)
        assert expected.text == "".join(pieces)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Mistral", {"sliding_window": 6}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (
            "Gemma3Text",
            {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 32}),
    ],
)
def test_models_of_every_kind(tmp_path: Path, family: str, more: dict[str, Any], name: str) -> None:
    """With dynamic rope a step of several tokens beyond the trained length is another computation, so none is taken there."""
    write_decoder(tmp_path, family, **more)
    prompt = tokens(2, 9).tolist()
    for cache in ("dynamic", "static", "sliding"):
        with modelrig.load(tmp_path, dtype="float32", context=100, cache=cache) as model:
            expected = [one.tokens for one in model.generate(prompt, max_new_tokens=50)]
        with modelrig.load(tmp_path, dtype="float32", context=100, cache=cache, decoder=decoder(name, tmp_path)) as model:
            assert expected == [one.tokens for one in model.generate(prompt, max_new_tokens=50)]


def test_phi3_restarts_between_drafts(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.5] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    write_decoder(tmp_path, "Phi3", rope_parameters=rope, original_max_position_embeddings=24)
    prompts = [tokens(1, 9, seed=1)[0].tolist(), tokens(1, 14, seed=2)[0].tolist()]
    with modelrig.load(tmp_path, dtype="float32", context=100) as model:
        expected = [one.tokens for one in model.generate(prompts, max_new_tokens=40)]
    for name in DECODERS:
        with modelrig.load(tmp_path, dtype="float32", context=100, decoder=decoder(name, tmp_path)) as model:
            found = model.generate(prompts, max_new_tokens=40)
        assert expected == [one.tokens for one in found] and (found[0].stats.steps < 39 or name == "prompt_lookup")


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_drawn_has_the_models_distribution(tmp_path: Path, name: str) -> None:
    """Chi-squared over the pairs of the first two tokens, of a vocabulary of five."""
    large, little = tmp_path / "large", tmp_path / "small"
    write_llama(large, vocab_size=5)
    write_llama(little, vocab_size=5, seed=3)
    prompt, drawn = [0, 1, 2, 0, 1, 2, 0, 1], 3000
    with modelrig.load(large, dtype="float32", decoder=decoder(name, little)) as model:
        results = model.generate(
            [prompt] * 500, max_new_tokens=3, temperature=2.0, seed=list(range(0, 5000, 10)), num_return_sequences=6
        )
        assert sum(one.stats.accepted_tokens for one in results) > 50
        counts = Counter(one.tokens[1:] for one in results)
        first = torch.softmax(model(torch.tensor([prompt]))[0, -1].double() / 2, -1)
        expected = torch.zeros(5, 5, dtype=torch.float64)
        for token in range(5):
            second = torch.softmax(model(torch.tensor([[*prompt, token]]))[0, -1].double() / 2, -1)
            for next_token in range(5):
                third = torch.softmax(model(torch.tensor([[*prompt, token, next_token]]))[0, -1].double() / 2, -1)
                expected[next_token] += first[token] * second[next_token] * third
    seen = torch.tensor([[counts[(a, b)] for b in range(5)] for a in range(5)], dtype=torch.float64)
    statistic = float(((seen - drawn * expected) ** 2 / (drawn * expected)).sum())
    assert statistic < 51.2  # one in a thousand at 24 degrees of freedom


# ------------------------------------------------------------------------------------------------ how far ahead


def test_drafting_pauses_when_it_gains_nothing_and_tries_again_ever_more_rarely() -> None:
    length, tried, total = DraftLength(most=8, least_gain=0.5), [], 0
    while total < 3000:
        if drafted := length.now(total):
            tried.append(total)
            length.learn(drafted, 0, total)
        total += 1
    assert tried[0] == 0 and len(tried) < 12
    gaps = [b - a for a, b in pairwise(tried)]
    assert gaps == sorted(gaps) and gaps[-1] >= 1000


def test_drafting_goes_further_while_it_is_right_and_less_far_once_it_is_not() -> None:
    length = DraftLength(most=12, least_gain=0.5)
    assert 4 == length.now(0)
    length.learn(4, 4, 5)
    assert 8 == length.now(5)
    length.learn(8, 8, 14)
    assert 12 == length.now(14)
    length.learn(12, 1, 16)
    assert 2 == length.now(16)


def test_a_model_that_copies_nothing_is_asked_for_few_verifications(folder: Path, plain: Any) -> None:
    how = {"max_new_tokens": 250, "temperature": 5.0, "seed": 1, "ignore_eos": True}
    with modelrig.load(folder, dtype="float32", context=300, decoder="prompt_lookup") as model:
        found = model.generate([1, 2, 3], **how)
    assert plain.generate([1, 2, 3], **how).tokens == found.tokens
    assert found.stats.drafted_tokens <= 60


# ------------------------------------------------------------------------------------------------ looking up


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), cut=st.integers(0, 40), shortest=st.integers(1, 3))
def test_what_is_looked_up_followed_the_longest_latest_match(ids: list[int], cut: int, shortest: int) -> None:
    longest = shortest + 2
    text = Text(ids[:cut], shortest, longest)
    text.extend(ids[cut:])
    expected: list[int] = []
    for size in range(longest, shortest - 1, -1):
        matches = [at for at in range(len(ids) - size) if ids[at : at + size] == ids[-size:]]
        if matches and size <= len(ids):
            extended = [*ids]
            for number in range(6):
                extended.append(extended[matches[-1] + size + number])
            expected = extended[len(ids) :]
            break
    assert expected == text.lookup(6)


# ------------------------------------------------------------------------------------------------ the plan


def test_a_draft_model_is_planned_counted_and_shown(folder: Path, small: Path) -> None:
    alone = modelrig.plan(folder)
    plan = modelrig.plan(folder, decoder=decoder("draft_model", small))
    other = plan.companions["draft"]
    assert str(small) == other.reference and alone.hash != plan.hash
    assert alone.ledger.total("run") + other.ledger.total("run") == plan.ledger.total("run")
    assert plan.to_json()["companions"]["draft"]["hash"] == other.hash
    assert "draft model" in plan.explain() and "draft: weights, mapped from their files" in plan.explain()
    assert ["draft"] == sorted({line["model"] for line in plan.to_json()["ledger"] if "model" in line})


def test_a_draft_model_that_does_not_fit_is_refused(folder: Path, small: Path) -> None:
    limit = modelrig.plan(folder, context=16).ledger.total("run") + 1000
    modelrig.plan(folder, context=16, max_memory=limit)
    with pytest.raises(PlanError, match="RL-MEM"):
        modelrig.plan(folder, context=16, max_memory=limit, decoder=decoder("draft_model", small))


def test_what_was_asked_for_the_model_is_not_asked_of_its_draft(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELRIG_DECODER", "draft_model")
    monkeypatch.setenv("MODELRIG_CACHE", "static")
    plan = modelrig.plan(folder, set={"decoder.model": str(small)})
    assert ("draft_model", "static") == (plan.choices["decoders"].name, plan.choices["caches"].name)
    assert ("greedy", "dynamic") == tuple(plan.companions["draft"].choices[kind].name for kind in ("decoders", "caches"))


def test_models_that_cannot_draft_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    write_bert(tmp_path / "encoder")
    write_llama(tmp_path / "other", vocab_size=50)
    cases = {
        str(tmp_path / "encoder"): "generates no text",
        str(tmp_path / "other"): "has a vocabulary of 50 ids, this model one of 97",
        str(tmp_path / "nowhere"): "nowhere",
        "": "no model that drafts was named",
    }
    for model, why in cases.items():
        with pytest.raises(modelrig.errors.ModelrigError, match=why):
            modelrig.plan(folder, decoder={"name": "draft_model", "model": model})


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, texts in (("a", None), ("b", ["zyx wvu tsr"] * 9)):
        write_llama(tmp_path / name, **{**TINY_LLAMA, "vocab_size": 340})
        write(tmp_path / name, byte_level() if texts is None else byte_level(texts))
    with pytest.raises(PlanError, match="has another tokenizer"):
        modelrig.plan(tmp_path / "a", decoder={"name": "draft_model", "model": str(tmp_path / "b")})


@pytest.mark.parametrize(("large", "little"), [(340, 352), (352, 340)])
def test_vocabularies_may_be_padded_differently(tmp_path: Path, large: int, little: int) -> None:
    """As those of a family's small and large models are: the tokenizer is one."""
    for name, size in (("large", large), ("little", little)):
        write_llama(tmp_path / name, vocab_size=size)
        write(tmp_path / name, byte_level())
    prompt = [3, 4, 5, 350 % large]
    with modelrig.load(tmp_path / "large", dtype="float32", context=100) as plain:
        expected = plain.generate(prompt, max_new_tokens=60, ignore_eos=True).tokens
    with modelrig.load(
        tmp_path / "large", dtype="float32", context=100, decoder=decoder("draft_model", tmp_path / "little")
    ) as model:
        assert expected == model.generate(prompt, max_new_tokens=60, ignore_eos=True).tokens


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("prompt_lookup", {"num_tokens": 0}),
        ("prompt_lookup", {"min_ngram": 4, "max_ngram": 3}),
        ("prompt_lookup", {"max_ngram": 99}),
        ("prompt_lookup", {"least_gain": -1.0}),
        ("draft_model", {"num_tokens": 65}),
        ("draft_model", {"least_gain": float("nan")}),
    ],
)
def test_impossible_options_are_refused(folder: Path, small: Path, name: str, option: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"decoder\.(num_tokens|ngram|least_gain)"):
        modelrig.plan(folder, decoder=decoder(name, small, **option))
