"""Whether stored tensors fill a model, by names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelrig.checkpoint.matching import match, require_weights
from modelrig.components import Catalog, Parameter, Part, TensorEntry, TensorFile
from modelrig.errors import LoadError
from rigs import facts

HALVES = tuple(Part(f"half.{i}", (64, 64), into=((64 * i, 64 * i + 64), (0, 64))) for i in range(2))
WIDE = [Part("wide", (8, 4), taken=((4 * i, 4 * i + 4), (0, 4))) for i in range(2)]
MODEL = facts(
    parameters=(
        Parameter("joined", (128, 64), "linear", None, parts=HALVES),
        Parameter("upper", (4, 4), "linear", None, parts=(WIDE[0],)),
        Parameter("lower", (4, 4), "linear", None, parts=(WIDE[1],)),
        Parameter("plain", (3,), "norm", "plain"),
        Parameter("alias", (3,), "norm", None),
    ),
    ties={"alias": "plain"},
)
STORED = {"half.0": (64, 64), "half.1": (64, 64), "wide": (8, 4), "plain": (3,)}


def catalog(dtype: str = "float32", **changes: tuple[int, ...] | None) -> Catalog:
    shapes = {name: shape for name, shape in {**STORED, **changes}.items() if shape is not None}
    entries = {name: TensorEntry(name, dtype, shape, 0, 0, 1) for name, shape in shapes.items()}
    return Catalog(format="made_up", files=(TensorFile("model", Path("model"), 1, None),), entries=entries)


def test_tensors_that_parts_are_taken_of_fill_the_model() -> None:
    match(MODEL, catalog(), Path("folder"))
    require_weights(MODEL, catalog())


def test_missing_unexpected_and_misshapen_parts_are_told_once_each() -> None:
    with pytest.raises(LoadError) as caught:
        match(MODEL, catalog(**{"half.1": None, "wide": (8, 5), "other": (1,)}), Path("folder"))
    error = caught.value
    assert ("LD-TENSORS", ("half.1",), ("other",)) == (error.code, error.missing, error.unexpected)
    assert ("wide: stored as [8, 5], the config asks for [8, 4]",) == error.misshapen


def test_a_part_of_integers_is_no_weight() -> None:
    with pytest.raises(LoadError, match="4 such tensors") as caught:
        require_weights(MODEL, catalog("int32"))
    assert "LD-DTYPE" == caught.value.code
