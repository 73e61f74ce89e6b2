"""One component per kind such that each offers what the others need of it: the first combination in the order of preference.

Candidates that need and offer the same are interchangeable here, so only the first of each sort is looked at; what cannot have a
partner in some kind is dropped before the search. Hundreds of components cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modelrig.components import Component


class Part(NamedTuple):
    """A component with the name messages give it."""

    name: str
    descriptor: Component


def fits(one: Component, other: Component) -> bool:
    """Whether each offers what the other needs of its kind."""
    return one.needs.get(other.kind, frozenset()) <= other.offers and other.needs.get(one.kind, frozenset()) <= one.offers


def fits_beside(part: Part, others: Mapping[str, Part]) -> bool:
    return all(fits(part.descriptor, other.descriptor) for kind, other in others.items() if kind != part.descriptor.kind)


def solve(domains: Mapping[str, Sequence[Part]], fixed: Mapping[str, Part]) -> dict[str, int] | None:
    """kind → place in its domain: the lexicographically first combination that fits, kinds in the order of `domains`.

    None if there is none.
    """
    beside_fixed = {
        kind: [place for place, part in enumerate(parts) if fits_beside(part, fixed)] for kind, parts in domains.items()
    }
    distinct = {kind: _first_of_each_sort(domains[kind], places, domains) for kind, places in beside_fixed.items()}
    open_kinds = _consistent(distinct, domains)
    if open_kinds is None:
        return None
    return _descend(list(domains), open_kinds, domains)


def _first_of_each_sort(parts: Sequence[Part], places: Sequence[int], domains: Mapping[str, Sequence[Part]]) -> list[int]:
    if not places:
        return []
    kind = parts[places[0]].descriptor.kind
    asked_of_kind = frozenset(
        token for other in domains.values() for part in other for token in part.descriptor.needs.get(kind, frozenset())
    )
    firsts: dict[object, int] = {}
    for place in places:
        descriptor = parts[place].descriptor
        needs = frozenset((other, tokens) for other, tokens in descriptor.needs.items() if tokens and other in domains)
        firsts.setdefault((needs, descriptor.offers & asked_of_kind), place)
    return list(firsts.values())


Places = Mapping[str, Sequence[int]]


def _consistent(places: Places, domains: Mapping[str, Sequence[Part]]) -> dict[str, list[int]] | None:
    """Without what has no partner in some other kind; None when a kind has nothing left."""
    left = {kind: list(found) for kind, found in places.items()}
    changed = True
    while changed:
        changed = False
        for kind, found in left.items():
            kept = [
                place
                for place in found
                if all(
                    other == kind or any(fits(domains[kind][place].descriptor, domains[other][mate].descriptor) for mate in mates)
                    for other, mates in left.items()
                )
            ]
            if not kept:
                return None
            changed |= len(kept) != len(found)
            left[kind] = kept
    return left


def _descend(kinds: Sequence[str], left: Places, domains: Mapping[str, Sequence[Part]]) -> dict[str, int] | None:
    """Fix the first of `kinds` to each of its places in turn, and see whether the rest still has a solution."""
    if not kinds:
        return {}
    kind, *rest = kinds
    for place in left[kind]:
        narrowed = _consistent({**left, kind: [place]}, domains)
        if narrowed is not None:
            below = _descend(rest, narrowed, domains)
            if below is not None:
                return {kind: place, **below}
    return None
