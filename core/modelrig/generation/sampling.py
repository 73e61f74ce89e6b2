"""From logits to the next tokens, in the order Hugging Face uses.

`process` (penalties, bias, constraint, minimum length) → `shape` (temperature, top_k, top_p, min_p) → draw. All of it in float32,
row by row, and but for constraints without a wait for the device. What an option does not ask for costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelrig.errors import GenerateError, NotFiniteError
from modelrig.generation.constraints import Constraints
from modelrig.generation.options import GenerateOptions, Grammar

__all__ = ["Sampler"]

COLDEST = 1e-30  # below this a float32 temperature is zero; the distribution is the argmax's long before


class Sampler:
    """Chooses the next token of every row.

    Rows are prompt-major: with n `copies`, rows p*n ... p*n+n-1 continue prompt p. Each row draws from a generator of its own, so a
    row gets the tokens it would get alone; copy j of a prompt draws with seed + j.

    One step: `choose(logits)`; that is `sampler(sampler.process(logits))`, then `observe(ids)`. With `rows` it is a step of these
    rows only: the others draw nothing and note nothing.

    Args:
        options: what to do.
        batch: rows.
        vocab_size: logits per row.
        device: where the logits are.
        stop_ids: ids that end a row; they cannot be chosen before `min_new_tokens`.
        copies: rows of each prompt; `num_return_sequences` by default.
        beams: after so many rows seeds begin again: these are searched together, and others search the same.

    Raises:
        GenerateError: GN-ARGS for ids beyond the vocabulary, or seeds that do not match the batch.
    """

    def __init__(
        self,
        options: GenerateOptions,
        batch: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        stop_ids: Sequence[int] = (),
        copies: int | None = None,
        beams: int | None = None,
    ) -> None:
        options.check_ids(vocab_size)
        self._copies = options.num_return_sequences if copies is None else copies
        self._beams = self._copies if beams is None else beams
        self._options, self._batch, self._vocab_size = options, batch, vocab_size
        self._device = torch.device(device)
        self._generators = [] if options.is_greedy else self._seeded()
        self._repetition = options.repetition_penalty if options.repetition_penalty != 1 else None
        self._presence = options.presence_penalty or 0.0
        self._frequency = options.frequency_penalty or 0.0
        self._bias = self._bias_row()
        self._stop_ids = torch.tensor(sorted({i for i in stop_ids if 0 <= i < vocab_size}), dtype=torch.long, device=self._device)
        self._suppresses = options.min_new_tokens > 0 and len(self._stop_ids) > 0
        if self._suppresses and len(self._stop_ids) == vocab_size:
            raise GenerateError("GN-ARGS", "every token is one to stop at, so none may come first", locus="min_new_tokens")
        self._seen: Tensor | None = None  # bool [batch, vocab]: in prompt or text
        self._counts: Tensor | None = None  # float32 [batch, vocab]: how often in the text
        self._observed = [0] * batch  # new tokens of each row
        self._constraints: Constraints | None = None
        if options.constraint is not None:
            if isinstance(options.constraint, Grammar):
                raise AssertionError("a grammar is compiled before")
            self._constraints = Constraints(options.constraint, batch, vocab_size, self._device, stop_ids)
        self._dead: set[int] = set()  # rows of a search that nothing can follow
        self._broken: Tensor | None = None  # bool [batch]: a row had logits that are not finite; kept on the device

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a call: `prompts` has the prompt's ids (no padding) of every row."""
        if len(prompts) != self._batch:
            raise AssertionError(f"{len(prompts)} prompts for {self._batch} rows")
        self._observed = [0] * self._batch
        shape = (self._batch, self._vocab_size)
        if self._repetition is not None:
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[torch.tensor(sorted(set(prompt)), dtype=torch.long, device=self._device)] = True
        if self._presence or self._frequency:
            self._counts = torch.zeros(shape, dtype=torch.float32, device=self._device)

    def choose(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """logits [rows, vocab] → ids int64 [rows], noted."""
        ids = self(self.process(logits, rows), rows)
        self.observe(ids, rows)
        return ids

    def observe(self, ids: Tensor, rows: Sequence[int] | None = None) -> None:
        """Note the ids [rows] that were chosen."""
        numbers = range(self._batch) if rows is None else rows
        for row in numbers:
            self._observed[row] += 1
        if self._constraints is not None:
            self._constraints.observe(ids.tolist(), numbers)
        if self._seen is None and self._counts is None:
            return
        where = torch.as_tensor(numbers, device=self._device)
        if self._seen is not None:
            self._seen[where, ids] = True
        if self._counts is not None:
            self._counts[where, ids] += 1

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on as row `rows[i]` went. Each row keeps its own generator."""
        where = torch.as_tensor(rows, device=self._device)
        self._seen = None if self._seen is None else self._seen[where]
        self._counts = None if self._counts is None else self._counts[where]
        self._observed = [self._observed[row] for row in rows]
        if self._constraints is not None:
            self._constraints.reorder(rows)

    def allowed(self, row: int, drafts: Sequence[int]) -> int:
        """How many of `drafts`, one after the other, the row's constraint allows."""
        return len(drafts) if self._constraints is None else self._constraints.allowed(row, drafts)

    def is_over(self, row: int) -> bool:
        """The row's constraint allows nothing more."""
        return self._constraints is not None and self._constraints.is_over(row)

    @property
    def is_constrained(self) -> bool:
        return self._constraints is not None

    def process(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """logits [rows, vocab] → float32 [rows, vocab] with all that counts before the temperature. The input is left as it is."""
        numbers = range(self._batch) if rows is None else rows
        scores = self._penalised(logits, rows)
        if self._constraints is not None:
            scores = self._constraints.apply(scores, numbers)
        return self._without_ends(scores, numbers) if self._suppresses else scores

    def _penalised(self, logits: Tensor, rows: Sequence[int] | None) -> Tensor:
        scores = logits.float()
        if self._seen is not None and self._repetition is not None:
            seen = self._seen if rows is None else self._seen[torch.as_tensor(rows, device=self._device)]
            penalised = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
            scores = torch.where(seen, penalised, scores)
        if self._counts is not None:
            counts = self._counts if rows is None else self._counts[torch.as_tensor(rows, device=self._device)]
            scores = scores - self._frequency * counts - self._presence * (counts > 0)
        if self._bias is not None:
            scores = scores + self._bias
        return scores

    def _without_ends(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        short = [place for place, row in enumerate(rows) if self._observed[row] < self._options.min_new_tokens]
        if self._constraints is not None and short:  # a text that is complete ends, however short it is
            goes_on = (scores.index_fill(1, self._stop_ids, -math.inf) > -math.inf).any(dim=1).tolist()
            short = [place for place in short if goes_on[place]]
        if len(short) == len(rows):
            return scores.index_fill(1, self._stop_ids, -math.inf)
        if short:
            scores = scores.clone() if scores.dtype == torch.float32 else scores
            where = torch.as_tensor(short, device=self._device)[:, None]
            scores[where, self._stop_ids[None]] = -math.inf
        return scores

    def shape(self, scores: Tensor) -> Tensor:
        """Processed scores [batch, vocab] → the log-weights drawn from, [batch, vocab]; -inf where no token can be drawn.

        Exactly `top_k` tokens stay, also when others tie with the last of them. Greedy options leave the scores as they are.
        """
        if self._options.is_greedy:
            return scores
        values, ids = self._candidates(scores)
        return values if ids is None else torch.full_like(scores, -math.inf).scatter(1, ids, values)

    def score(self, logits: Tensor) -> Tensor:
        """logits [rows, vocab] → log-probabilities float32, which a search adds up: processed as transformers does, and with a
        temperature those that are drawn from."""
        scores = self._penalised(torch.log_softmax(logits.float(), dim=-1), None)
        dead: list[int] = []
        if self._constraints is not None:
            scores, dead = self._constraints.search(scores, range(self._batch))
        self._dead = set(dead)
        if self._suppresses:
            scores = self._without_ends(scores, range(self._batch))
        if not self._options.is_greedy:
            scores = torch.log_softmax(self.shape(scores), dim=-1)
        if dead and not self._options.is_greedy:  # minus infinity less minus infinity
            scores[dead] = -math.inf
        return scores

    def top(self, scores: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        """The `count` best of each `width` rows: scores [groups, width * vocab] → (scores, places) [groups, count], best first.
        With a temperature they are drawn by their shares, none twice, by the generator of the group's first row."""
        for row in sorted(self._dead):
            if self._constraints is not None and not (scores[row // width] > -math.inf).any():
                raise self._constraints.dead_end(row)
        if self._options.is_greedy:
            best, places = scores.topk(count, dim=-1)
            self._note(best[:, 0], range(0, self._batch, width))
            return best, places
        # The largest of log p + Gumbel noise are a draw without repeats (Yellott, 1977; Kool et al., 2019)
        noise = self._noise(scores, range(0, self._batch, width))
        drawn = (scores - noise.log()).masked_fill(scores == -math.inf, -math.inf).topk(count, dim=-1).indices
        return scores.gather(1, drawn), drawn

    def __call__(self, scores: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Processed scores [rows, vocab] → ids int64 [rows]: drawn as the options say, the maximum when greedy.

        Raises:
            NotFiniteError: GN-NAN for logits that are not finite; on the CPU at once, on other devices by `check`.
        """
        if self._options.is_greedy:
            peaks, ids = scores.max(dim=-1)
            self._note(peaks, rows)
            return ids
        values, candidates = self._candidates(scores)
        # argmax(p / Exp(1)) draws from p, and needs neither a sum to one nor a word from the device
        peaks, choice = (torch.softmax(values, dim=-1) / self._noise(values, rows)).max(dim=-1)
        self._note(peaks, rows)
        return choice if candidates is None else candidates.gather(1, choice[:, None])[:, 0]

    def check(self) -> None:
        """Raise GN-NAN if any row had logits that are not finite. Waits for the device: call it where the ids are read anyway."""
        if self._broken is not None and (rows := self._broken.nonzero().flatten().tolist()):
            raise self._not_finite(rows)

    # -------------------------------------------------------------------------------------------- parts of the above

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """(log-weights [batch, n], ids [batch, n] or None where n is the vocabulary in order)."""
        options = self._options
        # Less its maximum, so that a tiny temperature gives -inf for the others instead of inf - inf for all
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / max(options.temperature or 1.0, COLDEST)
        ids = None
        if options.top_k is not None and options.top_k < self._vocab_size:
            scores, ids = scores.topk(options.top_k, dim=-1)
        if options.top_p is not None and options.top_p < 1:
            if ids is None:
                scores, ids = scores.sort(dim=-1, descending=True, stable=True)
            shares = torch.softmax(scores, dim=-1)
            before = shares.cumsum(dim=-1) - shares  # what the tokens before this one have together
            # 0 for the most likely token, which stays also where float32 rounds top_p to 0
            scores = scores.masked_fill((before >= options.top_p) & (before > 0), -math.inf)
        if options.min_p:
            floor = scores.amax(dim=-1, keepdim=True) + math.log(options.min_p)
            scores = scores.masked_fill(scores < floor, -math.inf)
        if ids is not None:
            # In order of ids, so that the noise a token meets does not depend on how equal scores were ranked
            ids, order = ids.sort(dim=-1)
            scores = scores.gather(1, order)
        return scores, ids

    def _noise(self, like: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        for row, number in zip(noise, range(self._batch) if rows is None else rows, strict=True):
            row.exponential_(generator=self._generators[number])
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # a zero would turn an excluded token's 0 into NaN

    def _note(self, peaks: Tensor, rows: Sequence[int] | None) -> None:
        # The maximum of a row is NaN or infinite exactly when its scores are unusable, and the draw has it anyway
        if self._device.type == "cpu":
            bad = [place for place, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
            if bad:
                raise self._not_finite(bad if rows is None else [rows[place] for place in bad])
            return
        if self._broken is None:
            self._broken = torch.zeros(self._batch, dtype=torch.bool, device=self._device)
        if rows is None:
            self._broken |= ~peaks.isfinite()
        else:
            self._broken[torch.as_tensor(rows, device=self._device)] |= ~peaks.isfinite()

    def _not_finite(self, rows: Sequence[int]) -> NotFiniteError:
        return NotFiniteError(
            "GN-NAN",
            f"after {self._observed[rows[0]]} new tokens the logits of row {rows[0]} are NaN or infinite",
            hint="a wider dtype may help (dtype='float32'); else the weights themselves are broken",
        )

    def _bias_row(self) -> Tensor | None:
        if not self._options.logit_bias:
            return None
        row = torch.zeros(self._vocab_size, dtype=torch.float32)
        for token, bias in self._options.logit_bias.items():
            row[token] = bias
        return row.to(self._device)

    def _seeded(self) -> list[torch.Generator]:
        copies = self._copies
        seeds, prompts = self._options.seed, self._batch // copies
        if isinstance(seeds, tuple) and len(seeds) != prompts:
            raise GenerateError(
                "GN-ARGS", f"seed has {len(seeds)} values: accepted is one, or one per prompt ({prompts})", locus="seed"
            )
        generators = [torch.Generator(device=self._device) for _ in range(self._batch)]
        for row, generator in enumerate(generators):
            prompt, copy = divmod(row, copies)
            if seeds is None:
                generator.seed()
            else:
                generator.manual_seed((seeds if isinstance(seeds, int) else seeds[prompt]) + copy % self._beams)
        return generators
