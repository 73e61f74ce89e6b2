"""The loop, over a model that is a table: token t is followed by FOLLOWS[t]. Everything around the numbers shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from modelrig.components import AttentionSpec, DecoderCall
from modelrig.errors import CacheError, GenerateError, PluginError
from modelrig.generation import loop
from modelrig.generation.decoding import PlainRun
from modelrig.generation.loop import Engine, Piece, Run, Stats
from modelrig.generation.options import GenerateOptions
from modelrig.generation.tokenizer import Tokenizer
from modelrig_plugins.caches.dynamic_module import DynamicCache
from modelrig_plugins.decoders.greedy import GreedyDecoder
from tokenizer_folders import byte_level, write

CPU = torch.device("cpu")
VOCAB = 40
EOS = 39
LAYERS = (AttentionSpec(num_heads=1, num_key_value_heads=1, head_dim=2, value_dim=2, scale=1.0),)


class Table:
    """A model whose logits are 5 for the follower, less for the others; it remembers what it was fed."""

    def __init__(self, follows: dict[int, int], vocab: int = VOCAB) -> None:
        self.vocab, self.follows = vocab, torch.arange(1, vocab + 1) % vocab
        for token, follower in follows.items():
            self.follows[token] = follower
        self.fed: list[tuple[list[list[int]], bool]] = []
        self.fail_at: int | None = None

    def step(self, ids: Tensor, slots: Any, last_only: bool = False) -> Tensor:
        if self.fail_at == len(self.fed):
            raise KeyboardInterrupt
        self.fed.append((ids.tolist(), last_only))
        for layer in slots.layers:  # as a real model does
            keys = ids[:, None, :, None].expand(-1, 1, -1, 2).float()
            layer.update(keys, keys, slots)
        logits = torch.linspace(0, 1, self.vocab).repeat(*ids.shape, 1)
        logits.scatter_(2, self.follows[ids][..., None], 5.0)
        return logits[:, -1:] if last_only else logits


class Drafts(PlainRun):
    """Proposes k tokens: the true ones, but for every `wrong`-th draft."""

    def __init__(self, table: Table, k: int, wrong: int) -> None:
        self.table, self.k, self.wrong, self.count = table, k, wrong, 0
        self.learned: list[tuple[int, int]] = []

    def open(self, call: DecoderCall, options: Any) -> Drafts:
        super().__init__(call)
        return self

    def propose(self, new: Sequence[Sequence[int] | None], room: int) -> list[list[int]] | None:
        return [self.draft(ids[-1], room) if ids is not None else [] for ids in new] if self.k else None

    def draft(self, last: int, room: int) -> list[int]:
        drafts = []
        for _ in range(min(self.k, room)):
            last = int(self.table.follows[last])
            self.count += 1
            drafts.append((last + (self.count % self.wrong == 0)) % self.table.vocab)
        return drafts

    def learn(self, drafted: int, gained: int) -> None:
        self.learned.append((drafted, gained))


def make(
    table: Table,
    prompts: Sequence[list[int]],
    limit: int = 8,
    *,
    cache: Any = None,
    tokenizer: Tokenizer | None = None,
    decoder: Any = GreedyDecoder,
    stable_length: int | None = None,
    **options: Any,
) -> Run:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = cache or DynamicCache.create(
        LAYERS, batch=len(prompts), capacity=2000, dtype=torch.float32, device=CPU, padding=padding
    )
    engine = Engine(
        step=table.step, stable_length=stable_length, vocab_size=table.vocab, device=CPU, tokenizer=tokenizer, eos_ids=(EOS,)
    )
    return Run(engine, decoder, cache, prompts, prompts, GenerateOptions.make(**options), limit)


def tokens(run: Run) -> list[list[int]]:
    for _ in run:
        pass
    return [list(result.tokens) for result in run.results()]


def reasons(run: Run) -> list[str]:
    return [result.finish_reason for result in run.results()]


# ------------------------------------------------------------------------------------------------ plain decoding


def test_each_token_follows_the_one_before_until_the_limit() -> None:
    run = make(Table({}), [[3]], 5)
    assert [[4, 5, 6, 7, 8]] == tokens(run)
    assert ["length"] == reasons(run)
    assert "" == run.results()[0].text  # there is no tokenizer


def test_one_new_token_needs_no_step_of_its_own() -> None:
    table = Table({})
    assert [[4]] == tokens(make(table, [[1, 2, 3]], 1))
    assert [([[1, 2, 3]], True)] == table.fed


def test_the_last_new_token_is_not_fed() -> None:
    table = Table({})
    run = make(table, [[1, 2]], 3)
    tokens(run)
    assert [([[1, 2]], True), ([[3]], False), ([[4]], False)] == table.fed
    assert 4 == run.cache.length


def test_rows_are_padded_on_the_left_and_end_by_themselves() -> None:
    table = Table({12: EOS})
    run = make(table, [[1, 2, 3], [10]], 6)
    assert [[4, 5, 6, 7, 8, 9], [11, 12, EOS]] == tokens(run)
    assert ["length", "stop"] == reasons(run)
    assert ([[1, 2, 3], [0, 0, 10]], True) == table.fed[0]


def test_all_rows_done_end_the_loop_before_the_limit() -> None:
    table = Table({5: EOS, 12: EOS})
    assert [[4, 5, EOS], [12, EOS]] == tokens(make(table, [[3], [11]], 100))
    assert 3 == len(table.fed)


def test_pieces_have_the_tokens_of_their_row_until_it_ends() -> None:
    run = make(Table({12: EOS}), [[3], [11]], 3)
    assert [
        Piece("", (4,), 0), Piece("", (12,), 1),
        Piece("", (5,), 0), Piece("", (EOS,), 1, "stop"),
        Piece("", (6,), 0, "length"),
    ] == list(run)  # fmt: skip


@pytest.mark.parametrize(("stable_length", "parts"), [(None, [512, 512, 76]), (1099, [1100]), (1100, [512, 512, 76])])
def test_long_prompts_come_in_parts_where_the_model_allows_it(stable_length: int | None, parts: list[int]) -> None:
    table, prompt = Table({}), [number % VOCAB for number in range(1100)]
    assert [[20]] == tokens(make(table, [prompt], 1, stable_length=stable_length))
    assert parts == [len(rows[0]) for rows, _ in table.fed]
    assert all(last_only for _, last_only in table.fed)
    assert prompt == [token for rows, _ in table.fed for token in rows[0]]


# ------------------------------------------------------------------------------------------------ ends


def test_an_end_of_text_ends_unless_it_is_ignored() -> None:
    assert [[4, EOS]] == tokens(make(Table({4: EOS}), [[3]]))
    assert [[4, EOS, 0, 1, 2, 3, 4, EOS]] == tokens(make(Table({4: EOS}), [[3]], ignore_eos=True))


def test_stop_ids_end_beside_the_end_of_text() -> None:
    assert [[4, 5, 6]] == tokens(make(Table({}), [[3]], stop_ids=[6, 20]))
    assert [[4, EOS]] == tokens(make(Table({4: EOS}), [[3]], stop_ids=6))
    assert [[38, EOS, 0]] == tokens(make(Table({}), [[37]], stop_ids=0, ignore_eos=True))


def test_no_end_is_chosen_before_the_least_number_of_tokens() -> None:
    run = make(Table({4: EOS, 38: 4}), [[4]], 10, min_new_tokens=3)
    # EOS and 4 take turns in the table; where EOS may not stand, the largest other logit does
    assert [[38, 4, 38, 4, EOS]] == tokens(run) and ["stop"] == reasons(run)
    assert [[7, 8, 9, 10]] == tokens(make(Table({}), [[6]], 9, min_new_tokens=2, stop_ids=10))


def test_the_token_that_reaches_the_limit_and_stops_counts_as_stop() -> None:
    run = make(Table({4: EOS}), [[3]], 2)
    assert ([[4, EOS]], ["stop"]) == (tokens(run), reasons(run))


# ------------------------------------------------------------------------------------------------ options reach the sampler


def test_penalties_reach_the_logits() -> None:
    loops, no_end = {3: 4, 4: 3}, {EOS: -9.0}
    assert [[4, 3, 4, 3]] == tokens(make(Table(loops), [[3]], 4))
    assert [[4, 38, 37, 36]] == tokens(make(Table(loops), [[3]], 4, repetition_penalty=900, logit_bias=no_end))  # prompt and text
    assert [[4, 3, 38]] == tokens(make(Table(loops), [[3]], 3, presence_penalty=9, logit_bias=no_end))  # the text only
    assert [[3, 3, 3, 38]] == tokens(make(Table({3: 3}), [[3, 3]], 4, frequency_penalty=2, logit_bias=no_end))


def test_a_bias_decides() -> None:
    assert [[9, 9, 9]] == tokens(make(Table({}), [[3]], 3, logit_bias={9: 100}))


def test_copies_draw_with_seeds_of_their_own() -> None:
    flat = Table({})
    given = {"temperature": 50.0, "ignore_eos": True, "num_return_sequences": 2}
    rows = tokens(make(flat, [[3], [3]], 12, seed=7, **given))
    assert rows == tokens(make(flat, [[3], [3]], 12, seed=7, **given))
    assert rows[0] != rows[1]
    assert [rows[1]] == tokens(make(flat, [[3]], 12, seed=8, temperature=50.0, ignore_eos=True))


def test_ids_beyond_the_vocabulary_and_seeds_beyond_the_batch_are_refused() -> None:
    for options in ({"stop_ids": VOCAB}, {"logit_bias": {VOCAB: 1}}, {"seed": [1, 2], "temperature": 1}):
        with pytest.raises(GenerateError, match="GN-ARGS"):
            make(Table({}), [[3]], **options)


def test_logits_that_are_not_finite_end_the_call() -> None:
    table = Table({})
    step, count = table.step, []

    def broken(*arguments: Any) -> Tensor:
        count.append(1)
        return step(*arguments) * (math.nan if len(count) == 3 else 1.0)

    run = make(table, [[3]])
    run._feeder.engine = Engine(step=broken, vocab_size=VOCAB, device=CPU, tokenizer=None, eos_ids=())
    ended: list[int] = []
    run.on_end = lambda: ended.append(1)
    with pytest.raises(GenerateError, match="after 2 new tokens") as caught:
        tokens(run)
    assert "GN-NAN" == caught.value.code
    assert [] == ended  # the cache may hold numbers that are none


# ------------------------------------------------------------------------------------------------ interruptions


def test_a_stream_that_is_closed_early_was_cancelled() -> None:
    run, ended = make(Table({}), [[3]]), []
    run.on_end = lambda: ended.append(1)
    stream = iter(run)
    assert [(4,), (5,)] == [next(stream).tokens, next(stream).tokens]
    stream.close()
    assert ([1], ["cancelled"]) == (ended, reasons(run))
    assert (4, 5) == run.results()[0].tokens
    assert [] == list(run)
    assert [1] == ended


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interruption_keeps_what_there_is(at: int) -> None:
    table, ended = Table({}), []
    table.fail_at = at
    run = make(table, [[3]])
    run.on_end = lambda: ended.append(1)
    with pytest.raises(KeyboardInterrupt):
        tokens(run)
    assert [1] == ended
    assert tuple(range(4, 4 + at)) == run.results()[0].tokens
    run.cache.reset()
    table.fail_at = None
    assert [[4, 5]] == tokens(make(table, [[3]], 2, cache=run.cache))


def test_a_run_is_used_once() -> None:
    run = make(Table({}), [[3]], 2)
    assert 2 == len(list(run))
    assert [] == list(run)
    assert (4, 5) == run.results()[0].tokens


def test_a_full_cache_is_an_error_that_leaves_it_usable() -> None:
    cache = DynamicCache.create(LAYERS, batch=1, capacity=4, dtype=torch.float32, device=CPU)
    with pytest.raises(CacheError, match="CA-FULL"):
        tokens(make(Table({}), [[1, 2]], 8, cache=cache))
    assert 4 == cache.length
    cache.rewind(2)
    assert [[4, 5]] == tokens(make(Table({}), [[3]], 2, cache=cache))


# ------------------------------------------------------------------------------------------------ caches that keep the answer


def keys(cache: Any) -> list[list[int]]:
    return cache.layers[0].keys[:, 0, : cache.length, 0].long().tolist()


@pytest.mark.parametrize("limit", [1, 4])
def test_an_answer_is_kept_whole_where_it_is_asked_for(limit: int) -> None:
    run = make(Table({}), [[1, 2]], limit)
    run.keeps_answer = True
    tokens(run)
    assert [list(range(1, 3 + limit))] == keys(run.cache)
    following = make(Table({}), [[30]], 2, cache=run.cache)
    following.keeps_answer = True
    assert [[31, 32]] == tokens(following)
    assert [[*range(1, 3 + limit), 30, 31, 32]] == keys(run.cache)


def test_an_answer_is_whole_when_its_last_piece_comes() -> None:
    run = make(Table({}), [[1, 2]], 3)
    run.keeps_answer = True
    for piece in run:
        if piece.finish_reason:
            break
    assert [[1, 2, 3, 4, 5]] == keys(run.cache)


def test_rows_that_end_early_are_fed_until_the_last_one_ends() -> None:
    run = make(Table({12: EOS}), [[3], [11]], 4)
    run.keeps_answer = True
    tokens(run)
    first, second = keys(run.cache)
    assert [3, 4, 5, 6, 7] == first
    assert [11, 12, EOS] == second[:3] and len(first) == len(second)  # what stands behind an end does not count


def test_a_cache_that_a_run_filled_serves_outside_of_inference_mode() -> None:
    run = make(Table({}), [[1, 2]], 300)  # long enough that the buffers grew
    tokens(run)
    with torch.no_grad():
        Table({}).step(torch.tensor([[9]]), run.cache.begin(1))
        run.cache.commit(1)
    assert 9 == keys(run.cache)[0][-1]
    assert not run.cache.layers[0].keys.is_inference()


# ------------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize("wrong", [1, 2, 3, 1000])
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("limit", [1, 5, 11])
def test_drafts_change_the_steps_and_not_the_tokens(k: int, wrong: int, limit: int) -> None:
    table, plain = Table({9: 3}), Table({9: 3})
    expected = tokens(make(plain, [[1, 2]], limit))
    run = make(table, [[1, 2]], limit, decoder=Drafts(table, k, wrong))
    assert expected == tokens(run)
    assert len(table.fed) <= len(plain.fed)
    held = keys(run.cache)[0]
    assert [1, 2, *expected[0]][: len(held)] == held[: 2 + limit]


def test_drafts_that_all_fit_save_steps() -> None:
    table = Table({})
    assert [list(range(4, 14))] == tokens(make(table, [[3]], 10, decoder=Drafts(table, 4, 1000)))
    assert 3 == len(table.fed)  # the prompt, then 5 tokens a step


def test_a_row_that_ends_within_accepted_drafts_is_cut_there() -> None:
    table = Table({6: EOS})
    run = make(table, [[3]], 10, decoder=Drafts(table, 4, 1000))
    run.keeps_answer = True
    assert [[4, 5, 6, EOS]] == tokens(run)
    assert [[3, 4, 5, 6, EOS]] == keys(run.cache)


@pytest.mark.parametrize("proposed", [[], [[1], [2]], [[1] * 3000], [[VOCAB]], [[-1]], [[True]], [[1.0]], 7, [None]])
def test_a_decoder_that_proposes_the_impossible_is_named(proposed: Any) -> None:
    class Odd(Drafts):
        def propose(self, new: Any, room: int) -> Any:
            return proposed

    with pytest.raises(PluginError, match="propose returned") as caught:
        tokens(make(Table({}), [[3]], decoder=Odd(Table({}), 0, 1)))
    assert ("PL-CONTRACT", "Odd") == (caught.value.code, caught.value.plugin)


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write(tmp_path_factory.mktemp("tokenizer"), byte_level())
    made = Tokenizer.from_folder(folder, 400)
    assert made is not None
    return made


def spelling(tokenizer: Tokenizer, text: str) -> tuple[Table, list[int]]:
    """A table that spells `text` byte by byte; every byte may follow one other only, so texts have no byte twice."""
    from modelrig.generation.detokenizer import BYTE_OF

    names = {byte: name for name, byte in BYTE_OF.items()}
    ids = [tokenizer.token_to_id(names[byte]) for byte in text.encode()]
    assert len(set(ids)) == len(ids)
    return Table(dict(pairwise(ids)), 400), ids


def stream(table: Table, ids: list[int], tokenizer: Tokenizer, **options: Any) -> tuple[list[str], Run]:
    run = make(table, [ids[:1]], len(ids) - 1, tokenizer=tokenizer, **options)
    return [piece.text for piece in run], run


def test_pieces_never_end_within_a_character(tokenizer: Tokenizer) -> None:
    table, ids = spelling(tokenizer, "aé漢😀b")
    pieces, run = stream(table, ids, tokenizer)
    assert ["", "é", "", "", "漢", "", "", "", "😀", "b"] == pieces
    assert "é漢😀b" == run.results()[0].text


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    table, ids = spelling(tokenizer, "ab漢")
    run = make(table, [ids[:1]], 3, tokenizer=tokenizer)
    assert "b\ufffd" == "".join(piece.text for piece in run)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("def", "bc", "stop"),
        (["xyz", "de"], "bc", "stop"),
        ("b", "", "stop"),
        ("efx", "bcdefgh", "length"),
        ("gh", "bcdef", "stop"),
        ("hi", "bcdefgh", "length"),
        (["cdefgh", "e"], "b", "stop"),
    ],
)
def test_stop_strings_are_never_shown_in_part(tokenizer: Tokenizer, stop: Any, text: str, reason: str) -> None:
    table, ids = spelling(tokenizer, "abcdefgh")
    pieces, run = stream(table, ids, tokenizer, stop=stop)
    assert (text, [reason]) == ("".join(pieces), reasons(run))
    assert text == run.results()[0].text
    for end in range(len(pieces)):
        assert text.startswith("".join(pieces[:end]))


def test_a_stop_id_lets_out_what_was_held_back(tokenizer: Tokenizer) -> None:
    table, ids = spelling(tokenizer, "abcd")
    pieces, run = stream(table, ids, tokenizer, stop="cx", stop_ids=ids[3])
    assert (["b", "", "c"], ["stop"]) == (pieces, reasons(run))


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(GenerateError, match="GN-TOKENIZER") as caught:
        make(Table({}), [[3]], stop="x")
    assert "stop" == caught.value.locus


# ------------------------------------------------------------------------------------------------ figures


def test_figures_count_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    table = Table({12: EOS})
    step = table.step

    def timed(*arguments: Any) -> Tensor:
        now[0] += 10 if arguments[-1] is True else 1
        return step(*arguments)

    run = make(table, [[1, 2, 3], [10]], 5)
    run._feeder.engine = Engine(step=timed, vocab_size=VOCAB, device=CPU, tokenizer=None, eos_ids=(EOS,))
    for _ in run:
        now[0] += 100  # what the caller does is not decoding
    first, second = (result.stats for result in run.results())
    assert (3, 5, 10.0, 4.0) == (first.prompt_tokens, first.new_tokens, first.prefill_seconds, first.decode_seconds)
    assert (1, 3) == (second.prompt_tokens, second.new_tokens)
    assert (1.0, 0.5) == (first.tokens_per_second, second.tokens_per_second)
    assert first.peak_memory_bytes > 50 << 20


def test_one_token_has_no_rate() -> None:
    assert 0.0 == Stats(3, 1, 1.0, 0.0, 0).tokens_per_second
