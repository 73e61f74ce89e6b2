"""The public names: plan, load, generate, stream, caches of one's own, memory, close."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelrig
from checkpoints import write_llama
from modelrig.errors import CacheError, GenerateError, LoadError, ModelrigError, ResourceLimitError, TokenizerError
from modelrig.generation.loop import Generation, Piece
from tokenizer_folders import byte_level, write

PROMPT = [5, 17, 3, 60]
TEXT = "def add(a, b):"


@pytest.fixture(scope="module")
def tiny() -> Iterator[modelrig.Model]:
    with modelrig.load("tiny", dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def bare(llama_folder: Path) -> Iterator[modelrig.Model]:
    """Random float32 weights, no tokenizer, context 160."""
    with modelrig.load(llama_folder) as loaded:
        yield loaded


@pytest.fixture
def own(bare: modelrig.Model) -> Iterator[modelrig.Model]:
    """The same, for a test that closes or breaks it."""
    with bare.plan.load() as loaded:
        yield loaded


def ids_of(model: modelrig.Model, *arguments: Any, **options: Any) -> Any:
    found = model.generate(*arguments, **options)
    return [list(one.tokens) for one in found] if isinstance(found, list) else list(found.tokens)


# ------------------------------------------------------------------------------------------------ the names


def test_the_names_that_must_hold(capfd: pytest.CaptureFixture[str]) -> None:
    plan = modelrig.plan("tiny")
    assert plan.explain() and plan.to_json() and len(plan.ledger) and plan.choices["caches"]
    assert {"": "cpu"} == dict(plan.device_map)
    model = plan.load(progress=True)
    assert ("", "") == capfd.readouterr()  # no bar where nobody sees it
    out = model.generate(TEXT, max_new_tokens=32)
    assert isinstance(out.text, str) and 32 == len(out.tokens) and "length" == out.finish_reason
    assert 7 == out.stats.prompt_tokens
    assert out.text == "".join(piece.text for piece in model.stream(TEXT, max_new_tokens=32))
    cache = model.new_cache(batch=1, max_len=64)
    input_ids = torch.tensor([model.tokenizer.encode(TEXT)])
    assert (1, 7, 2048) == model(input_ids, cache=cache).shape
    cache.rewind(3)
    assert 3 == cache.length
    cache.reset()
    assert 0 == cache.length
    assert isinstance(model.module, torch.nn.Module)
    assert plan is model.plan
    assert {"": "cpu"} == dict(model.device_map)
    assert {"weights", "buffers", "cache", "process"} == model.memory().keys()
    model.close()
    assert modelrig.plugins()


def test_load_is_plan_and_load(llama_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    with modelrig.load(llama_folder, {"cache": "static"}, attention="eager", progress=lambda *at: seen.append(at)) as model:
        assert ("static", "eager") == tuple(model.plan.choices[kind].name for kind in ("caches", "attention"))
    assert seen[-1][0] == seen[-1][1] > 0


# ------------------------------------------------------------------------------------------------ prompts and results


def test_one_prompt_gives_one_result_and_several_give_a_list(tiny: modelrig.Model) -> None:
    ids = tiny.tokenizer.encode(TEXT)
    alone = tiny.generate(TEXT, max_new_tokens=5)
    assert isinstance(alone, Generation)
    assert alone.tokens == tiny.generate(ids, max_new_tokens=5).tokens == tiny.generate(tuple(ids), max_new_tokens=5).tokens
    for prompts in ([TEXT], [ids], torch.tensor([ids]), [torch.tensor(ids)]):
        (row,) = tiny.generate(prompts, max_new_tokens=5)
        assert (alone.tokens, alone.text) == (row.tokens, row.text)


def test_rows_of_a_batch_give_what_they_give_alone(bare: modelrig.Model) -> None:
    prompts = [[5, 17, 3, 60], [8], [90, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 50]]
    together = ids_of(bare, prompts, max_new_tokens=12)
    assert [ids_of(bare, prompt, max_new_tokens=12) for prompt in prompts] == together
    assert [4, 1, 12] == [row.stats.prompt_tokens for row in bare.generate(prompts, max_new_tokens=1)]


def test_messages_go_through_the_chat_template(tiny: modelrig.Model) -> None:
    messages = [{"role": "user", "content": "add two numbers"}]
    assert "# add two numbers\n" == tiny.chat_prompt(messages)
    expected = tiny.tokenizer.encode("# add two numbers\n", add_special_tokens=False)
    answer = tiny.generate(messages=messages, max_new_tokens=6)
    assert ids_of(tiny, expected, max_new_tokens=6) == list(answer.tokens)
    assert len(expected) == answer.stats.prompt_tokens


def test_text_of_any_script_goes_in_and_comes_out_whole(tiny: modelrig.Model) -> None:
    prompt = "# naïve 漢字 😀 \x00\n"
    pieces = list(tiny.stream(prompt, max_new_tokens=60, temperature=5.0, seed=3, ignore_eos=True))
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tiny.tokenizer.decode(tokens) == "".join(piece.text for piece in pieces)
    assert 60 == len(tokens)


def test_pieces_are_the_result_in_parts(bare: modelrig.Model) -> None:
    prompts = [PROMPT, [8, 9]]
    results = bare.generate(prompts, max_new_tokens=6)
    parts: list[list[int]] = [[], []]
    for piece in bare.stream(prompts, max_new_tokens=6):
        assert isinstance(piece, Piece)
        parts[piece.row] += piece.tokens
    assert parts == [list(result.tokens) for result in results]


def test_copies_of_a_prompt_stand_side_by_side(tiny: modelrig.Model) -> None:
    rows = tiny.generate([TEXT, "import os"], num_return_sequences=3, temperature=1.5, seed=5, max_new_tokens=8)
    assert 6 == len(rows) == len({row.tokens for row in rows})
    for copy in range(3):
        for number, prompt in enumerate((TEXT, "import os")):
            alone = tiny.generate(prompt, temperature=1.5, seed=5 + copy, max_new_tokens=8)
            assert alone.tokens == rows[3 * number + copy].tokens
    assert 2 == len(tiny.generate(TEXT, num_return_sequences=2, max_new_tokens=1))


# ------------------------------------------------------------------------------------------------ sampling


SAMPLED: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.2, "top_p": 0.95, "min_p": 0.001}


def test_a_seed_draws_the_same_again_and_none_draws_anew(bare: modelrig.Model) -> None:
    assert ids_of(bare, PROMPT, seed=4, **SAMPLED) == ids_of(bare, PROMPT, seed=4, **SAMPLED)
    assert ids_of(bare, PROMPT, seed=4, **SAMPLED) != ids_of(bare, PROMPT, seed=5, **SAMPLED)
    assert ids_of(bare, PROMPT, **SAMPLED) != ids_of(bare, PROMPT, **SAMPLED)


def test_sampled_rows_are_what_they_are_alone(bare: modelrig.Model) -> None:
    prompts, seeds = [PROMPT, [8], PROMPT], [3, 1, 2**62]
    rows = ids_of(bare, prompts, seed=seeds, **SAMPLED)
    assert [ids_of(bare, one, seed=seed, **SAMPLED) for one, seed in zip(prompts, seeds, strict=True)] == rows
    assert rows[0] != rows[2]
    turned = ids_of(bare, prompts[::-1], seed=seeds[::-1], **SAMPLED)
    assert rows[::-1] == turned


def test_no_temperature_and_zero_are_greedy(bare: modelrig.Model) -> None:
    greedy = ids_of(bare, PROMPT, max_new_tokens=10)
    assert greedy == ids_of(bare, PROMPT, max_new_tokens=10, temperature=0, top_k=3, seed=1)
    assert greedy == ids_of(bare, PROMPT, max_new_tokens=10, temperature=2.0, top_k=1)
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        for _ in range(10):
            ids = torch.cat((ids, bare(ids)[:, -1:].argmax(-1)), dim=1)
    assert greedy == ids[0, len(PROMPT) :].tolist()


def test_options_reach_the_sampler(bare: modelrig.Model) -> None:
    plain = ids_of(bare, PROMPT, max_new_tokens=30)
    assert [9] * 5 == ids_of(bare, PROMPT, max_new_tokens=5, logit_bias={9: 1e6})
    for penalty in ({"repetition_penalty": 3.0}, {"presence_penalty": 9.0}, {"frequency_penalty": 9.0}):
        assert plain != ids_of(bare, PROMPT, max_new_tokens=30, **penalty)
    penalised = ids_of(bare, PROMPT, max_new_tokens=30, presence_penalty=1000)
    assert 30 == len(set(penalised))
    assert plain[0] not in ids_of(bare, [*PROMPT, plain[0]], max_new_tokens=1, repetition_penalty=1000)


def test_a_pinned_greedy_decoder_does_not_sample(llama_folder: Path) -> None:
    with modelrig.load(llama_folder, decoder="greedy") as model:
        assert 2 == len(model.generate(PROMPT, max_new_tokens=2).tokens)
        with pytest.raises(GenerateError, match="does not sample") as caught:
            model.generate(PROMPT, temperature=1.0)
        assert ("GN-ARGS", "temperature") == (caught.value.code, caught.value.locus)
        assert 2 == len(model.generate(PROMPT, max_new_tokens=2).tokens)


# ------------------------------------------------------------------------------------------------ ends


def test_the_reasons_of_an_end(tiny: modelrig.Model) -> None:
    plain = tiny.generate(TEXT, max_new_tokens=20)
    assert ("length", 20) == (plain.finish_reason, len(plain.tokens))
    third = plain.tokens[2]
    stopped = tiny.generate(TEXT, max_new_tokens=20, stop_ids=third)
    assert ("stop", plain.tokens[: plain.tokens.index(third) + 1]) == (stopped.finish_reason, stopped.tokens)
    word = plain.text.split()[2]
    stopped = tiny.generate(TEXT, max_new_tokens=20, stop=["never", word])
    assert ("stop", plain.text.partition(word)[0]) == (stopped.finish_reason, stopped.text)
    shown = ""
    for piece in tiny.stream(TEXT, max_new_tokens=20, stop=word):
        shown += piece.text
        assert stopped.text.startswith(shown)
    assert stopped.text == shown


def test_the_models_own_end_of_text_ends_and_can_be_ignored_or_put_off(tiny: modelrig.Model) -> None:
    (end,) = tiny.tokenizer.eos_ids
    forced: dict[str, Any] = {"logit_bias": {end: 1e6}, "max_new_tokens": 6}
    assert ([end], "stop", "") == (*(lambda o: (list(o.tokens), o.finish_reason, o.text))(tiny.generate(TEXT, **forced)),)
    assert [end] * 6 == ids_of(tiny, TEXT, ignore_eos=True, **forced)
    late = ids_of(tiny, TEXT, min_new_tokens=4, **forced)
    assert (5, end) == (len(late), late[-1])
    assert end not in late[:-1]


def test_a_model_without_a_tokenizer_ends_at_its_configs_ids(tmp_path: Path) -> None:
    write_llama(tmp_path, eos_token_id=[7, 8])
    with modelrig.load(tmp_path) as model:
        assert [8] == ids_of(model, PROMPT, logit_bias={8: 1e6})


# ------------------------------------------------------------------------------------------------ context


def test_without_a_number_the_answer_is_cut_to_the_context(bare: modelrig.Model) -> None:
    out = bare.generate([1] * 150)
    assert (11, "length") == (len(out.tokens), out.finish_reason)  # 160 positions, and the last token needs none
    assert 1 == len(bare.generate([1] * 160).tokens)


def test_the_default_is_256_where_there_is_room(tiny: modelrig.Model) -> None:
    assert 256 == len(tiny.generate(TEXT, ignore_eos=True).tokens)
    assert 300 == len(tiny.generate(TEXT, ignore_eos=True, min_new_tokens=300).tokens)


@pytest.mark.parametrize(
    ("prompt", "options", "locus"),
    [
        ([1] * 161, {}, None),
        ([1] * 150, {"max_new_tokens": 12}, "max_new_tokens"),
        ([1] * 150, {"min_new_tokens": 12}, "min_new_tokens"),
        ([[1] * 150, [1]], {"max_new_tokens": 12}, "max_new_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    bare: modelrig.Model, prompt: Any, options: dict[str, int], locus: str | None
) -> None:
    with pytest.raises(GenerateError, match="into a context of 160") as caught:
        bare.generate(prompt, **options)
    assert ("GN-CONTEXT", locus) == (caught.value.code, caught.value.locus)
    assert 11 == len(bare.generate([1] * 150, max_new_tokens=11).tokens)


# ------------------------------------------------------------------------------------------------ caches of one's own


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_a_cache_of_ones_own_goes_on_over_calls(llama_folder: Path, kind: str) -> None:
    with modelrig.load(llama_folder, cache=kind, context=700) as model:
        cache, ids = model.new_cache(max_len=600), []
        for prompt, count in ((PROMPT, 6), ([9, 9], 400), ([31], 5)):
            ids += prompt
            answer = model.generate(prompt, max_new_tokens=count, cache=cache)
            assert ids_of(model, ids, max_new_tokens=count) == list(answer.tokens)
            assert len(prompt) == answer.stats.prompt_tokens
            ids += answer.tokens
            assert len(ids) == cache.length
        # and back to loops of one's own, outside of generate
        logits = model([[8]], cache=cache)
        torch.testing.assert_close(model([[*ids, 8]])[:, -1:], logits, rtol=1e-4, atol=1e-4)
        cache.rewind(4)
        assert ids_of(model, [*PROMPT, 50], max_new_tokens=4) == ids_of(model, [50], max_new_tokens=4, cache=cache)


def test_a_cache_of_ones_own_holds_a_batch(bare: modelrig.Model) -> None:
    cache = bare.new_cache(batch=2, max_len=60)
    first = ids_of(bare, [PROMPT, [8]], max_new_tokens=5, cache=cache)
    second = ids_of(bare, [[7, 7], [6, 6]], max_new_tokens=5, cache=cache)
    for prompt, answer, more, following in zip([PROMPT, [8]], first, [[7, 7], [6, 6]], second, strict=True):
        assert ids_of(bare, [*prompt, *answer, *more], max_new_tokens=5) == following
    with pytest.raises(GenerateError, match="the same length"):
        bare.generate([[1], [2, 3]], cache=cache)


def test_what_a_cache_cannot_hold_is_refused_and_changes_nothing(bare: modelrig.Model) -> None:
    cache = bare.new_cache(max_len=12)
    bare.generate(PROMPT, max_new_tokens=3, cache=cache)
    for prompt, options in (([1] * 5, {"max_new_tokens": 1}), ([1], {"max_new_tokens": 5}), ([1] * 9, {})):
        with pytest.raises(GenerateError, match="after 7 in the cache"):
            bare.generate(prompt, cache=cache, **options)
    with pytest.raises(CacheError, match="CA-ARGS"):
        bare.generate([[1], [2]], cache=cache)
    with pytest.raises(CacheError, match="CA-ARGS"):
        bare([[1], [2]], cache=cache)
    with pytest.raises(CacheError, match="CA-FULL"):
        bare([[1] * 6], cache=cache)
    for options in ({"top_k": 0}, {"nope": 1}, {"stop": "x"}, {"seed": [1, 2], "temperature": 1.0}):
        with pytest.raises(GenerateError):
            bare.generate([1], cache=cache, **options)
    assert 7 == cache.length
    assert 4 == len(bare.generate([1], cache=cache).tokens)  # cut to what fits
    assert 12 == cache.length


def test_text_that_continues_a_cache_gets_no_second_beginning(tmp_path: Path) -> None:
    write_llama(tmp_path, vocab_size=400)
    write(tmp_path, byte_level())
    with modelrig.load(tmp_path) as model:
        cache = model.new_cache()
        first = model.generate("def add", max_new_tokens=2, cache=cache)
        second = model.generate("(a, b)", max_new_tokens=2, cache=cache)
        encode = model.tokenizer.encode
        ids = [*encode("def add"), *first.tokens, *encode("(a, b)", add_special_tokens=False)]
        assert ids_of(model, ids, max_new_tokens=2) == list(second.tokens)


def test_forwards_with_a_mask_and_a_cache(bare: modelrig.Model) -> None:
    cache = bare.new_cache(batch=2)
    ids, mask = torch.tensor([[0, 0, 5], [1, 2, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    torch.testing.assert_close(bare(ids, attention_mask=mask), bare(ids, cache=cache, attention_mask=mask))
    with pytest.raises(GenerateError, match="only the first call"):
        bare(ids, cache=cache, attention_mask=mask)
    with pytest.raises(GenerateError, match="token types"):
        bare(ids, token_type_ids=mask)
    torch.testing.assert_close(bare([[5, 9]])[0, -1], bare([[9], [9]], cache=cache)[0, -1])


def test_a_cache_made_in_inference_mode_serves_outside(bare: modelrig.Model) -> None:
    with torch.inference_mode():
        cache = bare.new_cache()
        bare([PROMPT], cache=cache)
        ids_of(bare, [3], max_new_tokens=2, cache=cache)
    assert (1, 1, 97) == bare([[5]], cache=cache).shape
    assert ids_of(bare, PROMPT, max_new_tokens=4) == ids_of(bare, PROMPT, max_new_tokens=4, cache=bare.new_cache())


# ------------------------------------------------------------------------------------------------ caches kept between calls


def watch(model: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the buffers of the cache that each step writes to, as the steps come."""
    addresses: list[int] = []
    step = model.step

    def watched(ids: Any, slots: Any, *rest: Any) -> Any:
        addresses.append(slots.layers[0].keys.data_ptr())
        return step(ids, slots, *rest)

    monkeypatch.setattr(model, "_step", watched)
    return addresses


