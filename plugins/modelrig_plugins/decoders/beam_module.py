"""Beam search: of all ways to go on from the best texts so far, follow the best.

The order of what is done, and when it ends, are transformers', so that both find the same texts.

Shapes: g texts to continue, k beams of each, c candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor

from modelrig.components import DecoderCall
from modelrig.errors import GenerateError
from modelrig_plugins.decoders.beam import BeamOptions, BeamPlanner

DEAD = -1e30  # the score of a beam that nothing follows: below all that a text with the largest bias at every token may have
ALIVE = DEAD / 2  # and what all others are above


@define
class Group:
    """The beams of one text."""

    scores: list[float]  # of each running beam, best first
    running: list[list[int]]  # their new ids
    complete: list[tuple[float, list[int]]] = field(factory=list)  # the best complete ones, best first
    is_open: bool = True  # a running one could still become one of the best


class BeamRun:
    """A search over `copies` beams of each text."""

    def __init__(self, call: DecoderCall, options: BeamOptions) -> None:
        self.call, self.options, self.beams = call, options, options.num_beams
        if call.returns > self.beams:
            text = f"{call.returns} texts are wanted of a search with {self.beams} beams"
            raise GenerateError("GN-ARGS", text, locus="num_return_sequences", hint="plan with a larger decoder.num_beams")
        self.groups = [
            Group([0.0] + [DEAD] * (self.beams - 1), [[] for _ in range(self.beams)]) for _ in range(len(call.texts) // self.beams)
        ]
        self.candidates = max(2, 1 + call.num_ends) * self.beams
        self.is_over = False

    def advance(self, logits: Tensor) -> tuple[Tensor, Sequence[int] | None]:
        """logits [g * k, vocab] → (ids [g * k], the rows they continue)."""
        choosing, vocab = self.call.choosing, logits.shape[-1]
        likely = choosing.score(logits)
        so_far = torch.tensor([group.scores for group in self.groups], dtype=torch.float32, device=logits.device)
        scores = (likely.view(len(self.groups), self.beams, vocab) + so_far[:, :, None]).flatten(1)  # [g, k * vocab]
        found, places = choosing.top(scores, min(self.candidates, scores.shape[1]), self.beams)  # [g, c]
        ids, parents = [], []
        for number, (group, values, chosen) in enumerate(zip(self.groups, found.tolist(), places.tolist(), strict=True)):
            candidates = [(score, *divmod(place, vocab)) for score, place in zip(values, chosen, strict=True)]
            for token, parent in self._advance(group, candidates):
                ids.append(token)
                parents.append(number * self.beams + parent)
        choosing.reorder(parents)
        made = torch.tensor(ids, device=logits.device)
        choosing.observe(made)
        self._complete_constrained()
        self.is_over = self._is_over()
        return made, parents

    def finish(self) -> list[list[list[int]]]:
        """The best texts of each group: its complete ones, then running ones."""
        best = []
        for group in self.groups:
            alive = [(score, ids) for score, ids in zip(group.scores, group.running, strict=True) if score > ALIVE]
            running = sorted(((self._final(score, ids), ids) for score, ids in alive), key=lambda one: -one[0])
            texts = [ids for _, ids in (*group.complete, *running)]
            texts += texts[:1] * (self.call.returns - len(texts))
            best.append(texts[: self.call.returns])
        return best

    def _advance(self, group: Group, candidates: Sequence[tuple[float, int, int]]) -> list[tuple[int, int]]:
        """Go on with the best of `candidates` (score, beam, token); returns (token, beam) of each."""
        texts = [[*group.running[beam], token] for _, beam, token in candidates]
        ends = [score > ALIVE and self.call.ends(text) for (score, _, _), text in zip(candidates, texts, strict=True)]
        is_full = self.options.early_stopping == "first" and len(group.complete) == self.beams
        if group.is_open and not is_full:
            new = [(self._final(candidates[place][0], texts[place]), texts[place]) for place in range(self.beams) if ends[place]]
            group.complete = sorted((*group.complete, *new), key=lambda one: -one[0])[: self.beams]
        order = sorted(range(len(candidates)), key=lambda place: -(candidates[place][0] + DEAD * ends[place]))[: self.beams]
        group.scores = [max(2 * DEAD, candidates[place][0] + DEAD * ends[place]) for place in order]
        # What nothing follows goes on as a double of the best, so that no row does what is not allowed.
        order = [place if score > ALIVE else order[0] for place, score in zip(order, group.scores, strict=True)]
        group.running = [texts[place] for place in order]
        group.is_open = group.is_open and self._can_improve(group)
        return [(candidates[place][2], candidates[place][1]) for place in order]

    def _can_improve(self, group: Group) -> bool:
        if len(group.complete) < self.beams:
            return True
        is_any_length = self.options.early_stopping == "never" and self.options.length_penalty > 0
        length = self.call.limit if is_any_length else len(group.running[0])
        return bool(group.scores[0] / length**self.options.length_penalty > group.complete[-1][0])

    def _complete_constrained(self) -> None:
        """Running texts after which a constraint allows nothing are complete."""
        for number, group in enumerate(self.groups):
            for beam, score in enumerate(group.scores):
                if score > ALIVE and self.call.choosing.is_over(number * self.beams + beam):
                    ended = (self._final(score, group.running[beam]), group.running[beam])
                    group.complete = sorted((*group.complete, ended), key=lambda one: -one[0])[: self.beams]
                    group.scores[beam] = DEAD

    def _is_over(self) -> bool:
        is_full = self.options.early_stopping == "first" and all(len(group.complete) == self.beams for group in self.groups)
        has_life = any(score > ALIVE for group in self.groups for score in group.scores)
        return is_full or not has_life or not any(group.is_open for group in self.groups)

    def _final(self, score: float, ids: Sequence[int]) -> float:
        return float(score / len(ids) ** self.options.length_penalty)


class BeamDecoder:
    copies = staticmethod(BeamPlanner.copies)

    @staticmethod
    def open(call: DecoderCall, options: BeamOptions) -> BeamRun:
        return BeamRun(call, options)
