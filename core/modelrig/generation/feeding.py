"""Tokens into a cache, logits out of the model: prompts in parts, steps, and what some models need at certain lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor

from modelrig.errors import CacheError
from modelrig.generation.caches import begin
from modelrig.planning.tokenizer_files import OtherForm

if TYPE_CHECKING:
    from modelrig.components import Cache
    from modelrig.generation.options import GenerateOptions
    from modelrig.generation.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # tokens of a prompt per step: bounds activations, changes no result


@frozen(kw_only=True)
class Engine:
    """What generation needs of a loaded model.

    Attributes:
        stable_length: a longer prompt is prefilled in one step, because parts would give another result; None for none.
        restarts_at: beyond this length all keys are computed anew, because the model's positions then turn otherwise.
        widths: tokens that a step of a few should have, in order, because a compiler has a graph for each; empty for any.
    """

    step: Callable[..., Tensor]
    stable_length: int | None = None
    restarts_at: int | None = None
    widths: tuple[int, ...] = ()
    vocab_size: int
    device: torch.device
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    other_form: OtherForm | None = None  # of the tokenizer, where there is none that can be used

    def end_ids(self, options: GenerateOptions) -> tuple[int, ...]:
        """The ids that end a row of a call with these options."""
        return tuple(sorted({*(() if options.ignore_eos else self.eos_ids), *(options.stop_ids or ())}))


class Feeder:
    """The rows of one call in their cache.

    Args:
        prompts: the ids of each row that are not in the cache yet; rows of different lengths are padded on the left, as the
            cache's `padding` already says.
        histories: all ids of each row.
        extra: pad tokens that the longest prompt has too.

    Attributes:
        num_fed: new tokens in the cache, of each row.
    """

    def __init__(
        self,
        engine: Engine,
        cache: Cache,
        prompts: Sequence[Sequence[int]],
        histories: Sequence[Sequence[int]],
        extra: int = 0,
    ) -> None:
        self.engine, self.cache, self._prompts, self._histories = engine, cache, prompts, histories
        self.num_fed = 0
        self._held = self._length = cache.length  # tokens in the cache before this call, and now
        self._pads: Sequence[int] = getattr(cache, "padding", (0,))  # of what is held, which a cache of others may not tell
        self._longest, self._extra = max(map(len, prompts)) + extra, extra
        self._again = 0  # tokens before those of this step that are fed again and have to be committed again
        self._fed: list[Tensor] = []  # ids [batch, n] that were put there, if that may have to be done again

    def prefill(self) -> Tensor:
        """All prompts into the cache; returns the logits of their last tokens, [batch, vocab]."""
        length = self._longest
        padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in self._prompts]
        ids = torch.tensor(padded, device=self.engine.device)
        stable = self.engine.stable_length
        chunk = PREFILL_CHUNK if stable is None or self._held + length <= stable else length
        for start in range(0, length, chunk):
            part = ids[:, start : start + chunk]
            logits = self.feed(part, last_only=True)
            self.commit(part.shape[1])
        self.num_fed = 0
        return logits[:, -1]

    def feed(self, ids: Tensor, *, last_only: bool = False) -> Tensor:
        """The logits [batch, n, vocab] of `ids` [batch, n], or [batch, 1, vocab] of the last; `commit` is to follow."""
        self._again = 0
        if self.cache.length != self._length:
            text = f"it holds {self.cache.length} tokens where this call left {self._length}: it was used for something else"
            raise CacheError("CA-STATE", text, hint="a cache serves one call at a time")
        if self.engine.restarts_at is not None:
            self._fed.append(ids)
            if self._crosses(self.cache.length, ids.shape[1]):
                return self._feed_anew(ids.shape[1], last_only=last_only)
        return self.engine.step(ids, begin(self.cache, ids.shape[1]), last_only)

    def commit(self, count: int) -> None:
        """Keep the first `count` tokens that were fed."""
        self.cache.commit(self._again + count)
        self._length = self.cache.length
        self.num_fed += count
        if self._fed:
            self._fed[-1] = self._fed[-1][:, :count]

    def room(self) -> int:
        """How many tokens a step may have beside the one of a plain step, to give what the same tokens give one by one."""
        held = self.cache.length
        ends = [self.cache.capacity]
        if self.engine.stable_length is not None:
            ends.append(self.engine.stable_length)
        if self.engine.restarts_at is not None:  # no row may cross it in a step of several
            ends += [self.engine.restarts_at + pad for pad in self._padding if 0 < held - pad <= self.engine.restarts_at]
        return max(0, min(ends) - held - 1)

    def forked(self, copies: int) -> Feeder:
        """One whose cache goes on from here with `copies` of each row; this one stays as it is."""
        cache = self.cache.fork(copies)
        made = Feeder(self.engine, cache, _repeated(self._prompts, copies), _repeated(self._histories, copies), self._extra)
        made._held, made.num_fed = self._held, self.num_fed
        made._fed = [ids.repeat_interleave(copies, dim=0) for ids in self._fed]
        return made

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on as row `rows[i]` went; both are continuations of one prompt."""
        if list(rows) != list(range(len(rows))):
            self.cache.reorder(rows)
            self._fed = [ids[torch.as_tensor(rows, device=ids.device)] for ids in self._fed]

    def keep(self, rows: Sequence[Sequence[int]]) -> None:
        """Let the cache hold the new tokens of all `rows`, those that end early followed by repetitions of their last one."""
        missing = max(map(len, rows)) - self.num_fed
        if missing <= 0:
            if len(rows) == 1 and missing < 0:
                self.cache.rewind(self.cache.length + missing)
                self._length = self.cache.length
                self.num_fed += missing
            return
        tail = [(list(row) + [row[-1]] * (self.num_fed + missing - len(row)))[self.num_fed :] for row in rows]
        for start in range(0, missing, PREFILL_CHUNK):
            part = torch.tensor([row[start : start + PREFILL_CHUNK] for row in tail], device=self.engine.device)
            with torch.inference_mode():
                self.feed(part, last_only=True)
                self.commit(part.shape[1])

    @property
    def _padding(self) -> set[int]:
        """Pad tokens that rows have on their left."""
        return set(self._pads) if self._held else {self._longest - len(prompt) for prompt in self._prompts}

    def _feed_anew(self, count: int, *, last_only: bool) -> Tensor:
        """`feed` of the last `count` tokens, with all tokens before them computed again."""
        before = self._held
        if before and [len(history) for history in self._histories] != [before + len(prompt) for prompt in self._prompts]:
            assert self.engine.restarts_at is not None
            text = f"beyond {self.engine.restarts_at} tokens all of them are computed anew, and those in the cache are not known"
            raise CacheError("CA-REWIND", text, hint="begin with an empty cache, or use a session")
        known = [history[:before] for history in self._histories]
        first = torch.tensor(known, dtype=torch.int64, device=self.engine.device).view(len(known), -1)
        ids = torch.cat((first, *self._fed), dim=1)
        self.cache.rewind(0)
        logits = self.engine.step(ids, begin(self.cache, ids.shape[1]), last_only or count == 1)
        self._again = ids.shape[1] - count
        return logits[:, -count:]

    def _crosses(self, held: int, count: int) -> bool:
        """Whether `count` more tokens lead a row from within the length at which the model restarts to beyond it."""
        assert self.engine.restarts_at is not None
        return any(0 < held - pad <= self.engine.restarts_at < held + count - pad for pad in self._padding)


def _repeated(rows: Sequence[Sequence[int]], copies: int) -> list[Sequence[int]]:
    return [row for row in rows for _ in range(copies)]
