"""What beam search may be told, and how many rows it takes."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from modelrig.components import Reason
from modelrig.planning.needs import DecoderNeed

STOPPING = ("estimate", "first", "never")
MOST_BEAMS = 256


@frozen
class BeamOptions:
    """`num_beams`: texts that are followed at a time.

    `length_penalty`: scores are divided by length ** length_penalty before they are compared: above 0 longer texts gain.

    `early_stopping`: the search is over with "first" as soon as there are `num_beams` complete texts; with "estimate" when the best
    running one could not become one of them at its present length; with "never" when it could not at any length. transformers says
    True, False and "never".
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: str = "estimate"


class BeamPlanner:
    Options = BeamOptions

    @staticmethod
    def check(need: DecoderNeed, options: BeamOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if not 1 <= options.num_beams <= MOST_BEAMS:
            yield Reason("decoder.num_beams", f"num_beams {options.num_beams}: accepted is 1 to {MOST_BEAMS}")
        if not -100 <= options.length_penalty <= 100:
            yield Reason("decoder.length_penalty", f"length_penalty {options.length_penalty}: accepted is -100 to 100")
        if options.early_stopping not in STOPPING:
            yield Reason("decoder.early_stopping", f"early_stopping {options.early_stopping!r}: accepted is {', '.join(STOPPING)}")

    @staticmethod
    def copies(options: BeamOptions) -> int:
        """Rows in which each text is continued."""
        return options.num_beams
