"""A small model drafts, the large one verifies (Leviathan et al., 2023; Chen et al., 2023).

Its drafts are its most likely tokens. Whatever is drawn of the large model's distribution is then accepted as often as a draft from
the small one's could be that is always the same, and what is drawn does not depend on drafts at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modelrig.components import DecoderCall
from modelrig.errors import CacheError
from modelrig.generation.caches import begin
from modelrig.generation.decoding import DraftingRun
from modelrig_plugins.decoders.draft_model import ROLE, DraftModelOptions


class DraftModelRun(DraftingRun):
    """The draft model goes through the same rows, padded alike, with a cache of its own. What of its cache is right is rewound to,
    what is decided by now is fed, then it goes on by itself."""

    def __init__(self, call: DecoderCall, options: DraftModelOptions) -> None:
        super().__init__(call, options.num_tokens, options.least_gain)
        self.model = call.companions[ROLE]
        self.prompts = [[0] * pad + list(ids) for pad, ids in zip(call.padding, call.texts, strict=True)]
        self.before = len(self.prompts[0])
        # Its own cache ends where its context does; beyond it nothing is drafted.
        capacity = self.before + call.limit
        limit = self.model.plan.facts.position_limit
        self.capacity = capacity if limit is None else min(capacity, limit)
        self.cache: Any = None

    def propose(self, new: Sequence[Sequence[int] | None], room: int) -> Sequence[Sequence[int]] | None:
        # tokens of each row in the large model's cache
        fed = self.before + min(len(ids) for ids in new if ids is not None) - 1
        count = min(self.count(new, room), self.capacity - fed - 1)
        if count < 1:
            return None
        rows = [[*prompt, *(ids or ())] for prompt, ids in zip(self.prompts, new, strict=True)]
        drafts = self._draft(rows, fed, fed + 1 + count)
        return [[] if ids is None else row[self.before + len(ids) :] for row, ids in zip(drafts, new, strict=True)]

    def _draft(self, rows: list[list[int]], fed: int, end: int) -> list[list[int]]:
        """`rows`, each gone on with up to `end` ids; the first `fed` and one are decided in all that have not ended."""
        self._rewind(fed)
        decided = fed + 1
        block = [(row + [0] * decided)[self.cache.length : decided] for row in rows]  # a row that has ended is fed anything
        while True:
            ids = torch.tensor(block, device=self.model.plan.device).clamp_(max=self.model.plan.facts.vocab_size - 1)  # and fewer
            logits = self.model.step(ids, begin(self.cache, len(block[0])), True)
            self.cache.commit(len(block[0]))
            chosen = logits[:, -1, : self.call.vocab_size].argmax(dim=-1).tolist()  # its head may have more rows than there are ids
            for row, token in zip(rows, chosen, strict=True):
                if len(row) <= self.cache.length:
                    row += [token] * (self.cache.length + 1 - len(row))
            if self.cache.length + 1 >= end:
                return [row[:end] for row in rows]
            block = [[row[self.cache.length]] for row in rows]

    def _rewind(self, to: int) -> None:
        if self.cache is None:
            padding = self.call.padding if any(self.call.padding) else None
            self.cache = self.model.new_cache(len(self.prompts), self.capacity, padding)
        elif self.cache.length > to:
            try:
                self.cache.rewind(to)
            except CacheError:  # it does not keep that much
                self.cache.reset(self.call.padding)


class DraftModelDecoder:
    @staticmethod
    def open(call: DecoderCall, options: DraftModelOptions) -> DraftModelRun:
        return DraftModelRun(call, options)
