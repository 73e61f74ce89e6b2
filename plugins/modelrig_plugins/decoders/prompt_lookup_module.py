"""Drafts are looked up: what followed the last tokens where they came before, in the prompt or in the new text (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from modelrig.components import DecoderCall
from modelrig.generation.decoding import DraftingRun
from modelrig_plugins.decoders.prompt_lookup import PromptLookupOptions


class Text:
    """One row's ids, and for each n-gram in them the place after its last occurrence that something follows."""

    def __init__(self, ids: Sequence[int], shortest: int, longest: int) -> None:
        self.ids: list[int] = []
        self.sizes = range(shortest, longest + 1)
        self.places: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            end = len(self.ids)
            for size in self.sizes:  # those that end before `token`, which now follows them
                if size <= end:
                    self.places[tuple(self.ids[end - size : end])] = end
            self.ids.append(token)

    def lookup(self, count: int) -> list[int]:
        """Up to `count` ids that followed the longest n-gram at the end where it came before."""
        for size in reversed(self.sizes):
            place = self.places.get(tuple(self.ids[-size:])) if size <= len(self.ids) else None
            if place is not None:
                # What repeats itself may go on beyond the end
                period = len(self.ids) - place
                return [self.ids[place + number % period] for number in range(count)]
        return []


class PromptLookupRun(DraftingRun):
    def __init__(self, call: DecoderCall, options: PromptLookupOptions) -> None:
        super().__init__(call, options.num_tokens, options.least_gain)
        self.texts = [Text(ids, options.min_ngram, options.max_ngram) for ids in call.texts]
        self.known = [0] * len(self.texts)  # new ids of each that are in its text

    def propose(self, new: Sequence[Sequence[int] | None], room: int) -> Sequence[Sequence[int]] | None:
        for number, (text, ids) in enumerate(zip(self.texts, new, strict=True)):
            if ids is not None:
                text.extend(ids[self.known[number] :])
                self.known[number] = len(ids)
        count = self.count(new, room)
        if count < 1:
            return None
        drafts = [[] if ids is None else text.lookup(count) for text, ids in zip(self.texts, new, strict=True)]
        return drafts if any(drafts) else None


class PromptLookupDecoder:
    @staticmethod
    def open(call: DecoderCall, options: PromptLookupOptions) -> PromptLookupRun:
        return PromptLookupRun(call, options)
