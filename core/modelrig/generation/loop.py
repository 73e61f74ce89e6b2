"""The one loop that all decoders run in: propose → step(1 + k tokens) → accept → commit. Plain decoding is k = 0."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch import Tensor

from modelrig.errors import CacheError, PluginError
from modelrig.generation.caches import begin
from modelrig.generation.detokenizer import Detokenizer
from modelrig.generation.options import GenerateOptions
from modelrig.generation.sampling import Sampler
from modelrig.generation.stops import StopStrings
from modelrig.planning.tokenizer_files import OtherForm, no_text

if TYPE_CHECKING:
    from modelrig.components import Cache, DecoderMaker
    from modelrig.generation.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens of a prompt per step: bounds activations, changes no result


@frozen(kw_only=True)
class Engine:
    """What the loop needs of a loaded model.

    Attributes:
        stable_length: a longer prompt is prefilled in one step, because parts would give another result; None for none.
        restarts_at: beyond this length all keys are computed anew, because the model's positions then turn otherwise.
    """

    step: Callable[..., Tensor]
    stable_length: int | None = None
    restarts_at: int | None = None
    vocab_size: int
    device: torch.device
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    other_form: OtherForm | None = None  # of the tokenizer, where there is none that can be used


@frozen
class Stats:
    """Figures of one generation. Seconds are those of the whole batch; `prompt_tokens` were really prefilled for this row."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, per second of decoding."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 and self.new_tokens > 1 else 0.0


