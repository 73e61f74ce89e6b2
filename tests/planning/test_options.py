from __future__ import annotations

from typing import Literal

import attrs
import pytest

from modelrig.planning.options import OptionsError, structure


class Planner:
    @attrs.frozen
    class Options:
        group_size: int = attrs.field(default=64, validator=attrs.validators.in_((32, 64)))
        symmetric: bool = True
        mode: Literal["fast", "exact"] = "fast"
        threshold: float | None = None


class Bare:
    """A planner without options."""


class Demanding:
    @attrs.frozen
    class Options:
        path: str


def test_defaults_stand_where_nothing_is_given() -> None:
    assert Planner.Options() == structure(Planner, {})
    assert structure(Bare, {}) is None


def test_given_values_become_the_planners_class() -> None:
    given = {"group_size": 32, "symmetric": False, "mode": "exact", "threshold": 6}
    assert Planner.Options(32, False, "exact", 6.0) == structure(Planner, given)


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"group_size": "32"}, ["group_size: '32'; a whole number is needed"]),
        ({"group_size": True}, ["group_size: True"]),
        ({"symmetric": 1, "mode": "slow"}, ["symmetric: 1; true or false is needed", "mode:"]),
        ({"group_size": 33}, ["must be in (32, 64)"]),
        ({"groupsize": 32}, ["'groupsize' is unknown", "did you mean 'group_size'"]),
        ({"a": 1, "b": 2}, ["'a' is unknown", "'b' is unknown"]),
    ],
)
def test_every_problem_is_told_and_nothing_is_coerced(given: dict[str, object], problems: list[str]) -> None:
    with pytest.raises(OptionsError) as caught:
        structure(Planner, given)
    assert [] == [problem for problem in problems if problem not in str(caught.value)]


def test_options_for_a_part_without_any_are_unknown() -> None:
    with pytest.raises(OptionsError, match="has no options") as caught:
        structure(Bare, {"x": 1})
    assert caught.value.is_unknown


def test_an_option_without_a_default_must_be_given() -> None:
    with pytest.raises(OptionsError, match="path"):
        structure(Demanding, {})
    assert Demanding.Options("here") == structure(Demanding, {"path": "here"})
