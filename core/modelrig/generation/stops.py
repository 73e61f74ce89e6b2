"""Stop strings in a stream of text: found wherever the pieces are cut, never shown in part."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StopStrings"]


class StopStrings:
    """Lets text through up to the first stop string.

    `push` hands out the text that cannot become part of a stop string any more and holds back the rest. The cut is at the
    match that begins first in the text (of those beginning at the same place, either gives the same cut). Because a longer
    stop string may begin before a shorter one that is already complete, a match waits until no earlier one can come.

    Work per push is proportional to the new text plus the longest stop string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if not all(self._stops):
            raise AssertionError("empty stop strings are refused with the options")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text to emit, whether a stop string was found). After a stop nothing is emitted any more."""
        if self.stopped:
            return "", True
        held = self._held + text
        match = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=len(held))
        # The first place at which a stop string could still come to an end in text that has not arrived.
        open_from = next((at for at in range(self._earliest_open(held), match) if self._may_begin(held, at)), match)
        self._held = held[open_from:]
        if open_from == match < len(held):
            self._held, self.stopped = "", True
        return held[:open_from], self.stopped

    def flush(self) -> tuple[str, bool]:
        """(the text still held back, whether it ends in a stop): the stream is over, so what was held back may be shown."""
        held, self._held = self._held, ""
        if self.stopped:
            return "", True
        match = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=None)
        if match is None:
            return held, False
        self.stopped = True
        return held[:match], True

    def _earliest_open(self, held: str) -> int:
        longest = max(map(len, self._stops), default=1)
        return max(0, len(held) - longest + 1)

    def _may_begin(self, held: str, at: int) -> bool:
        """Whether a stop string may begin at `at` and end beyond what has arrived."""
        rest = len(held) - at
        return any(rest < len(stop) and held.startswith(stop[:rest], at) for stop in self._stops)
