"""Plain decoding, one token a step: no drafts, and the sampler (argmax, as no temperature is set) has the last word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class PlainRun:
    def __init__(self, sampler: Callable[[Tensor], Tensor]) -> None:
        self.sampler = sampler

    def propose(self, last: Tensor) -> Tensor | None:  # noqa: ARG002 - protocol
        return None

    def accept(self, logits: Tensor, drafts: Tensor | None) -> Tensor:  # noqa: ARG002 - protocol
        return self.sampler(logits[:, -1])[:, None]


class GreedyDecoder:
    @staticmethod
    def open(batch: int, sampler: Callable[[Tensor], Tensor], options: Any) -> PlainRun:  # noqa: ARG004 - protocol
        return PlainRun(sampler)