def test_static_buffers_stay_between_calls_and_go_when_they_do_not_serve(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with modelrig.load(llama_folder, cache="static", context=100) as model:
        seen = watch(model, monkeypatch)
        for prompt, count in ((PROMPT, 5), ([1], 90), ([1] * 99, 2), (PROMPT, 5)):
            model.generate(prompt, max_new_tokens=count)
        list(zip(model.stream(PROMPT), range(3), strict=False))  # given up
        gc.collect()
        model.generate(PROMPT, max_new_tokens=2)
        assert 1 == len(set(seen))
        one_row = model.memory()["cache"]
        model.generate([PROMPT, [1]], max_new_tokens=5)  # two rows, just as long as they need
        assert 8 * 2 * one_row == 100 * model.memory()["cache"]
        seen.clear()
        model.generate([[1], [2, 3]], max_new_tokens=4)
        assert 1 == len(set(seen))
        model.generate([[1] * 50, [2]], max_new_tokens=4)
        assert 53 * 2 * one_row == 100 * model.memory()["cache"]


def test_a_batch_of_the_planned_size_gets_the_planned_cache(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with modelrig.load(llama_folder, cache="static", batch=3) as model:
        seen = watch(model, monkeypatch)
        for count in (2, 50):
            model.generate([[1], [2], [3]], max_new_tokens=count)
        assert 1 == len(set(seen))
        assert [line.bytes for line in model.plan.ledger if line.what == "key/value cache"] == [model.memory()["cache"]]


def test_a_batch_beyond_memory_is_refused_with_both_numbers(own: modelrig.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(own.plan.environment), "available_bytes", lambda self, device: 1000)
    with pytest.raises(ResourceLimitError, match="1,000 are available"):
        own.generate([[1], [2]], max_new_tokens=5)
    assert 5 == len(own.generate([1], max_new_tokens=5).tokens)


def test_memory_is_what_tensors_and_caches_take(own: modelrig.Model) -> None:
    tensors = own.module.state_dict()
    before = own.memory()
    assert (sum(tensor.nbytes for tensor in tensors.values()), 0) == (before["weights"], before["cache"])
    assert sum(buffer.nbytes for buffer in own.module.buffers()) == before["buffers"] > 0
    assert before["process"] > 50 << 20
    own.generate(PROMPT, max_new_tokens=2)
    assert own.new_cache().nbytes == own.memory()["cache"]


# ------------------------------------------------------------------------------------------------ interruptions, threads


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_after_an_interrupted_stream_results_are_right(llama_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with modelrig.load(llama_folder, cache=kind) as model:
        expected = ids_of(model, PROMPT, max_new_tokens=12)
        stream = model.stream([9] * 60, max_new_tokens=90)
        for _ in range(5):
            next(stream)
        stream.close()
        assert expected == ids_of(model, PROMPT, max_new_tokens=12)
        model.stream([1, 2, 3])  # never begun
        assert expected == ids_of(model, PROMPT, max_new_tokens=12)
        for at in (0, 1, 4):
            with monkeypatch.context() as patch:
                interrupt_step(model, at, patch)
                with pytest.raises(KeyboardInterrupt):
                    model.generate([9] * 60, max_new_tokens=50)
            assert expected == ids_of(model, PROMPT, max_new_tokens=12)


def interrupt_step(model: modelrig.Model, at: int, patch: pytest.MonkeyPatch) -> None:
    step, calls = model.step, []

    def interrupted(*arguments: Any) -> Any:
        logits = step(*arguments)
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return logits

    patch.setattr(model, "_step", interrupted)


def test_two_streams_at_once_do_not_disturb_each_other(bare: modelrig.Model) -> None:
    prompts = (PROMPT, [8, 9])
    streams = [bare.stream(prompt, max_new_tokens=10) for prompt in prompts]
    together: list[list[int]] = [[], []]
    for pieces in zip(*streams, strict=True):
        for number, piece in enumerate(pieces):
            together[number] += piece.tokens
    assert [ids_of(bare, prompt, max_new_tokens=10) for prompt in prompts] == together


@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding"])
def test_threads_give_what_one_thread_gives(llama_folder: Path, kind: str) -> None:
    with modelrig.load(llama_folder, cache=kind) as model:
        calls: list[tuple[Any, dict[str, Any]]] = [
            (PROMPT, {"max_new_tokens": 40}),
            ([8] * 30, {"max_new_tokens": 30, "temperature": 1.0, "seed": 5}),
            ([[5], [6, 7]], {"max_new_tokens": 20}),
            ([60, 1], {"max_new_tokens": 40, "repetition_penalty": 1.2}),
        ]
        expected = [ids_of(model, prompt, **options) for prompt, options in calls]
        barrier = threading.Barrier(4)

        def work(number: int) -> list[Any]:
            barrier.wait()
            order = [(number + step) % 4 for step in range(8)]
            return [(at, ids_of(model, calls[at][0], **calls[at][1])) for at in order]

        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(work, range(4)):
                assert all(expected[at] == found for at, found in results)


# ------------------------------------------------------------------------------------------------ closed, without text, wrong


def test_a_closed_model_says_so(own: modelrig.Model) -> None:
    cache = own.new_cache()
    own.close()
    own.close()
    for use in (
        lambda: own.module,
        lambda: own.step,
        lambda: own.memory(),
        lambda: own.new_cache(),
        lambda: own.session(),
        lambda: own([[1]]),
        lambda: own([[1]], cache=cache),
        lambda: own.generate([1]),
        lambda: own.generate([1], cache=cache),
        lambda: next(own.stream([1])),
        lambda: own.start([1]),
    ):
        with pytest.raises(LoadError, match="LD-CLOSED"):
            use()
    assert own.plan.explain()


def test_closing_during_a_stream_keeps_no_cache(own: modelrig.Model) -> None:
    stream = own.stream(PROMPT, max_new_tokens=5)
    next(stream)
    own.close()
    assert 4 == len(list(stream))  # what is begun may end
    assert 0 == own._pool.nbytes


def test_a_model_is_a_context_manager(llama_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), modelrig.load(llama_folder) as model:
        raise ZeroDivisionError
    with pytest.raises(LoadError, match="LD-CLOSED"):
        model.generate([1])


def test_without_a_tokenizer_ids_work_and_text_is_a_typed_error(bare: modelrig.Model) -> None:
    assert bare.tokenizer is None
    assert ("", 3) == (lambda out: (out.text, len(out.tokens)))(bare.generate(PROMPT, max_new_tokens=3))
    for use in (
        lambda: bare.generate("text"),
        lambda: bare.generate(["text"]),
        lambda: bare.generate(messages=[{"role": "user", "content": "x"}]),
        lambda: bare.chat_prompt([{"role": "user", "content": "x"}]),
        lambda: bare.generate(PROMPT, stop="x"),
    ):
        with pytest.raises(GenerateError) as caught:
            use()
        assert "GN-TOKENIZER" == caught.value.code


def test_with_a_tokenizer_in_another_form_ids_work_and_text_says_how_to_convert_it(llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with modelrig.load(folder) as model:
        assert model.tokenizer is None
        assert any("SentencePiece" in note for note in model.plan.notes)
        assert 3 == len(model.generate(PROMPT, max_new_tokens=3).tokens)
        session = model.session()
        assert 2 == len(session.generate(PROMPT, max_new_tokens=2).tokens)
        for use in (
            lambda: model.generate("text"),
            lambda: model.generate([PROMPT, "text"]),
            lambda: model.stream("text"),
            lambda: model.generate(messages=[{"role": "user", "content": "x"}]),
            lambda: model.chat_prompt([{"role": "user", "content": "x"}]),
            lambda: model.generate(PROMPT, stop="x"),
            lambda: session.generate("text"),
            lambda: session.send("text"),
        ):
            with pytest.raises(TokenizerError, match="SentencePiece") as caught:
                use()
            assert "TK-MISSING" == caught.value.code
            assert "pip install transformers sentencepiece protobuf" in caught.value.hint
        assert 3 == len(model.generate(PROMPT, max_new_tokens=3).tokens)


def test_a_broken_tokenizer_is_found_before_weights_are_read(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("modelrig.loading.materialise.materialise", None)
    with pytest.raises(TokenizerError, match="TK-JSON"):
        modelrig.load(folder)


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        (None, {}, "GN-INPUT"),
        (PROMPT, {"messages": []}, "GN-INPUT"),
        ([], {}, "GN-INPUT"),
        ([97], {}, "GN-INPUT"),
        (np.array(PROMPT), {}, "GN-INPUT"),
        (PROMPT, {"max_new_tokens": 0}, "GN-ARGS"),
        (PROMPT, {"max_tokens": 5}, "GN-UNKNOWN"),
        (PROMPT, {"stop_ids": [97]}, "GN-ARGS"),
        (PROMPT, {"min_new_tokens": 5, "max_new_tokens": 4}, "GN-ARGS"),
        (PROMPT, {"seed": [1, 2], "temperature": 1.0}, "GN-ARGS"),
    ],
)
def test_what_cannot_be_served_is_one_typed_error_at_the_call(
    bare: modelrig.Model, prompt: Any, options: dict[str, Any], code: str
) -> None:
    for call in (bare.generate, bare.stream):  # a stream says so when it is made, not when it is first read
        with pytest.raises(GenerateError) as caught:
            call(prompt, **options)
        assert code == caught.value.code


def test_broken_weights_are_a_typed_error_and_the_next_call_is_right(own: modelrig.Model) -> None:
    expected = ids_of(own, PROMPT, max_new_tokens=6)
    weight = own.module.get_parameter("model.norm.weight")
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(GenerateError, match="GN-NAN"):
        own.generate(PROMPT)
    assert 0 == own.memory()["cache"]
    weight.copy_(kept)
    assert expected == ids_of(own, PROMPT, max_new_tokens=6)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (1, 0), (-1, 5), (1, 2.5), (True, 5)])
def test_a_cache_of_impossible_size_is_refused(bare: modelrig.Model, batch: Any, length: Any) -> None:
    with pytest.raises(CacheError, match="CA-ARGS"):
        bare.new_cache(batch=batch, max_len=length)


def test_every_error_is_of_one_family(bare: modelrig.Model) -> None:
    with pytest.raises(ModelrigError) as caught:
        bare.generate([97])
    assert {"error": "GenerateError", "code": "GN-INPUT"}.items() <= caught.value.to_json().items()


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding", "quantized", "offloaded"])
def test_prompts_may_hold_end_of_text_ids_and_what_pads_them_is_no_token(tmp_path: Path, cache: str) -> None:
    """A pad token that is the end-of-text id too is told from it by its place, not by its number."""
    write_llama(tmp_path, eos_token_id=0, pad_token_id=0)
    prompts = [[0, 0, 5, 0], [7, 0], [0], [3, 4, 0, 0, 0, 9, 0]]
    with modelrig.load(tmp_path, cache=cache) as model:
        alone = [model.generate(prompt, max_new_tokens=9).tokens for prompt in prompts]
        assert alone == [one.tokens for one in model.generate(prompts, max_new_tokens=9)]
