"""Masks of tokens by finite automata over ids, which insist on being used as their protocol says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from modelrig.components import Constraint
from modelrig.errors import GenerateError
from modelrig.hookspecs import hookimpl

#: state → token → next state
Moves = Mapping[int, Mapping[int, int]]


class Automaton:
    """A `TokenMask`. Begins in state 0; may end by one of `ends` in a state of `finals`, and is over in one of `lasts`."""

    def __init__(self, moves: Moves, finals: Iterable[int] = (), lasts: Iterable[int] = (), ends: Iterable[int] = ()) -> None:
        self.moves, self.finals, self.lasts, self.ends = moves, frozenset(finals), frozenset(lasts), tuple(ends)
        self.states = [0]
        self.calls = {"fill": 0, "accept": 0, "rollback": 0}

    def allowed(self) -> set[int]:
        state = self.states[-1]
        return {*self.moves.get(state, {}), *(self.ends if state in self.finals else ())}

    def fill(self, bits: Any) -> None:
        assert not self.is_over, "a text that is over is not asked about"
        assert not bits.any()
        self.calls["fill"] += 1
        for token in self.allowed():
            bits[token // 32] |= (1 << token % 32) - (1 << 32 if token % 32 == 31 else 0)

    def accept(self, token: int) -> None:
        assert not self.is_over
        self.calls["accept"] += 1
        self.states.append(self.moves[self.states[-1]][token])  # KeyError for one that was not allowed

    def rollback(self, count: int) -> None:
        assert 0 < count < len(self.states)
        self.calls["rollback"] += 1
        del self.states[-count:]

    @property
    def is_over(self) -> bool:
        return self.states[-1] in self.lasts


def cycle(*groups: Sequence[int]) -> Moves:
    """One id of each group after the other, again and again; state n follows n ids, modulo the groups."""
    return {state: dict.fromkeys(group, (state + 1) % len(groups)) for state, group in enumerate(groups)}


def chain(*groups: Sequence[int]) -> Moves:
    """One id of each group after the other, then nothing."""
    return {state: dict.fromkeys(group, state + 1) for state, group in enumerate(groups)}


class ChainCompiler:
    """Serves the language `ids`: a list of lists of ids, one of each after the other."""

    made = 0

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        type(self).made += 1
        self.vocab_size = vocab_size

    def compile(self, language: str, text: str, end_ids: Sequence[int]) -> Callable[[], Automaton]:
        if text == "fails":
            raise ZeroDivisionError("a bug")
        groups = json.loads(text)
        if not all(0 <= token < self.vocab_size for group in groups for token in group):
            raise GenerateError("GN-CONSTRAINT", "an id beyond the vocabulary", locus="constraint")
        if groups == []:
            return None  # type: ignore[return-value] - a bug
        return lambda: Automaton(chain(*groups), finals={len(groups)}, lasts=() if end_ids else {len(groups)}, ends=end_ids)


def plugin(*components: Constraint) -> ModuleType:
    """A plugin that registers constraints, for `modelrig.registry.temporary`."""
    made = ModuleType("automata_plugin")
    made.MODELRIG_API = "1.0"  # type: ignore[attr-defined]

    @hookimpl
    def modelrig_constraints() -> list[Constraint]:
        return list(components)

    made.modelrig_constraints = modelrig_constraints  # type: ignore[attr-defined]
    return made


def constraint(name: str = "chains", **given: Any) -> Constraint:
    usual: dict[str, Any] = {"summary": "made up", "implementation": "automata:ChainCompiler", "languages": {"ids"}}
    return Constraint(name=name, **(usual | given))
