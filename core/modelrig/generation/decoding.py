"""What decoders are made of: the plain one, and how far ahead one that drafts should look."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import define

from modelrig.components import DecoderCall

__all__ = ["DraftLength", "DraftingRun", "PlainRun"]


class PlainRun:
    """A `DecoderRun` of one token a step; a decoder that drafts overrides `propose`."""

    def __init__(self, call: DecoderCall) -> None:
        self.call = call

    def propose(self, new: Sequence[Sequence[int] | None], room: int) -> Sequence[Sequence[int]] | None:  # noqa: ARG002 - protocol
        return None

    def learn(self, drafted: int, gained: int) -> None:
        pass


@define
class DraftLength:
    """How many drafts are worth a try: more after all were accepted, fewer after some were not, none for a while when they bring
    too little.

    A verification reads the same weights as a plain step, yet takes somewhat longer. So drafting pauses when the last
    verifications gained fewer than `least_gain` tokens on average, first for `SHORTEST_PAUSE` tokens, then each time for twice as
    many.
    """

    most: int
    least_gain: float
    current: int = 4
    paused_until: int = 0  # new tokens
    pause: int = 0
    average: float | None = None  # gain of a verification, the latest counting most

    SHORTEST_PAUSE = 16
    LONGEST_PAUSE = 1024
    WEIGHT = 0.25

    def now(self, tokens: int) -> int:
        """Drafts to make once there are `tokens` new tokens; 0 for none."""
        return 0 if tokens < self.paused_until else min(self.current, self.most)

    def learn(self, drafted: int, gained: int, tokens: int) -> None:
        self.average = gained if self.average is None else self.average + self.WEIGHT * (gained - self.average)
        self.current = min(self.most, 2 * drafted) if gained >= drafted else max(1, gained + 1)
        if self.average < self.least_gain:
            self.pause = min(max(self.SHORTEST_PAUSE, 2 * self.pause), self.LONGEST_PAUSE)
            self.paused_until = tokens + self.pause
            self.average = self.least_gain  # the next try decides by itself
        elif gained > self.least_gain:
            self.pause //= 2


class DraftingRun(PlainRun):
    """A decoder that drafts as far ahead as is worth it; a subclass defines `propose`, and asks `count` there."""

    def __init__(self, call: DecoderCall, most: int, least_gain: float) -> None:
        super().__init__(call)
        self.length = DraftLength(most=most, least_gain=least_gain)
        self.tokens = 0  # new ones of the longest row

    def count(self, new: Sequence[Sequence[int] | None], room: int) -> int:
        """Drafts to make now, 0 or fewer for none."""
        self.tokens = max(len(ids) for ids in new if ids is not None)
        return min(room, self.length.now(self.tokens))

    def learn(self, drafted: int, gained: int) -> None:
        self.length.learn(drafted, gained, self.tokens)
