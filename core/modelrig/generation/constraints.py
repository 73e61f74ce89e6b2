"""Constrained decoding: each row has a `TokenMask` that says which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modelrig.errors import GenerateError

if TYPE_CHECKING:
    from modelrig.components import TokenMask

MOST_PADDING = 31  # bits of the last number that stand for no token

__all__ = ["Constraints"]


class Constraints:
    """The masks of all rows of a call.

    Args:
        make: makes a row's mask, at its beginning.
    """

    def __init__(self, make: Callable[[], TokenMask], batch: int, vocab_size: int, device: torch.device) -> None:
        self._masks = [make() for _ in range(batch)]
        self._texts: list[list[int]] = [[] for _ in range(batch)]
        self._bits = torch.zeros((vocab_size + MOST_PADDING) // 32, dtype=torch.int32)
        self._vocab_size, self._device = vocab_size, device
        self._places = torch.arange(32, dtype=torch.int32)

    def apply(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores [rows, vocab] with -inf where no token may come.

        Raises:
            GenerateError: GN-CONSTRAINT if a row's mask allows nothing.
        """
        allowed = torch.stack([self._allowed(row) for row in rows])
        dead = [rows[place] for place, any_left in enumerate(allowed.any(dim=1).tolist()) if not any_left]
        if dead:
            text = f"no token may follow {len(self._texts[dead[0]])} new ones in row {dead[0]}, and its text is not complete"
            raise GenerateError("GN-CONSTRAINT", text, hint="the tokenizer may lack tokens that the constraint needs")
        return scores.masked_fill(~allowed.to(self._device), float("-inf"))

    def observe(self, ids: Iterable[int], rows: Iterable[int]) -> None:
        for token, row in zip(ids, rows, strict=True):
            if not self._masks[row].is_over:  # what follows an end is not looked at
                self._masks[row].accept(token)
                self._texts[row].append(token)

    def reorder(self, rows: Sequence[int]) -> None:
        """Bring each row's mask to where that of `rows[i]` is."""
        texts = [list(self._texts[row]) for row in rows]
        for mask, old, new in zip(self._masks, self._texts, texts, strict=True):
            same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            if len(old) > same:
                mask.rollback(len(old) - same)
            for token in new[same:]:
                mask.accept(token)
        self._texts = texts

    def allowed(self, row: int, drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow, one after the other."""
        mask, count = self._masks[row], 0
        for token in drafts:
            if mask.is_over or not self._allowed(row)[token]:
                break
            mask.accept(token)
            count += 1
        if count:
            mask.rollback(count)
        return count

    def is_over(self, row: int) -> bool:
        return self._masks[row].is_over

    def _allowed(self, row: int) -> Tensor:
        """bool [vocab]"""
        self._masks[row].fill(self._bits.zero_())
        return (self._bits[:, None] >> self._places & 1).view(-1)[: self._vocab_size].bool()
