"""A conversation that keeps its cache gives what a fresh run over all its ids gives, and prefills only what is new."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import modelrig
from checkpoints import write_decoder, write_llama
from modelrig.errors import CacheError, GenerateError, LoadError, TemplateError
from modelrig.generation.session import Session
from tokenizer_folders import byte_level, write

FIRST, SECOND, THIRD = [5, 17, 3, 60], [9, 9, 31], [44]


@pytest.fixture(scope="module", params=["dynamic", "static", "sliding", "quantized", "offloaded"])
def model(request: pytest.FixtureRequest, llama_folder: Path) -> Iterator[modelrig.Model]:
    """Random float32 weights, no tokenizer."""
    with modelrig.load(llama_folder, cache=request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tiny() -> Iterator[modelrig.Model]:
    with modelrig.load("tiny", dtype="float32") as loaded:
        yield loaded


def fresh(model: modelrig.Model, ids: list[int], count: int) -> list[int]:
    return list(model.generate(ids, max_new_tokens=count).tokens)


# ------------------------------------------------------------------------------------------------ turns


def test_turns_equal_a_fresh_run_over_all_ids(model: modelrig.Model) -> None:
    session, ids = model.session(), []
    for prompt, count in ((FIRST, 6), (SECOND, 1), (THIRD, 9)):
        ids += prompt
        answer = session.generate(prompt, max_new_tokens=count)
        assert fresh(model, ids, count) == list(answer.tokens)
        ids += answer.tokens
        assert ids == session.tokens


def test_only_what_is_new_is_prefilled(model: modelrig.Model) -> None:
    session = model.session()
    counted = [session.generate(ids, max_new_tokens=5).stats.prompt_tokens for ids in (FIRST, SECOND, THIRD)]
    # the last token of each answer was chosen, but never fed
    assert [len(FIRST), 1 + len(SECOND), 1 + len(THIRD)] == counted


def test_sampled_turns_equal_a_fresh_run_with_the_same_seed(model: modelrig.Model) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 20, "seed": 11, "repetition_penalty": 1.3}
    session = model.session()
    first = session.generate(FIRST, **how)
    second = session.generate(SECOND, **how)
    assert list(model.generate([*FIRST, *first.tokens, *SECOND], **how).tokens) == list(second.tokens)


def test_a_stream_gives_the_pieces_of_the_same_turn(model: modelrig.Model) -> None:
    one, other = model.session(), model.session()
    for prompt in (FIRST, SECOND):
        pieces = list(one.stream(prompt, max_new_tokens=5))
        assert other.generate(prompt, max_new_tokens=5).tokens == tuple(token for piece in pieces for token in piece.tokens)
    assert other.tokens == one.tokens


def test_prompts_come_in_every_form_of_one_row(model: modelrig.Model) -> None:
    answers = [model.session().generate(prompt, max_new_tokens=3).tokens for prompt in (FIRST, [FIRST], torch.tensor([FIRST]))]
    assert 1 == len(set(answers))


def test_an_end_of_text_stays_in_the_conversation(model: modelrig.Model) -> None:
    stop = fresh(model, FIRST, 3)[2]
    session = model.session()
    answer = session.generate(FIRST, max_new_tokens=10, stop_ids=stop)
    assert ("stop", stop) == (answer.finish_reason, answer.tokens[-1])
    following = session.generate(SECOND, max_new_tokens=4)
    assert fresh(model, [*FIRST, *answer.tokens, *SECOND], 4) == list(following.tokens)


def test_reset_begins_anew_in_the_same_memory(model: modelrig.Model) -> None:
    session = model.session()
    first = session.generate(FIRST, max_new_tokens=5)
    address = session.cache.layers[0].keys.data_ptr()
    session.reset()
    assert ([], [], None, 0) == (session.tokens, session.messages, session.answer, session.cache.length)
    assert first.tokens == session.generate(FIRST, max_new_tokens=5).tokens
    assert address == session.cache.layers[0].keys.data_ptr()


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("after", [1, 4])
def test_a_turn_that_was_given_up_stays_as_far_as_it_came(model: modelrig.Model, after: int) -> None:
    session = model.session()
    stream = session.stream(FIRST, max_new_tokens=9)
    for _ in range(after):
        next(stream)
    stream.close()
    begun = fresh(model, FIRST, after)
    assert [*FIRST, *begun] == session.tokens
    assert fresh(model, [*FIRST, *begun, *SECOND], 5) == list(session.generate(SECOND, max_new_tokens=5).tokens)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interruption_within_a_step_leaves_the_session_usable(
    model: modelrig.Model, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    session = model.session()
    before = session.generate(FIRST, max_new_tokens=4).tokens
    step, calls = model.step, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        logits = step(*arguments)
        if len(calls) > at:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(model, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(SECOND, max_new_tokens=9)
    begun = fresh(model, [*FIRST, *before, *SECOND], at) if at else []
    assert [*FIRST, *before, *SECOND, *begun] == session.tokens
    following = session.generate(THIRD, max_new_tokens=5)
    assert fresh(model, [*FIRST, *before, *SECOND, *begun, *THIRD], 5) == list(following.tokens)


def test_a_cache_of_yours_serves_one_call_at_a_time(model: modelrig.Model) -> None:
    cache = model.new_cache(1, 60)
    stream = model.stream(FIRST, cache=cache, max_new_tokens=9)
    next(stream)
    model.generate(SECOND, cache=cache, max_new_tokens=3)
    with pytest.raises(CacheError, match="something else"):
        next(stream)
    cache.reset()
    assert fresh(model, FIRST, 5) == list(model.generate(FIRST, cache=cache, max_new_tokens=5).tokens)


@pytest.mark.parametrize("at", ["new_cache", "reset"])
def test_rows_that_you_padded_stay_padded_until_a_reset(model: modelrig.Model, at: str) -> None:
    """A tensor cannot have rows of different lengths, so its padding is said to the cache."""
    prompts = [[3, 4, 5, 6], [7, 8]]
    expected = [one.tokens for one in model.generate(prompts, max_new_tokens=5)]
    rows = [[3, 4, 5, 6], [0, 0, 7, 8]]
    cache = model.new_cache(batch=2, max_len=40, padding=[0, 2] if at == "new_cache" else None)
    if at == "reset":
        cache.reset([0, 2])
    assert expected == [one.tokens for one in model.generate(rows, cache=cache, max_new_tokens=5)]
    cache.reset()
    plain = [one.tokens for one in model.generate(rows, max_new_tokens=5)]
    assert plain == [one.tokens for one in model.generate(rows, cache=cache, max_new_tokens=5)]


def test_a_cache_that_was_padded_within_an_inference_block_serves_outside_of_it(model: modelrig.Model) -> None:
    cache = model.new_cache(2, 60)
    with torch.inference_mode():
        model.generate([FIRST[:2], FIRST], cache=cache, max_new_tokens=3)
    cache.reorder([1, 0])
    model(torch.tensor([THIRD, THIRD]), cache=cache)
    assert [0, 2] == cache.export()["padding"].tolist()


def test_what_another_thread_compiles_changes_nothing(model: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fresh(model, FIRST, 5)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # torch's own is one for all threads
    assert expected == fresh(model, FIRST, 5)


def test_a_new_turn_ends_the_stream_before_it(model: modelrig.Model) -> None:
    session = model.session()
    stream = session.stream(FIRST, max_new_tokens=9)
    begun = [token for _ in range(3) for token in next(stream).tokens]
    second = session.generate(SECOND, max_new_tokens=4)
    assert [] == list(stream)
    assert fresh(model, [*FIRST, *begun, *SECOND], 4) == list(second.tokens)
    third = session.generate(THIRD, max_new_tokens=4)
    assert fresh(model, [*FIRST, *begun, *SECOND, *second.tokens, *THIRD], 4) == list(third.tokens)


def test_a_reset_ends_the_stream_too(model: modelrig.Model) -> None:
    session = model.session()
    stream = session.stream(FIRST, max_new_tokens=9)
    next(stream)
    session.reset()
    assert ([], []) == (list(stream), session.tokens)
    assert fresh(model, SECOND, 3) == list(session.generate(SECOND, max_new_tokens=3).tokens)


# ------------------------------------------------------------------------------------------------ context


def test_a_turn_beyond_the_context_is_refused_and_forgotten(model: modelrig.Model) -> None:
    session = model.session(max_len=16)
    first = session.generate(FIRST, max_new_tokens=8)
    with pytest.raises(GenerateError, match="GN-CONTEXT") as caught:
        session.generate(SECOND, max_new_tokens=8)
    assert "max_new_tokens" == caught.value.locus
    with pytest.raises(GenerateError, match="GN-CONTEXT"):
        session.generate([1] * 20)
    assert [*FIRST, *first.tokens] == session.tokens
    assert fresh(model, [*FIRST, *first.tokens, *SECOND], 2) == list(session.generate(SECOND, max_new_tokens=2).tokens)


def test_without_a_number_an_answer_fills_the_context(model: modelrig.Model) -> None:
    session = model.session(max_len=16)
    answer = session.generate(FIRST)
    assert (13, "length") == (len(answer.tokens), answer.finish_reason)  # 16 slots, and the last token needs none
    assert 16 == session.cache.length
    with pytest.raises(GenerateError, match="GN-CONTEXT"):
        session.generate(THIRD)
    session.reset()
    assert 13 == len(session.generate(FIRST).tokens)


# ------------------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda session: session.generate([[1], [2]]), "GN-INPUT"),
        (lambda session: session.generate(), "GN-INPUT"),
        (lambda session: session.generate([1], messages=[]), "GN-INPUT"),
        (lambda session: session.generate([1], nope=1), "GN-UNKNOWN"),
        (lambda session: session.generate([1], top_k=0), "GN-ARGS"),
        (lambda session: session.generate([1], num_return_sequences=2), "GN-ARGS"),
        (lambda session: session.generate([1], seed=[1, 2], temperature=1), "GN-ARGS"),
        (lambda session: session.generate("text"), "GN-TOKENIZER"),
        (lambda session: session.send("text"), "GN-TOKENIZER"),
        (lambda session: session.generate([97]), "GN-INPUT"),
    ],
)
def test_a_turn_that_cannot_be_changes_nothing(model: modelrig.Model, call: Callable[[Session], Any], code: str) -> None:
    session = model.session()
    first = session.generate(FIRST, max_new_tokens=5).tokens
    with pytest.raises(GenerateError) as caught:
        call(session)
    assert code == caught.value.code
    assert ([*FIRST, *first], []) == (session.tokens, session.messages)
    assert fresh(model, [*FIRST, *first, *SECOND], 5) == list(session.generate(SECOND, max_new_tokens=5).tokens)


def test_a_session_of_a_closed_model_says_so(llama_folder: Path) -> None:
    model = modelrig.load(llama_folder)
    session = model.session()
    session.generate(FIRST, max_new_tokens=2)
    model.close()
    with pytest.raises(LoadError, match="LD-CLOSED"):
        session.generate(SECOND, max_new_tokens=2)


def test_a_cache_that_cannot_rewind_is_filled_again(model: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session()
    first = session.generate(FIRST, max_new_tokens=5)

    def refuse(to: int) -> None:
        raise CacheError("CA-REWIND", "evicted")

    monkeypatch.setattr(session.cache, "rewind", refuse)
    second = session.generate(SECOND, max_new_tokens=5)
    assert len(FIRST) + 5 + len(SECOND) == second.stats.prompt_tokens
    assert fresh(model, [*FIRST, *first.tokens, *SECOND], 5) == list(second.tokens)


# ------------------------------------------------------------------------------------------------ messages


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_send_keeps_the_conversation(tiny: modelrig.Model) -> None:
    session = tiny.session()
    first = session.send("add two numbers", max_new_tokens=12)
    assert [user("add two numbers"), assistant(first.text)] == session.messages
    second = session.send("sort a list", max_new_tokens=12)
    asked = [user("add two numbers"), assistant(first.text), user("sort a list")]
    assert [*asked, assistant(second.text)] == session.messages
    assert second is session.answer
    alone = tiny.generate(messages=asked, max_new_tokens=12)
    assert (alone.tokens, alone.text) == (second.tokens, second.text)
    assert second.stats.prompt_tokens < alone.stats.prompt_tokens


def test_an_edited_history_is_prefilled_from_the_first_change(tiny: modelrig.Model) -> None:
    session = tiny.session()
    asked = [user("open a file and read it"), assistant("x = 1"), user("close it")]
    session.generate(messages=asked, max_new_tokens=8)
    edited = [*asked[:2], user("write to it")]
    ids = [tiny.tokenizer.encode(tiny.chat_prompt(messages), add_special_tokens=False) for messages in (asked, edited)]
    common = next(n for n, (one, other) in enumerate(zip(*ids, strict=False)) if one != other)
    answer = session.generate(messages=edited, max_new_tokens=8)
    assert 0 < common < len(ids[1])
    assert len(ids[1]) - common == answer.stats.prompt_tokens
    assert tiny.generate(messages=edited, max_new_tokens=8).tokens == answer.tokens
    assert [*ids[1], *answer.tokens] == session.tokens


def test_the_same_conversation_again_prefills_one_token(tiny: modelrig.Model) -> None:
    session = tiny.session()
    first, again = (session.generate(messages=[user("add")], max_new_tokens=6) for _ in range(2))
    assert 1 == again.stats.prompt_tokens
    assert first.tokens == again.tokens


def test_a_shorter_conversation_rewinds(tiny: modelrig.Model) -> None:
    session = tiny.session()
    session.generate(messages=[user("add"), assistant("x"), user("more")], max_new_tokens=6)
    assert (
        tiny.generate(messages=[user("add")], max_new_tokens=6).tokens
        == session.generate(messages=[user("add")], max_new_tokens=6).tokens
    )


def test_an_interrupted_answer_is_kept_as_far_as_it_came(tiny: modelrig.Model) -> None:
    session = tiny.session()
    stream = session.stream_send("add two numbers", max_new_tokens=30)
    text = "".join(next(stream).text for _ in range(6))
    stream.close()
    assert "cancelled" == session.answer.finish_reason
    assert [user("add two numbers"), assistant(session.answer.text)] == session.messages
    assert session.answer.text == text
    second = session.send("go on", max_new_tokens=8)
    assert tiny.generate(messages=session.messages[:3], max_new_tokens=8).tokens == second.tokens


def test_a_stream_that_was_overtaken_does_not_write_its_answer(tiny: modelrig.Model) -> None:
    session = tiny.session()
    stream = session.stream_send("one", max_new_tokens=20)
    next(stream)
    second = session.send("two", max_new_tokens=4)
    assert [] == list(stream)
    gc.collect()
    assert [user("two"), assistant(second.text)] == session.messages


def test_a_message_beyond_the_context_leaves_the_conversation_as_it_was(tiny: modelrig.Model) -> None:
    session = tiny.session(max_len=40)
    first = session.send("add", max_new_tokens=6)
    before = list(session.messages)
    with pytest.raises(GenerateError, match="GN-CONTEXT"):
        session.send("word " * 100, max_new_tokens=6)
    assert (before, first) == (session.messages, session.answer)
    second = session.send("more", max_new_tokens=6)
    assert tiny.generate(messages=[*before, user("more")], max_new_tokens=6).tokens == second.tokens


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    write_llama(tmp_path, vocab_size=400)
    write(tmp_path, byte_level())
    with pytest.raises(TemplateError, match="TM-MISSING"):
        modelrig.load(tmp_path).session().send("hello")


# ------------------------------------------------------------------------------------------------ text


def test_text_that_follows_gets_no_second_beginning(tmp_path: Path) -> None:
    """This tokenizer puts <|endoftext|> (id 0) before a text; within a conversation there is one beginning."""
    write_llama(tmp_path, vocab_size=400)
    write(tmp_path, byte_level())
    model = modelrig.load(tmp_path)
    encode = model.tokenizer.encode
    session = model.session()
    first = session.generate("def add", max_new_tokens=3)
    session.generate("(a, b)", max_new_tokens=3)
    assert 0 == encode("def add")[0] == session.tokens[0]
    expected = [*encode("def add"), *first.tokens, *encode("(a, b)", add_special_tokens=False)]
    assert expected == session.tokens[: len(expected)]
    session.reset()
    session.generate("def add", max_new_tokens=3)
    assert encode("def add") == session.tokens[: len(encode("def add"))]


def test_text_turns_equal_one_text(tiny: modelrig.Model) -> None:
    session = tiny.session()
    first = session.generate("def add(a, b):\n", max_new_tokens=10)
    second = session.generate("\n\ndef sub(a, b):\n", max_new_tokens=10)
    encode = tiny.tokenizer.encode
    ids = [*encode("def add(a, b):\n"), *first.tokens, *encode("\n\ndef sub(a, b):\n")]
    assert fresh(tiny, ids, 10) == list(second.tokens)


def test_a_session_whose_cache_has_lost_the_common_beginning_prefills_again(tmp_path: Path) -> None:
    """A window of 5 with room for two more tokens; each conversation branches off where the cache kept nothing."""
    write_decoder(tmp_path, "Mistral", sliding_window=5)
    with modelrig.load(tmp_path, cache={"name": "sliding", "headroom": 2}) as model:
        session, exact = model.session(), modelrig.load(tmp_path, cache="static")
        first = session.generate([7, 8, 9, 10, 11, 12], max_new_tokens=20)
        assert list(first.tokens) == list(exact.generate([7, 8, 9, 10, 11, 12], max_new_tokens=20).tokens)
        follows = [7, 8, 9, 10, 11, 12, *first.tokens, 3]
        second = session.generate([3], max_new_tokens=9)
        assert list(second.tokens) == list(exact.generate(follows, max_new_tokens=9).tokens)
        assert second.stats.prompt_tokens <= 3
        session.tokens = [7, 8, 9]
        third = session.generate([10, 11], max_new_tokens=9)
        assert list(third.tokens) == list(exact.generate([7, 8, 9, 10, 11], max_new_tokens=9).tokens)
        assert third.stats.prompt_tokens == 5
