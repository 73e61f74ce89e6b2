"""What options of all decoders that draft have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modelrig.components import Reason

MOST_DRAFTS = 64


def check_drafts(options: Any) -> Iterator[Reason]:
    """What speaks against `num_tokens` and `least_gain`."""
    if not 1 <= options.num_tokens <= MOST_DRAFTS:
        yield Reason("decoder.num_tokens", f"num_tokens {options.num_tokens}: accepted is 1 to {MOST_DRAFTS}")
    if not 0 <= options.least_gain <= MOST_DRAFTS:
        yield Reason("decoder.least_gain", f"least_gain {options.least_gain}: accepted is 0 to {MOST_DRAFTS}")
