"""Constrained decoding: each row has a `TokenMask` that says which tokens may come next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelrig.errors import GenerateError, ModelrigError, quoted

if TYPE_CHECKING:
    from modelrig.components import TokenMask

WORD = 32  # tokens in a number

__all__ = ["Constraints", "allow"]


def allow(bits: Tensor, tokens: Iterable[int]) -> None:
    """Set the bits of `tokens` in int32 [ceil(vocab / 32)], as `TokenMask.fill` must."""
    for token in tokens:
        word, place = divmod(token, WORD)
        bits[word] |= (1 << place) - (1 << WORD if place == WORD - 1 else 0)  # the highest bit is the sign


class Constraints:
    """The masks of all rows of a call.

    Args:
        make: makes a row's mask, at its beginning.
        end_ids: ids that end a row. No mask is told of them, and after one nothing is asked.

    Raises:
        GenerateError: GN-CONSTRAINT, here and in all methods, if a mask fails.
    """

    def __init__(
        self,
        make: Callable[[], TokenMask],
        batch: int,
        vocab_size: int,
        device: torch.device,
        end_ids: Iterable[int] = (),
    ) -> None:
        self._texts: list[list[int]] = [[] for _ in range(batch)]
        self._has_ended = [False] * batch  # by one of `_end_ids`
        self._masks = [self._made(make) for _ in range(batch)]
        self._end_ids = frozenset(end_ids)
        self._bits = torch.zeros((vocab_size + WORD - 1) // WORD, dtype=torch.int32)
        self._vocab_size, self._device = vocab_size, device
        self._places = torch.arange(WORD, dtype=torch.int32, device=device)
        self._last = (1 << vocab_size % WORD) - 1  # bits of the last number that stand for tokens; 0 for all

    def apply(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Scores [rows, vocab] with -inf where no token may come. Rows that are over are left as they are.

        Raises:
            GenerateError: GN-CONSTRAINT if a row's mask allows nothing.
        """
        scores, dead = self.search(scores, rows)
        if dead:
            raise self.dead_end(dead[0])
        return scores

    def search(self, scores: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """`apply` for a search, which may go on without the rows that can't: these are returned, with -inf for all tokens."""
        bits = torch.stack([self._filled(row) for row in rows])
        dead = [rows[place] for place, is_alive in enumerate((bits != 0).any(dim=1).tolist()) if not is_alive]
        allowed = (bits.to(self._device)[:, :, None] >> self._places & 1).view(len(rows), -1)[:, : self._vocab_size]
        return scores.masked_fill(allowed == 0, float("-inf")), dead

    def dead_end(self, row: int) -> GenerateError:
        text = f"no token may follow {len(self._texts[row])} new ones in row {row}, and its text is not complete"
        return GenerateError("GN-CONSTRAINT", text, hint="the tokenizer may lack tokens that the constraint needs")

    def observe(self, ids: Iterable[int], rows: Iterable[int]) -> None:
        for token, row in zip(ids, rows, strict=True):
            if self.is_over(row):  # what follows an end is not looked at
                continue
            if token in self._end_ids:
                self._has_ended[row] = True
            else:
                self._call(row, "accept", token)
                self._texts[row].append(token)

    def reorder(self, rows: Sequence[int]) -> None:
        """Bring each row's mask to where that of `rows[i]` is."""
        texts = [list(self._texts[row]) for row in rows]
        for row, (old, new) in enumerate(zip(self._texts, texts, strict=True)):
            same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            if len(old) > same:
                self._call(row, "rollback", len(old) - same)
            for token in new[same:]:
                self._call(row, "accept", token)
        self._texts, self._has_ended = texts, [self._has_ended[row] for row in rows]

    def allowed(self, row: int, drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow, one after the other."""
        count = accepted = 0
        for token in drafts:
            if self.is_over(row) or not int(self._filled(row)[token // WORD]) >> token % WORD & 1:
                break
            count += 1
            if token in self._end_ids:
                break
            self._call(row, "accept", token)
            accepted += 1
        if accepted:
            self._call(row, "rollback", accepted)
        return count

    def is_over(self, row: int) -> bool:
        """Nothing follows in the row: its text is complete, or an id ended it."""
        return self._has_ended[row] or bool(self._call(row, "is_over"))

    def _filled(self, row: int) -> Tensor:
        """int32 [numbers], a copy; all tokens for a row that is over."""
        if self.is_over(row):
            return torch.full_like(self._bits, -1)
        self._call(row, "fill", self._bits.zero_())
        bits = self._bits.clone()
        if self._last:
            bits[-1] &= self._last
        return bits

    def _made(self, make: Callable[[], Any]) -> Any:
        try:
            mask = make()
            missing = [name for name in ("fill", "accept", "rollback", "is_over") if not hasattr(mask, name)]
        except ModelrigError:
            raise
        except Exception as error:
            raise GenerateError("GN-CONSTRAINT", f"making a mask failed with {quoted(error)}", locus="constraint") from error
        if missing:
            text = f"{quoted(mask)} is no mask of tokens: it lacks {', '.join(missing)}"
            raise GenerateError("GN-CONSTRAINT", text, locus="constraint", hint="see modelrig.components.TokenMask")
        return mask

    def _call(self, row: int, name: str, *arguments: Any) -> Any:
        mask = self._masks[row]
        try:
            member = getattr(mask, name)
            return member(*arguments) if arguments else member
        except ModelrigError:
            raise
        except Exception as error:
            where = f"{type(mask).__name__}.{name} after {len(self._texts[row])} new tokens of row {row}"
            raise GenerateError("GN-CONSTRAINT", f"{where} failed with {quoted(error)}", locus="constraint") from error
