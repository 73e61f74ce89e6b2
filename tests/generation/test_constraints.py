"""Masks of tokens: whatever decodes, what comes is what the mask allows, and the mask is asked as its protocol says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from automata import Automaton, chain, cycle
from checkpoints import TINY_LLAMA, tokens, write_llama
from modelrig.errors import GenerateError
from modelrig.generation.constraints import Constraints, allow
from modelrig.generation.options import GenerateOptions
from modelrig.generation.sampling import Sampler
from tokenizer_folders import byte_level, write

EOS = 5
A, B, C = range(10, 20), range(20, 30), range(30, 32)
VOCAB = TINY_LLAMA["vocab_size"]  # 97: the last number of the bits has one token and 31 bits of nothing
CPU = torch.device("cpu")


def rounds() -> Automaton:
    """(A B C)+, ended by the end-of-text id."""
    moves = {**cycle(A, B, C), 3: dict.fromkeys(A, 1)}
    moves[2] = dict.fromkeys(C, 3)
    return Automaton(moves, finals={3}, ends=[EOS])


def is_rounds(ids: Sequence[int], is_whole: bool) -> bool:
    text = [*ids[:-1]] if ids and ids[-1] == EOS else [*ids]
    if is_whole and (len(text) % 3 or not text):
        return False
    return all(token in (A, B, C)[place % 3] for place, token in enumerate(text)) and (len(text) % 3 == 0 or EOS not in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("constrained")
    write_llama(made, eos_token_id=EOS)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[modelrig.Model]:
    with modelrig.load(folder, dtype="float32") as loaded:
        yield loaded


DECODERS: dict[str, Callable[[Path], Any]] = {
    "auto": lambda folder: "auto",
    "beam": lambda folder: {"name": "beam", "num_beams": 3},
    "prompt_lookup": lambda folder: {"name": "prompt_lookup", "min_ngram": 1, "least_gain": 0.0},
    "draft_model": lambda folder: {"name": "draft_model", "model": str(folder), "least_gain": 0.0},
}


def prompts() -> list[list[int]]:
    """Of different lengths, and with what the constraint allows in them, so that drafts are looked up."""
    rows = tokens(3, 12, seed=4).tolist()
    return [rows[0], [*rows[1][:5], 10, 20, 30, 11, 21, 31, 10], rows[2][:3]]


# ------------------------------------------------------------------------------------------------ every decoder


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_what_comes_is_allowed_whatever_decodes(folder: Path, name: str, cache: str) -> None:
    ends = set()
    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder), cache=cache) as model:
        for seed in range(8):
            how = {} if seed == 0 else {"temperature": 1.5, "seed": seed}
            for result in model.generate(prompts(), constraint=rounds, max_new_tokens=22, **how):
                ends.add(result.finish_reason)
                assert is_rounds(result.tokens, is_whole=result.finish_reason == "stop")
    assert {"stop", "length"} == ends


@pytest.mark.parametrize("name", ["prompt_lookup", "draft_model"])
def test_drafts_change_no_token_that_is_constrained(folder: Path, model: Any, name: str) -> None:
    how: dict[str, Any] = {"constraint": rounds, "max_new_tokens": 40, "logit_bias": {EOS: -1e3}}
    expected = model.generate(prompts(), **how)
    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder)) as drafting:
        found = drafting.generate(prompts(), **how)
    assert [one.tokens for one in expected] == [one.tokens for one in found]
    assert sum(one.stats.drafted_tokens for one in found) > 0
    assert found[0].stats.steps < expected[0].stats.steps


def test_greedy_tokens_are_the_most_likely_of_those_allowed(model: Any) -> None:
    prompt, mask, expected = prompts()[0], rounds(), []
    for _ in range(12):
        logits = model(torch.tensor([prompt + expected]))[0, -1]
        allowed = sorted(mask.allowed())
        expected.append(max(allowed, key=lambda token: float(logits[token])))
        if expected[-1] == EOS:
            break
        mask.accept(expected[-1])
    assert tuple(expected) == model.generate(prompt, constraint=rounds, max_new_tokens=12).tokens


def test_beams_find_the_best_text_there_is_where_all_can_be_looked_at(folder: Path, model: Any) -> None:
    prompt, groups = prompts()[0], (range(10, 12), range(20, 22), range(30, 32))
    texts = [[a, b, c] for a in groups[0] for b in groups[1] for c in groups[2]]

    def likelihood(text: list[int]) -> float:
        logits = torch.log_softmax(model(torch.tensor([prompt + text]))[0].double(), dim=-1)
        return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(text))

    ranked = sorted(texts, key=likelihood, reverse=True)
    with modelrig.load(folder, dtype="float32", decoder={"name": "beam", "num_beams": 8}) as searching:
        found = searching.generate(
            prompt, constraint=lambda: Automaton(chain(*groups), lasts={3}), max_new_tokens=9, num_return_sequences=8
        )
    assert [tuple(text) for text in ranked] == [one.tokens for one in found]
    assert {"stop"} == {one.finish_reason for one in found}


@pytest.mark.parametrize("name", DECODERS)
def test_a_row_of_a_batch_gives_what_it_gives_alone(folder: Path, name: str) -> None:
    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder)) as model:
        together = model.generate(prompts(), constraint=rounds, max_new_tokens=15)
        alone = [model.generate(prompt, constraint=rounds, max_new_tokens=15) for prompt in prompts()]
    assert [one.tokens for one in alone] == [one.tokens for one in together]


def test_a_stream_and_the_turns_of_a_session_each_begin_the_constraint_anew(model: Any) -> None:
    expected = model.generate(prompts()[1], constraint=rounds, max_new_tokens=9)
    pieces = list(model.stream(prompts()[1], constraint=rounds, max_new_tokens=9))
    assert expected.tokens == tuple(token for piece in pieces for token in piece.tokens)
    session = model.session()
    for prompt in prompts():
        answer = session.generate(prompt, constraint=rounds, max_new_tokens=9)
        assert is_rounds(answer.tokens, is_whole=answer.finish_reason == "stop")


# ------------------------------------------------------------------------------------------------ where a text ends


@pytest.mark.parametrize("name", DECODERS)
def test_a_text_that_is_over_ends_its_row_without_an_end_of_text_id(folder: Path, name: str) -> None:
    made = iter(range(100))
    rows = 3 if name == "beam" else 1  # masks of a prompt are alike

    def make() -> Automaton:  # prompts whose texts end after 1, 2, 3 ids
        count = 1 + next(made) // rows % 3
        return Automaton(chain(*[A] * count), lasts={count})

    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder)) as model:
        found = model.generate(prompts(), constraint=make, max_new_tokens=9)
    assert {"stop"} == {one.finish_reason for one in found}
    assert [1, 2, 3] == [len(one.tokens) for one in found]
    assert all(set(one.tokens) <= set(A) for one in found)


@pytest.mark.parametrize("name", DECODERS)
def test_a_complete_text_ends_before_min_new_tokens_and_no_other_does(folder: Path, name: str) -> None:
    def three() -> Automaton:
        return Automaton(chain(A, B, C), finals={3}, ends=[EOS])

    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder)) as model:
        for how in ({}, {"temperature": 1.0, "seed": 1}):
            (short,) = model.generate([prompts()[0]], constraint=three, min_new_tokens=8, **how)
            assert (4, "stop", EOS) == (len(short.tokens), short.finish_reason, short.tokens[-1])
            longer = model.generate(prompts()[0], constraint=rounds, min_new_tokens=10, max_new_tokens=30, **how)
            assert len(longer.tokens) >= 10 and EOS not in longer.tokens[:10]
            assert is_rounds(longer.tokens, is_whole=longer.finish_reason == "stop")


def test_the_held_back_text_of_a_row_that_is_over_is_shown(tmp_path: Path) -> None:
    tokenizer = byte_level()
    write(tmp_path, tokenizer)
    write_llama(tmp_path, vocab_size=340)
    word = tokenizer.encode("returned ab", add_special_tokens=False).ids
    with modelrig.load(tmp_path, dtype="float32") as model:
        found = model.generate(
            "x", constraint=lambda: Automaton(chain(*[[one] for one in word]), lasts={len(word)}), stop="able", max_new_tokens=20
        )
    assert ("returned ab", "stop") == (found.text, found.finish_reason)


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("name", DECODERS)
def test_a_dead_end_is_an_error_and_the_model_goes_on(folder: Path, name: str) -> None:
    with modelrig.load(folder, dtype="float32", decoder=DECODERS[name](folder)) as model:
        expected = model.generate(prompts()[0], max_new_tokens=5).tokens
        for how in ({}, {"temperature": 1.0}):
            with pytest.raises(GenerateError, match=r"no token may follow 2 new ones in row \d") as caught:
                model.generate(prompts(), constraint=lambda: Automaton(chain(A, B)), max_new_tokens=5, **how)
            assert "GN-CONSTRAINT" == caught.value.code
        assert expected == model.generate(prompts()[0], max_new_tokens=5).tokens


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_a_beam_at_a_dead_end_is_given_up_and_the_others_go_on(folder: Path, how: dict[str, Any]) -> None:
    moves = {0: {**dict.fromkeys(A, 9), **dict.fromkeys(B, 1)}, 1: dict.fromkeys(C, 2)}  # nothing follows any of A

    def make() -> Automaton:
        return Automaton(moves, lasts={2})

    with modelrig.load(folder, dtype="float32", decoder={"name": "beam", "num_beams": 20}) as model:
        for prompt in prompts():
            found = model.generate(prompt, constraint=make, max_new_tokens=5, **how)
            assert found.tokens[0] in B and found.tokens[1] in C and len(found.tokens) == 2


class Odd(Automaton):
    """Fails as told."""

    def __init__(self, fails: str) -> None:
        super().__init__(cycle(A))
        self.fails = fails

    def fill(self, bits: Any) -> None:
        if self.fails == "fill":
            raise ZeroDivisionError("a bug")
        if self.fails == "all bits":
            bits.fill_(-1)
        else:
            super().fill(bits)

    def accept(self, token: int) -> None:
        if self.fails == "accept":
            raise KeyError(token)
        if self.fails != "all bits":
            super().accept(token)


@pytest.mark.parametrize("fails", ["fill", "accept"])
def test_a_mask_that_fails_is_named(model: Any, fails: str) -> None:
    with pytest.raises(GenerateError, match=rf"Odd\.{fails} after 0 new tokens of row 0 failed") as caught:
        model.generate(prompts()[0], constraint=lambda: Odd(fails), max_new_tokens=5)
    assert "GN-CONSTRAINT" == caught.value.code and caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [(lambda: 3, "3 is no mask of tokens: it lacks fill, accept, rollback, is_over"), (lambda: 1 / 0, "ZeroDivisionError")],
)
def test_what_makes_no_masks_is_named(model: Any, make: Any, says: str) -> None:
    with pytest.raises(GenerateError, match=says):
        model.generate(prompts()[0], constraint=make, max_new_tokens=5)


def test_a_mask_that_allows_all_changes_nothing_and_bits_beyond_the_vocabulary_count_for_nothing(model: Any) -> None:
    for how in ({}, {"temperature": 2.0, "seed": 7}):
        expected = model.generate(prompts(), max_new_tokens=9, **how)
        found = model.generate(prompts(), max_new_tokens=9, constraint=lambda: Odd("all bits"), **how)
        assert [one.tokens for one in expected] == [one.tokens for one in found]


def test_bits_beyond_the_vocabulary_alone_are_a_dead_end() -> None:
    class Beyond(Automaton):
        def fill(self, bits: Any) -> None:
            bits[-1] = -2  # all but token 96

    masks = Constraints(lambda: Beyond({}), 1, VOCAB, CPU)
    with pytest.raises(GenerateError, match="no token may follow 0 new ones in row 0"):
        masks.apply(torch.zeros(1, VOCAB), [0])


# ------------------------------------------------------------------------------------------------ the masks of a call


def test_allow_sets_the_bits_of_ids() -> None:
    bits = torch.zeros(3, dtype=torch.int32)
    allow(bits, [0, 31, 32, 63, 94])
    assert [-(1 << 31) + 1, -(1 << 31) + 1, 1 << 30] == bits.tolist()


@pytest.mark.parametrize("token", [0, 30, 31, 32, 63, 64, 95, 96])
def test_every_bit_stands_for_its_token(token: int) -> None:
    masks = Constraints(lambda: Automaton({0: {token: 0}}), 2, VOCAB, CPU)
    scores = masks.apply(torch.zeros(1, VOCAB), [1])
    assert [token] == (scores > -1).nonzero()[:, 1].tolist()


@pytest.mark.parametrize("size", [32, 64, 96, 97])
def test_vocabularies_of_any_size(size: int) -> None:
    masks = Constraints(lambda: Automaton({0: {size - 1: 0, 0: 0}}), 1, size, CPU)
    assert [0, size - 1] == (masks.apply(torch.zeros(1, size), [0]) > -1).nonzero()[:, 1].tolist()


def test_rows_take_over_from_rows_by_rolling_back_to_what_they_share() -> None:
    made: list[Automaton] = []

    def make() -> Automaton:
        made.append(Automaton(cycle(A, B, C)))
        return made[-1]

    masks = Constraints(make, 3, VOCAB, CPU)
    for ids in ([10, 10, 11], [20, 21, 20], [30, 30, 30]):
        masks.observe(ids, range(3))
    masks.reorder([1, 1, 0])
    assert [[0, 1, 2, 0]] * 3 == [mask.states for mask in made]
    assert [1, 0, 1] == [mask.calls["rollback"] for mask in made]
    masks.observe([11, 12, 13], range(3))
    assert 1 == masks.allowed(0, [20, 10])


def test_drafts_are_looked_at_without_leaving_a_trace() -> None:
    mask = rounds()
    masks = Constraints(lambda: mask, 1, VOCAB, CPU, [EOS])
    masks.observe([10], [0])
    assert 2 == masks.allowed(0, [20, 30, 40])
    assert 3 == masks.allowed(0, [20, 30, EOS, 10])
    assert 0 == masks.allowed(0, [EOS])
    assert [0, 1] == mask.states


def test_after_an_end_nothing_is_asked() -> None:
    mask = rounds()
    masks = Constraints(lambda: mask, 1, VOCAB, CPU, [EOS])
    for token in (10, 20, 30, EOS):
        masks.observe([token], [0])
    before = dict(mask.calls)
    masks.observe([50], [0])
    assert masks.is_over(0) and 0 == masks.allowed(0, [10])
    assert torch.zeros(1, VOCAB).equal(masks.apply(torch.zeros(1, VOCAB), [0]))
    assert before == mask.calls == {"fill": 0, "accept": 3, "rollback": 0}


def test_an_end_id_that_is_ignored_is_a_token_like_others(model: Any) -> None:
    def make() -> Automaton:
        return Automaton({0: {EOS: 1}, 1: dict.fromkeys(A, 2)}, lasts={2})

    found = model.generate(prompts()[0], constraint=make, ignore_eos=True, max_new_tokens=9)
    assert EOS == found.tokens[0] and found.tokens[1] in A and 2 == len(found.tokens)


def test_a_row_that_is_not_asked_for_notes_nothing() -> None:
    made: list[Automaton] = []
    options = GenerateOptions(constraint=lambda: made.append(Automaton(cycle(A, B))) or made[-1])
    sampler = Sampler(options, 2, VOCAB)
    sampler.start([[], []])
    sampler.choose(torch.zeros(1, VOCAB), [1])
    assert [0, 1] == [mask.calls["accept"] for mask in made]
