"""Padded batches, on either side, as the left-padded ones that caches hold and encoders see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelrig.errors import GenerateError


class PaddedBatch:
    """Rows rolled so that all padding is on the left; `restore` rolls results back.

    Attributes:
        ids: int64 [batch, tokens], padding on the left.
        padding: pad tokens on the left, for each row.
    """

    def __init__(self, ids: Tensor, attention_mask: Any) -> None:
        mask = torch.as_tensor(attention_mask, device=ids.device)
        if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            raise GenerateError(
                "GN-INPUT",
                f"must be ones and zeros of the input's shape {list(ids.shape)}, not {list(mask.shape)}",
                locus="attention_mask",
            )
        mask = mask.bool()
        lengths = mask.sum(dim=1)
        if bool((lengths == 0).any()):
            raise GenerateError("GN-INPUT", "a row is all padding", locus="attention_mask")
        first = mask.int().argmax(dim=1)
        columns = torch.arange(ids.shape[1], device=ids.device)
        inside = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
        if not torch.equal(mask, inside):
            raise GenerateError("GN-INPUT", "padding must be at the ends of a row, not between its tokens", locus="attention_mask")
        right = ids.shape[1] - first - lengths
        # column of the original row that stands in each column of the rolled one, and back
        self._from = (columns - right[:, None]) % ids.shape[1]
        self._back = (columns + right[:, None]) % ids.shape[1]
        self.ids = self.roll(ids)
        self.padding: list[int] = (first + right).tolist()

    def roll(self, values: Tensor) -> Tensor:
        """values [batch, tokens] that belong to the tokens, rolled as these are."""
        return values.gather(1, self._from)

    def restore(self, values: Tensor) -> Tensor:
        """values [batch, tokens, n] of the rolled rows, in the order of the input."""
        return values.gather(1, self._back[:, :, None].expand_as(values))
