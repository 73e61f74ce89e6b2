"""Configs are read without coercion, and everything wrong with one is said at once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.checkpoint.config import ConfigReader
from modelrig.errors import ConfigError

PATH = Path("/m/config.json")


def problem_of(values, ask):
    with pytest.raises(ConfigError) as caught, ConfigReader(values, PATH) as read:
        ask(read)
    return caught.value


def test_good_values_are_returned_as_they_are():
    values = {"n": 3, "x": 2, "y": 0.5, "b": False, "s": "silu", "l": [1, 2], "t": ["a"], "one": 7, "r": {"f": 8.0}}
    with ConfigReader(values, PATH) as read:
        seen = (
            read.integer("n", 1, 9),
            read.number("x", 0, 10),
            read.number("y", 0, 1),
            read.boolean("b"),
            read.choice("s", ("gelu", "silu")),
            read.integers("l", 0, 9),
            read.strings("t"),
            read.integers("one", 0, 9, single=True),
            read.child("r").number("f", 0, 9),
            read.string("absent", None),
            read.child("absent"),
        )
    assert (3, 2.0, 0.5, False, "silu", (1, 2), ("a",), (7,), 8.0, None, None) == seen


@pytest.mark.parametrize("value", ["64", 64.0, True, None, [], {}, 1e3], ids=repr)
def test_an_integer_is_never_coerced(value):
    error = problem_of({"hidden_size": value}, lambda read: read.integer("hidden_size", 1, 10_000))
    assert ("CF-TYPE", "hidden_size", str(PATH)) == (error.code, error.locus, error.path)
    assert repr(value) in error.reason


@pytest.mark.parametrize("value", [0, -1, -64, 10_001, 10**18])
def test_an_integer_out_of_range_is_told_with_the_range(value):
    error = problem_of({"hidden_size": value}, lambda read: read.integer("hidden_size", 1, 10_000))
    assert ("CF-RANGE", f"{value}; 1 to 10000 is accepted") == (error.code, error.reason)


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "CF-RANGE"), (0.0, "CF-RANGE"), (-1, "CF-RANGE"), (float("inf"), "CF-RANGE"), (float("nan"), "CF-RANGE"),
     (True, "CF-TYPE"), ("1", "CF-TYPE")],
)  # fmt: skip
def test_a_number_must_be_finite_and_in_range(value, code):
    assert code == problem_of({"theta": value}, lambda read: read.number("theta", 0, 1e12, exclusive=True)).code


def test_a_number_accepts_an_integer_and_the_open_bound_only_when_it_is_not_exclusive():
    assert 0.0 == ConfigReader({"x": 0}, PATH).number("x", 0, 1)


@pytest.mark.parametrize(
    ("ask", "value", "code"),
    [
        (lambda read: read.boolean("k"), 1, "CF-TYPE"),
        (lambda read: read.string("k"), 1, "CF-TYPE"),
        (lambda read: read.choice("k", ("a", "b")), "c", "CF-ENUM"),
        (lambda read: read.choice("k", ("a", "b")), ["a"], "CF-TYPE"),
        (lambda read: read.integers("k", 0, 9), [1, "2"], "CF-TYPE"),
        (lambda read: read.integers("k", 0, 9), [1, 10], "CF-RANGE"),
        (lambda read: read.integers("k", 0, 9), 1, "CF-TYPE"),
        (lambda read: read.integers("k", 0, 9, single=True), True, "CF-TYPE"),
        (lambda read: read.numbers("k", 0, 9), [1.0, None], "CF-TYPE"),
        (lambda read: read.strings("k"), "a", "CF-TYPE"),
        (lambda read: read.choices("k", ("full", "sliding")), ["full", "ful"], "CF-ENUM"),
        (lambda read: read.child("k"), [1], "CF-TYPE"),
    ],
)
def test_each_kind_of_value_refuses_the_others(ask, value, code):
    error = problem_of({"k": value}, ask)
    assert (code, "k") == (error.code, error.locus)


def test_all_problems_are_listed_at_once_missing_keys_first():
    def ask(read):
        read.integer("a", 1, 9)
        read.string("b")
        read.child("rope").number("factor", 0, 1)

    error = problem_of({"a": "x", "rope": {"factor": 2}}, ask)
    assert ("CF-MISSING", "b") == (error.code, error.locus)
    assert [" b:", " a:", " rope.factor:"] == [line[3:].split(":")[0] + ":" for line in error.reason.splitlines()[1:]]


def test_null_is_absent_where_there_is_a_default_and_a_wrong_value_is_not():
    assert 5 == ConfigReader({"a": None}, PATH).integer("a", 1, 9, default=5)
    assert "CF-TYPE" == problem_of({"a": "1"}, lambda read: read.integer("a", 1, 9, default=5)).code


def test_an_alias_is_read_when_the_key_is_absent_and_named_when_it_is_wrong():
    assert "float16" == ConfigReader({"torch_dtype": "float16"}, PATH).string("dtype", aliases=["torch_dtype"])
    assert "a" == ConfigReader({"dtype": "a", "torch_dtype": "b"}, PATH).string("dtype", aliases=["torch_dtype"])
    assert "torch_dtype" == problem_of({"torch_dtype": 1}, lambda read: read.string("dtype", aliases=["torch_dtype"])).locus


def test_relations_are_not_judged_between_stand_ins():
    def ask(read):
        width, heads = read.integer("hidden_size", 1, 99), read.integer("heads", 1, 99)
        read.require(width % heads == 1, "CF-REL", "hidden_size", "never said", uses=("heads",))

    assert "CF-RANGE" == problem_of({"hidden_size": 8, "heads": 0}, ask).code


def test_a_relation_that_does_not_hold_is_a_problem_of_its_key():
    error = problem_of({"a": 1}, lambda read: read.require(False, "CF-REL", "a", "a and b contradict each other"))
    assert ("CF-REL", "a", "a and b contradict each other") == (error.code, error.locus, error.reason)


def test_the_problem_is_raised_rather_than_an_exception_it_caused():
    def ask(read):
        return 1 // (read.integer("heads", 0, 99) * 0)

    assert "CF-MISSING" == problem_of({}, ask).code


def test_an_exception_without_a_problem_passes_through():
    with pytest.raises(ZeroDivisionError), ConfigReader({}, PATH):
        raise ZeroDivisionError


@given(st.text(min_size=201) | st.integers(min_value=10**300))
def test_foreign_values_never_flood_a_message(value):
    assert len(problem_of({"a": value}, lambda read: read.boolean("a")).reason) < 1000