@frozen
class Generation:
    """One continuation. `tokens` are the new ids only; `text` ends before a stop string.

    `finish_reason` is "stop" (an end-of-text or stop id, or a stop string), "length" (`max_new_tokens`, or a full context), or
    "cancelled" when the stream was closed before.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stats: Stats


@frozen
class Piece:
    """A part of a stream: the text of row `row` that became certain, and the ids behind it. `finish_reason` is set on its last."""

    text: str
    tokens: tuple[int, ...]
    row: int
    finish_reason: str | None = None


@define
class _Row:
    """What one row has produced so far."""

    limit: int
    stop_ids: frozenset[int]
    stops: StopStrings
    detokenizer: Detokenizer | None
    tokens: list[int]
    text: list[str]
    finish_reason: str | None = None

    def take(self, token: int) -> str:
        """Add one token; returns the text that became certain."""
        self.tokens.append(token)
        text = ""
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.detokenizer is not None:
            text, stopped = self.stops.push(self.detokenizer.push(token))
            self.finish_reason = "stop" if stopped else None
        if self.finish_reason is None and len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._rest()
        self.text.append(text)
        return text

    def _rest(self) -> str:
        """What was held back, once the row has ended."""
        if self.detokenizer is None or self.stops.stopped:
            return ""
        text, stopped = self.stops.push(self.detokenizer.finish())
        if not stopped:
            more, stopped = self.stops.flush()
            text += more
        if stopped:
            self.finish_reason = "stop"
        return text


class Run:
    """One call of generate: iterate over its `Piece`s, once, then ask for `results`.

    Args:
        prompts: the ids of each row that are not in the cache yet; rows of different lengths are padded on the left, as the
            cache's `padding` already says.
        histories: all ids of each row, for the penalties.
        limit: new tokens at most.

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
    ) -> None:
        if options.stop and engine.tokenizer is None:
            raise no_text(engine.other_form, "find a text to stop at in its ids", locus="stop")
        batch = len(prompts)
        stop_ids = {*(() if options.ignore_eos else engine.eos_ids), *(options.stop_ids or ())}
        self.engine, self.cache, self.prompts, self.histories = engine, cache, prompts, histories
        self.sampler = Sampler(options, batch, engine.vocab_size, engine.device, sorted(stop_ids))
        self.sampler.start(histories)
        self.decoder = decoder.open(batch, self._choose, decoder_options)
        self.rows = [
            _Row(
                limit,
                frozenset(stop_ids),
                StopStrings(options.stop),
                None if engine.tokenizer is None else Detokenizer(engine.tokenizer),
                [],
                [],
            )
            for _ in prompts
        ]
        self.prefill_seconds = self.decode_seconds = 0.0
        self._is_used = False
        self._held = 0  # tokens in the cache before this run
        self._fed: list[Tensor] = []  # ids [batch, n] that this run put there, if it may have to do so again

    def _choose(self, logits: Tensor) -> Tensor:
        """Logits [batch, vocab] → ids [batch], by the call's options."""
        ids = self.sampler(self.sampler.process(logits))
        self.sampler.observe(ids)
        return ids

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
        self._held = self.cache.length
        started = time.perf_counter()
        with torch.inference_mode():
            accepted = self._accept(self._prefill(), None)
        pieces = self._emit(accepted)
        self.prefill_seconds = time.perf_counter() - started
        started, outside = time.perf_counter(), 0.0
        while True:
            is_over = all(row.finish_reason for row in self.rows)
            if is_over and self.keeps_answer:  # before the last pieces: a caller may not come back after them
                self._keep_answer(accepted[:, -1:])
            left = time.perf_counter()
            yield from pieces
            outside += time.perf_counter() - left  # what the caller does with the pieces is not decoding
            if is_over:
                break
            accepted = self._step(accepted[:, -1:])
            pieces = self._emit(accepted)
            self.decode_seconds = time.perf_counter() - started - outside

    def _prefill(self) -> Tensor:
        """All prompts into the cache; returns the logits of their last tokens, [batch, 1, vocab]."""
        length = max(map(len, self.prompts))
        padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in self.prompts]
        ids = torch.tensor(padded, device=self.engine.device)
        stable = self.engine.stable_length
        chunk = PREFILL_CHUNK if stable is None or self._held + length <= stable else length
        for start in range(0, length, chunk):
            part = ids[:, start : start + chunk]
            logits, before = self._feed(part, last_only=True)
            self.cache.commit(before + part.shape[1])
        return logits

    def _feed(self, ids: Tensor, *, last_only: bool) -> tuple[Tensor, int]:
        """The logits of `ids` [batch, n], or only of the last, and how many tokens before them have to be committed again."""
        if self.engine.restarts_at is not None:
            self._fed.append(ids)
            if self._crosses(self.cache.length, ids.shape[1]):
                return self._feed_anew(ids.shape[1], last_only=last_only)
        return self.engine.step(ids, begin(self.cache, ids.shape[1]), last_only), 0

    def _feed_anew(self, count: int, *, last_only: bool) -> tuple[Tensor, int]:
        """`_feed` of the last `count` tokens, with all tokens before them computed again."""
        before = self._held
        if before and [len(history) for history in self.histories] != [before + len(prompt) for prompt in self.prompts]:
            text = f"beyond {self.engine.restarts_at} tokens all of them are computed anew, and those in the cache are not known"
            raise CacheError("CA-REWIND", text, hint="begin with an empty cache, or use a session")
        known = [history[:before] for history in self.histories]
        first = torch.tensor(known, dtype=torch.int64, device=self.engine.device).view(len(known), -1)
        ids = torch.cat((first, *self._fed), dim=1)
        self.cache.rewind(0)
        logits = self.engine.step(ids, begin(self.cache, ids.shape[1]), last_only or count == 1)
        return logits[:, -count:], ids.shape[1] - count

    def _crosses(self, held: int, count: int) -> bool:
        """Whether `count` more tokens lead a row from within the length at which the model restarts to beyond it."""
        assert self.engine.restarts_at is not None
        longest = max(map(len, self.prompts))
        padding = {0 if self._held else longest - len(prompt) for prompt in self.prompts}
        return any(0 < held - pad <= self.engine.restarts_at < held + count - pad for pad in padding)

    def _step(self, last: Tensor) -> Tensor:
        """One turn of the loop: the ids that follow `last` [batch, 1], at least one a row."""
        with torch.inference_mode():
            drafts = self.decoder.propose(last[:, 0])
            ids = last if drafts is None else torch.cat((last, drafts), dim=1)
            logits, before = self._feed(ids, last_only=False)
            accepted = self._accept(logits, drafts)
            self.cache.commit(before + accepted.shape[1])
            if self._fed:
                self._fed[-1] = ids[:, : accepted.shape[1]]
        return accepted

    def _keep_answer(self, last: Tensor) -> None:
        """Feed `last` [batch, 1]; or for a single row, forget what was accepted beyond its end."""
        end = self._held + max(map(len, self.prompts)) + len(self.rows[0].tokens)
        if len(self.rows) == 1 and self.cache.length >= end:
            self.cache.rewind(end)
            return
        with torch.inference_mode():
            _, before = self._feed(last, last_only=True)
            self.cache.commit(before + 1)

    def _accept(self, logits: Tensor, drafts: Tensor | None) -> Tensor:
        accepted = self.decoder.accept(logits, drafts)
        if accepted.dim() != 2 or not 1 <= accepted.shape[1] <= logits.shape[1]:
            raise PluginError(
                "PL-CONTRACT",
                f"accept returned ids {list(accepted.shape)} for logits {list(logits.shape)}",
                hint=f"it must return [batch, 1 to {logits.shape[1]}]",
                plugin=type(self.decoder).__name__,
            )
        return accepted

    def _emit(self, accepted: Tensor) -> list[Piece]:
        """Give every unfinished row its accepted ids."""
        self.sampler.check()
        pieces = []
        for number, (row, ids) in enumerate(zip(self.rows, accepted.tolist(), strict=True)):
            if row.finish_reason is not None:
                continue
            before, text = len(row.tokens), ""
            for token in ids:
                text += row.take(token)
                if row.finish_reason is not None:
                    break
            pieces.append(Piece(text, tuple(row.tokens[before:]), number, row.finish_reason))
        return pieces

    def results(self) -> list[Generation]:
        """One `Generation` a row."""
        peak = peak_memory_bytes(self.engine.device)
        return [
            Generation(
                "".join(row.text),
                tuple(row.tokens),
                row.finish_reason or "cancelled",
                Stats(len(prompt), len(row.tokens), self.prefill_seconds, self.decode_seconds, peak),
            )
            for row, prompt in zip(self.rows, self.prompts, strict=True)
        ]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: this process's resident set, or the allocator's peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
