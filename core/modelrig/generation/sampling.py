"""From logits to the next tokens, in the order Hugging Face uses.

`process` (penalties, bias, minimum length) → `shape` (temperature, top_k, top_p, min_p) → draw. All of it in float32, row by
row, without a wait for the device. What an option does not ask for costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelrig.errors import GenerateError, NotFiniteError
from modelrig.generation.options import GenerateOptions

__all__ = ["Sampler"]

COLDEST = 1e-30  # below this a float32 temperature is zero; the distribution is the argmax's long before


class Sampler:
    """Chooses the next token of every row.

    Rows are prompt-major: with `num_return_sequences` = n, rows p*n ... p*n+n-1 continue prompt p. Each row draws from a
    generator of its own, so a row gets the tokens it would get alone; copy j of a prompt draws with seed + j.

    One step: `sampler(sampler.process(logits))`, then `observe(ids)`.

    Args:
        options: what to do.
        batch: rows.
        vocab_size: logits per row.
        device: where the logits are.
        stop_ids: ids that end a row; they cannot be chosen before `min_new_tokens`.

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
    ) -> None:
        options.check_ids(vocab_size)
        self._options, self._batch, self._vocab_size = options, batch, vocab_size
        self._device = torch.device(device)
        self._generators = [] if options.is_greedy else self._seeded()
        self._repetition = options.repetition_penalty if options.repetition_penalty != 1 else None
        self._presence = options.presence_penalty or 0.0
        self._frequency = options.frequency_penalty or 0.0
        self._bias = self._bias_row()
        self._stop_ids = torch.tensor(sorted({i for i in stop_ids if 0 <= i < vocab_size}), dtype=torch.long, device=self._device)
        self._suppresses = options.min_new_tokens > 0 and len(self._stop_ids) > 0
        self._seen: Tensor | None = None  # bool [batch, vocab]: in prompt or text
        self._counts: Tensor | None = None  # float32 [batch, vocab]: how often in the text
        self._num_observed = 0
        self._broken: Tensor | None = None  # bool [batch]: a row had logits that are not finite; kept on the device

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a call: `prompts` has the prompt's ids (no padding) of every row."""
        if len(prompts) != self._batch:
            raise AssertionError(f"{len(prompts)} prompts for {self._batch} rows")
        self._num_observed = 0
        shape = (self._batch, self._vocab_size)
        if self._repetition is not None:
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[torch.tensor(sorted(set(prompt)), dtype=torch.long, device=self._device)] = True
        if self._presence or self._frequency:
            self._counts = torch.zeros(shape, dtype=torch.float32, device=self._device)

    def observe(self, ids: Tensor) -> None:
        """Note the ids [batch] that every row got."""
        self._num_observed += 1
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, ids[:, None], torch.ones_like(ids, dtype=torch.float32)[:, None])

    def process(self, logits: Tensor) -> Tensor:
        """logits [batch, vocab] → float32 [batch, vocab] with penalties, bias and minimum length. The input is left as it is."""
        scores = logits.float()
        if self._seen is not None and self._repetition is not None:
            penalised = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
            scores = torch.where(self._seen, penalised, scores)
        if self._counts is not None:
            scores = scores - self._frequency * self._counts - self._presence * (self._counts > 0)
        if self._bias is not None:
            scores = scores + self._bias
        if self._suppresses and self._num_observed < self._options.min_new_tokens:
            scores = scores.index_fill(1, self._stop_ids, -math.inf)
        return scores

    def shape(self, scores: Tensor) -> Tensor:
        """Processed scores [batch, vocab] → the log-weights drawn from, [batch, vocab]; -inf where no token can be drawn.

        Exactly `top_k` tokens stay, also when others tie with the last of them. Greedy options leave the scores as they are.
        """
        if self._options.is_greedy:
            return scores
        values, ids = self._candidates(scores)
        return values if ids is None else torch.full_like(scores, -math.inf).scatter(1, ids, values)

    def __call__(self, scores: Tensor) -> Tensor:
        """Processed scores [batch, vocab] → ids int64 [batch]: drawn as the options say, the maximum when greedy.

        Raises:
            NotFiniteError: GN-NAN for logits that are not finite; on the CPU at once, on other devices by `check`.
        """
        if self._options.is_greedy:
            peaks, ids = scores.max(dim=-1)
            self._note(peaks)
            return ids
        values, candidates = self._candidates(scores)
        # argmax(p / Exp(1)) draws from p, and needs neither a sum to one nor a word from the device
        peaks, choice = (torch.softmax(values, dim=-1) / self._noise(values)).max(dim=-1)
        self._note(peaks)
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

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # a zero would turn an excluded token's 0 into NaN

    def _note(self, peaks: Tensor) -> None:
        # The maximum of a row is NaN or infinite exactly when its scores are unusable, and the draw has it anyway
        if self._device.type == "cpu":
            rows = [row for row, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
            if rows:
                raise self._not_finite(rows)
        elif self._broken is None:
            self._broken = ~peaks.isfinite()
        else:
            self._broken |= ~peaks.isfinite()

    def _not_finite(self, rows: Sequence[int]) -> NotFiniteError:
        return NotFiniteError(
            "GN-NAN",
            f"after {self._num_observed} new tokens the logits of row {rows[0]} are NaN or infinite",
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
        copies = self._options.num_return_sequences
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
                generator.manual_seed((seeds if isinstance(seeds, int) else seeds[prompt]) + copy)
        return generators
