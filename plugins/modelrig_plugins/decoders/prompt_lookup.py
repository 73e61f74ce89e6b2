"""What looking drafts up in the text may be told."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from modelrig.components import Reason
from modelrig.planning.needs import DecoderNeed
from modelrig_plugins.decoders.drafting import check_drafts

LONGEST_NGRAM = 16


@frozen
class PromptLookupOptions:
    """`num_tokens`: drafts at most. `max_ngram`, `min_ngram`: how many of the last tokens are looked for in the text before them,
    the longest first. `least_gain`: drafting pauses while a verification gains fewer tokens than this on average."""

    num_tokens: int = 15
    max_ngram: int = 5
    min_ngram: int = 2
    least_gain: float = 0.8


class PromptLookupPlanner:
    Options = PromptLookupOptions

    @staticmethod
    def check(need: DecoderNeed, options: PromptLookupOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        yield from check_drafts(options)
        if not 1 <= options.min_ngram <= options.max_ngram <= LONGEST_NGRAM:
            text = f"min_ngram {options.min_ngram} and max_ngram {options.max_ngram}: accepted is 1 to {LONGEST_NGRAM}, min first"
            yield Reason("decoder.ngram", text)
