"""The one loop that all decoders run in: propose → step(1 + k tokens) → accept → commit. Plain decoding is k = 0.

Rows share one cache, so they are fed equally many tokens. A row whose drafts are accepted further than another's is ahead: what it
has beyond is fed again in the next step, before drafts of its own. What is accepted is what the call's options choose, position by
position, so a draft that is wrong costs time and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelrig.components import DecoderCall
from modelrig.errors import PluginError, quoted
from modelrig.generation.detokenizer import Detokenizer
from modelrig.generation.feeding import Engine, Feeder
from modelrig.generation.options import GenerateOptions
from modelrig.generation.results import Generation, Piece, Row, Stats, peak_memory_bytes
from modelrig.generation.sampling import Sampler
from modelrig.generation.stops import StopStrings
from modelrig.planning.tokenizer_files import no_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelrig.components import Cache, DecoderMaker

__all__ = ["Engine", "Generation", "Piece", "Run", "Stats"]


class Run:
    """One call of generate: iterate over its `Piece`s, once, then ask for `results`.

    Args:
        prompts: the ids of each row that are not in the cache yet; rows of different lengths are padded on the left, as the
            cache's `padding` already says.
        histories: all ids of each row, for the penalties.
        limit: new tokens at most.
        returns: continuations of each prompt; the cache has one row for all of them.
        extra: pad tokens that the longest prompt has too.
        ranks: which of a prompt's continuations, best first, are wanted, where `returns` is 1; by default the best.

    Attributes:
        is_single: the caller gave one prompt and wants one result.
        keeps_answer: the cache shall hold the last new token too, which otherwise is chosen but not fed.
        on_end: called once, when the iteration ends or is given up; not after an error, which may have left anything in the
            cache.

    Raises:
        GenerateError: GN-ARGS for options that this model or batch cannot serve, GN-TOKENIZER for stop strings without a tokenizer.
        TokenizerError: TK-MISSING for stop strings where the tokenizer is in another form.
    """

    is_single = True
    keeps_answer = False
    on_end: Callable[[], None] | None = None

    def __init__(
        self,
        engine: Engine,
        decoder: DecoderMaker,
        cache: Cache,
        prompts: Sequence[Sequence[int]],
        histories: Sequence[Sequence[int]],
        options: GenerateOptions,
        limit: int,
        decoder_options: Any = None,
        *,
        extra: int = 0,
        returns: int = 1,
        ranks: Sequence[int] | None = None,
        companions: Mapping[str, Any] | None = None,
    ) -> None:
        if options.stop and engine.tokenizer is None:
            raise no_text(engine.other_form, "find a text to stop at in its ids", locus="stop")
        self.engine, self.prompts, self._options = engine, prompts, options
        self._limit, self._ranks = limit, ranks
        self._stop_ids = frozenset(engine.end_ids(options))
        self._feeder = Feeder(engine, cache, prompts, histories, extra)
        copies_of = getattr(decoder, "copies", None)
        self._copies: int = returns if copies_of is None else copies_of(decoder_options)
        num_rows, num_texts = len(prompts) * self._copies, max(1, len(prompts) * returns // options.num_return_sequences)
        self.sampler = Sampler(
            options,
            num_rows,
            engine.vocab_size,
            engine.device,
            sorted(self._stop_ids),
            copies=max(1, num_rows // num_texts),
            beams=None if copies_of is None else self._copies,
        )
        self.sampler.start([history for history in histories for _ in range(self._copies)])
        longest = max(map(len, histories)) + extra
        call = DecoderCall(
            texts=[history for history in histories for _ in range(self._copies)],
            limit=limit,
            vocab_size=engine.vocab_size,
            returns=returns if ranks is None else max(ranks) + 1,
            ends=self._ends,
            num_ends=len(self._stop_ids),
            choosing=self.sampler,
            padding=[longest - len(history) for history in histories for _ in range(self._copies)],
            companions=companions or {},
        )
        self.decoder = decoder.open(call, decoder_options)
        self.rows = [self._new_row() for _ in range(len(prompts) * returns)]
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0
        self._is_used = False

    @property
    def cache(self) -> Cache:
        """The cache that the rows are in."""
        return self._feeder.cache

    @property
    def num_forked(self) -> int:
        """Rows of another cache that the cache is going to be forked into; 0 if the rows stay where they are."""
        return len(self.prompts) * self._copies if self._copies > 1 or self._searches else 0

    @property
    def _searches(self) -> bool:
        return hasattr(self.decoder, "advance")

    def _new_row(self) -> Row:
        detokenizer = None if self.engine.tokenizer is None else Detokenizer(self.engine.tokenizer)
        return Row(self._limit, self._stop_ids, StopStrings(self._options.stop), detokenizer, [], [])

    def __iter__(self) -> Iterator[Piece]:
        if self._is_used:  # its cache may serve another call by now
            return
        self._is_used = True
        try:
            yield from self._pieces()
        except Exception:
            self.on_end = None
            raise
        finally:
            if self.on_end is not None:
                self.on_end()
                self.on_end = None

    def _pieces(self) -> Iterator[Piece]:
        started = time.perf_counter()
        turns = self._search() if self._searches else self._follow()
        pieces = next(turns)
        self.prefill_seconds = time.perf_counter() - started
        started, outside = time.perf_counter(), 0.0
        while True:
            is_over = all(row.finish_reason for row in self.rows)
            if is_over and self.keeps_answer:  # before the last pieces: a caller may not come back after them
                self._feeder.keep([row.tokens for row in self.rows])
            left = time.perf_counter()
            yield from pieces
            outside += time.perf_counter() - left  # what the caller does with the pieces is not decoding
            if is_over:
                break
            pieces = next(turns)
            self.steps += 1
            self.decode_seconds = time.perf_counter() - started - outside

    # -------------------------------------------------------------------------------------------- decoders that follow their rows

    def _follow(self) -> Iterator[list[Piece]]:
        """The pieces of the prompt's step, then of each turn."""
        with torch.inference_mode():
            logits = self._feeder.prefill()
            if self._copies > 1:
                self._feeder = self._feeder.forked(self._copies)
            last = self._choose_all(logits.repeat_interleave(self._copies, dim=0), None)
        yield self._emit(last)
        while True:
            with torch.inference_mode():
                drafts = self._drafts()
                if drafts is None:
                    logits = self._feeder.feed(last[:, None])[:, -1]
                    self._feeder.commit(1)
                    last = self._choose_all(logits, last)
                else:
                    pieces = self._verify(drafts)
                    last = torch.tensor([row.tokens[-1] for row in self.rows], device=self.engine.device)
            yield self._emit(last) if drafts is None else pieces

    def _choose_all(self, logits: Tensor, last: Tensor | None) -> Tensor:
        """The ids [rows] that follow. Where each costs work on the host, rows that have ended repeat their `last`."""
        if self.sampler.is_constrained and last is not None:
            going = [number for number, row in enumerate(self.rows) if row.finish_reason is None]
            last = last.clone()
            last[going] = self.sampler.choose(logits[going], going)
            return last
        return self.sampler.choose(logits)

    def _emit(self, ids: Tensor) -> list[Piece]:
        """Give every unfinished row its id."""
        self.sampler.check()
        going = ((number, row) for number, row in enumerate(self.rows) if row.finish_reason is None)
        values = ids.tolist()
        return [self._take(number, row, values[number : number + 1]) for number, row in going]

    def _take(self, number: int, row: Row, ids: Sequence[int]) -> Piece:
        text = "".join([row.take(token) for token in ids])
        if row.finish_reason is None and self.sampler.is_over(number):
            text += row.complete()
        return Piece(text, tuple(ids), number, row.finish_reason)

    # -------------------------------------------------------------------------------------------- drafts

    def _drafts(self) -> list[list[int]] | None:
        """What to feed each row after its first id that is not in the cache: what it is ahead by, then drafts. None for a plain
        step, which every row does with its newest id."""
        fed, room = self._feeder.num_fed, self._feeder.room()
        proposed = (
            self.decoder.propose([None if row.finish_reason else row.tokens for row in self.rows], room) if room > 0 else None
        )
        drafts = [[] for _ in self.rows] if proposed is None else self._checked(proposed, room)
        following = []
        for number, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            ahead = row.tokens[fed + 1 :]
            most = 0 if row.finish_reason else min(room - len(ahead), row.limit - len(row.tokens) - 1)
            if draft := draft[: max(0, most)]:
                draft = draft[: self.sampler.allowed(number, draft)]
            following.append([*ahead, *draft])
        return following if any(following) else None

    def _checked(self, proposed: Any, room: int) -> list[list[int]]:
        """Raise `PluginError` (PL-CONTRACT) unless these are ids of the vocabulary, a list for each row."""
        size, rows = self.engine.vocab_size, len(self.rows)
        is_right = isinstance(proposed, Sequence) and len(proposed) == rows
        is_right = is_right and all(isinstance(draft, Sequence) and len(draft) <= room for draft in proposed)
        if not is_right or any(type(token) is not int or not 0 <= token < size for draft in proposed for token in draft):
            raise PluginError(
                "PL-CONTRACT",
                f"propose returned {quoted(proposed)} for {rows} rows with room for {room}",
                hint=f"it must return None, or for each row a list of at most {room} ids below {size}",
                plugin=type(self.decoder).__name__,
            )
        return [list(draft) for draft in proposed]

    def _verify(self, following: Sequence[Sequence[int]]) -> list[Piece]:
        """Feed each row its first id that is not in the cache, and what follows; take what is accepted, and one id more."""
        fed, before = self._feeder.num_fed, [len(row.tokens) for row in self.rows]
        needed = min(1 + max(map(len, following)), 1 + self._feeder.room())
        width = self._width(needed)
        ids = []
        for row, more in zip(self.rows, following, strict=True):
            known = [*(row.tokens[fed : fed + 1] or row.tokens[-1:]), *more][:width]
            ids.append([*known, *known[-1:] * (width - len(known))])  # a row with fewer, or that has ended, is fed anything
        logits = self._feeder.feed(torch.tensor(ids, device=self.engine.device))
        pieces = self._accept(logits, ids, [count - fed - 1 for count in before])
        for row, more, count in zip(self.rows, following, before, strict=True):
            drafted = max(0, len(more) - max(0, count - fed - 1))
            row.drafted += drafted
            row.accepted += min(drafted, max(0, len(row.tokens) - count - 1))
        longest = max(len(row.tokens) for row in self.rows) - fed
        kept = min(longest, *(_matching(row, fed, fed_ids) for row, fed_ids in zip(self.rows, ids, strict=True)))
        self._feeder.commit(kept)
        if any(len(more) >= count - fed for more, count in zip(following, before, strict=True)):
            self.decoder.learn(needed - 1, kept - 1)
        return pieces

    def _width(self, needed: int) -> int:
        """Tokens to feed for a step that needs so many: as many as there is a graph for, if they fit."""
        width = next((one for one in self.engine.widths if one >= needed), needed)
        return width if width - 1 <= self._feeder.room() else needed

    def _accept(self, logits: Tensor, ids: Sequence[Sequence[int]], places: list[int]) -> list[Piece]:
        """Choose along each row's `ids` [rows, n], from the place of its newest one on, for as long as what is chosen is what was
        fed next. `logits` [rows, n, vocab]."""
        width = logits.shape[1]
        found: dict[int, list[Piece]] = {}
        going = [number for number, row in enumerate(self.rows) if row.finish_reason is None and places[number] < width]
        while going:
            chosen = self.sampler.choose(logits[going, [places[number] for number in going]], going)
            self.sampler.check()
            ahead = []
            for number, token in zip(going, chosen.tolist(), strict=True):
                row = self.rows[number]
                found.setdefault(number, []).append(self._take(number, row, [token]))
                places[number] += 1
                if row.finish_reason is None and places[number] < width and ids[number][places[number]] == token:
                    ahead.append(number)
            going = ahead
        return [_joined(pieces) for _, pieces in sorted(found.items())]

    # -------------------------------------------------------------------------------------------- decoders that search

    def _search(self) -> Iterator[list[Piece]]:
        """Nothing until the search is over, then all."""
        decoder: Any = self.decoder
        with torch.inference_mode():
            logits = self._feeder.prefill().repeat_interleave(self._copies, dim=0)
            origin = self._feeder
            self._feeder = origin.forked(self._copies)
            ids, parents = decoder.advance(logits)
        while not decoder.is_over:
            yield []
            with torch.inference_mode():
                if parents is not None:
                    self._feeder.reorder(parents)
                logits = self._feeder.feed(ids[:, None])[:, -1]
                self._feeder.commit(1)
                ids, parents = decoder.advance(logits)
                self.sampler.check()
        self._feeder = origin
        yield [self._take_all(number, found) for number, found in enumerate(self._found(decoder.finish()))]

    def _found(self, texts: Sequence[Sequence[Sequence[int]]]) -> Iterator[Sequence[int]]:
        """The ids of each row, of those that the search found for each prompt."""
        for number, found in enumerate(texts):
            yield from found if self._ranks is None else (found[self._ranks[number]],)

    def _take_all(self, number: int, ids: Sequence[int]) -> Piece:
        row = self.rows[number]
        text = "".join([row.take(token) for token in ids])
        if row.finish_reason is None:
            text += row.complete()
        return Piece(text, tuple(ids), number, row.finish_reason)

    def _ends(self, ids: Sequence[int]) -> bool:
        if ids[-1] in self._stop_ids or len(ids) >= self._limit:
            return True
        if not self._options.stop:
            return False
        row = self._new_row()
        for token in ids:
            row.take(token)
        return row.finish_reason is not None

    def results(self) -> list[Generation]:
        """One `Generation` a row."""
        peak = peak_memory_bytes(self.engine.device)
        copies = len(self.rows) // len(self.prompts)
        return [
            Generation(
                "".join(row.text),
                tuple(row.tokens),
                row.finish_reason or "cancelled",
                Stats(
                    len(self.prompts[number // copies]),
                    len(row.tokens),
                    self.prefill_seconds,
                    self.decode_seconds,
                    peak,
                    self.steps,
                    row.drafted,
                    row.accepted,
                ),
            )
            for number, row in enumerate(self.rows)
        ]


def _matching(row: Row, fed: int, ids: Sequence[int]) -> int:
    """How many of `ids`, fed from the new token number `fed` on, the cache may keep for the row: any once it has ended."""
    known = row.tokens[fed:]
    same = next((place for place, (ours, token) in enumerate(zip(known, ids, strict=False)) if ours != token), len(known))
    return len(ids) if row.finish_reason and same >= len(known) else min(same, len(ids))


def _joined(pieces: Sequence[Piece]) -> Piece:
    last = pieces[-1]
    ids = tuple(token for one in pieces for token in one.tokens)
    return Piece("".join(one.text for one in pieces), ids, last.row, last.finish_reason)
