"""What generation gives back, and how a row of tokens becomes text that ends where it should."""

from __future__ import annotations

import resource

import torch
from attrs import define, frozen

from modelrig.generation.detokenizer import Detokenizer
from modelrig.generation.stops import StopStrings

__all__ = ["Generation", "Piece", "Row", "Stats", "peak_memory_bytes"]


@frozen
class Stats:
    """Figures of one generation. Seconds and steps are the whole batch's; `prompt_tokens` were really prefilled for this row.

    `steps` are those after the prompt; with drafts there are fewer than new tokens. `drafted_tokens` were proposed for this row,
    `accepted_tokens` of them were right.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, per second of decoding."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 and self.new_tokens > 1 else 0.0


@frozen
class Generation:
    """One continuation. `tokens` are the new ids only; `text` ends before a stop string.

    `finish_reason` is "stop" (an end-of-text or stop id, a stop string, or a constraint that is complete), "length"
    (`max_new_tokens`, or a full context), or "cancelled" when the stream was closed before.
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
class Row:
    """What one row has produced so far."""

    limit: int
    stop_ids: frozenset[int]
    stops: StopStrings
    detokenizer: Detokenizer | None
    tokens: list[int]
    text: list[str]
    finish_reason: str | None = None
    drafted: int = 0
    accepted: int = 0

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

    def complete(self) -> str:
        """End here, because nothing may follow; returns the text that was held back."""
        self.finish_reason = "stop"
        self.text.append(self._rest())
        return self.text[-1]

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


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: this process's resident set, or the allocator's peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
