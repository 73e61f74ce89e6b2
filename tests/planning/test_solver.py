from __future__ import annotations

import time
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

import rigs
from modelrig.planning.solver import Part, fits, solve

TOKENS = st.frozensets(st.sampled_from("abc"), max_size=2)


def part(kind: str, offers: frozenset[str] = frozenset(), **needs: frozenset[str]) -> Part:
    make = {"attention": rigs.attention, "caches": rigs.cache, "compilers": rigs.compiler}[kind]
    return Part(kind, make(offers=offers, needs=needs))


@st.composite
def domains(draw: st.DrawFn) -> dict[str, list[Part]]:
    kinds = ("attention", "caches", "compilers")
    return {
        kind: [
            part(kind, draw(TOKENS), **{other: draw(TOKENS) for other in kinds if other != kind and draw(st.booleans())})
            for _ in range(draw(st.integers(0, 4)))
        ]
        for kind in kinds
    }


@given(domains())
def test_the_first_combination_in_order_is_found_or_there_is_none(given_domains: dict[str, list[Part]]) -> None:
    """Compared with trying every combination."""
    kinds = list(given_domains)
    expected = None
    for places in product(*(range(len(given_domains[kind])) for kind in kinds)):
        chosen = [given_domains[kind][place].descriptor for kind, place in zip(kinds, places, strict=True)]
        if all(fits(one, other) for one in chosen for other in chosen if one is not other):
            expected = dict(zip(kinds, places, strict=True))
            break
    assert expected == solve(given_domains, {})


def test_what_is_fixed_narrows_the_choice() -> None:
    caches = {"caches": [part("caches"), part("caches", frozenset("a"))]}
    assert {"caches": 1} == solve(caches, {"attention": part("attention", caches=frozenset("a"))})
    assert solve(caches, {"attention": part("attention", caches=frozenset("z"))}) is None


def test_hundreds_of_parts_that_do_not_fit_are_given_up_quickly() -> None:
    kinds = ("attention", "caches", "compilers")
    crowd = {
        kind: [part(kind, frozenset({f"{kind}{i}"}), **{kinds[n - 1]: frozenset({f"{kinds[n - 1]}{i + 1}"})}) for i in range(150)]
        for n, kind in enumerate(kinds)
    }
    started = time.perf_counter()
    assert solve(crowd, {}) is None
    assert time.perf_counter() - started < 2
