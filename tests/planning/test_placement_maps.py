"""Maps from modules to devices: what a name holds for, and what is wrong with one that somebody wrote."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.errors import PlanError
from modelrig.planning.placement_maps import coarse, find, read_map, resolve
from modelrig.planning.units import Weight

LAYERS = 12
NAMES = ["model.embed.weight", *(f"model.layers.{i}.{leaf}" for i in range(LAYERS) for leaf in ("a.weight", "b")), "head.weight"]
WEIGHTS = [Weight(name, 1, "t" if name in ("model.embed.weight", "head.weight") else None) for name in NAMES]
BLOCKS = [f"model.layers.{i}" for i in range(LAYERS)]


def test_a_name_ends_at_a_dot() -> None:
    written = {"": "cpu", "model.layers.1": "cuda:0"}
    where = resolve(written, NAMES)
    assert ["model.layers.1.a.weight", "model.layers.1.b"] == [name for name, device in where.items() if device == "cuda:0"]


def test_the_longest_name_decides_whatever_the_order() -> None:
    written = {"model.layers.3.b": "a", "": "b", "model": "c", "model.layers": "d"}
    where = resolve(written, NAMES)
    assert ["a", "d", "c", "b"] == [
        where[name] for name in ("model.layers.3.b", "model.layers.3.a.weight", "model.embed.weight", "head.weight")
    ]


def test_names_without_a_device_are_told() -> None:
    with pytest.raises(PlanError, match=r"PN-MAP-COVER.*'head.weight'"):
        resolve({"model": "cpu"}, NAMES)


NAME = st.lists(st.sampled_from(["a", "b", "1", "10"]), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(NAME | st.just(""), st.sampled_from(["cpu", "disk", "cuda:0"])), st.lists(NAME, unique=True))
def test_a_name_is_found_as_every_prefix_of_whole_parts_would_be(written: Mapping[str, str], names: list[str]) -> None:
    for name in names:
        parts = name.split(".")
        matching = [key for key in written if key == "" or parts[: len(key.split("."))] == key.split(".")]
        assert max(matching, key=len, default=None) == find(written, name)


@given(st.dictionaries(NAME, st.sampled_from(["cpu", "disk", "cuda:0"]), min_size=1))
def test_a_coarse_map_says_the_same_with_disjoint_names_none_of_which_could_be_shorter(where: dict[str, str]) -> None:
    # a weight that is also a module's name does not occur
    where = {name: device for name, device in where.items() if not any(other.startswith(f"{name}.") for other in where)}
    short = coarse(where)
    assert where == resolve(short, where)
    assert len(short) == len(set(short)) and not any(a != b and find({a: ""}, b) for a in short for b in short)
    for key in short:
        parent = key.rpartition(".")[0]
        inside = {device for name, device in where.items() if find({parent: ""}, name) is not None}
        assert key == "" or len(inside) > 1


def test_the_coarse_map_of_a_model_is_what_hugging_face_writes() -> None:
    where = {name: "cuda:0" if int("layers.1" in name) else "cpu" for name in NAMES}
    expected = {f"model.layers.{i}": "cuda:0" if i in (1, 10, 11) else "cpu" for i in range(LAYERS)}
    assert {"model.embed": "cpu", **expected, "head": "cpu"} == coarse(where)
    assert ["model.embed", *BLOCKS, "head"] == list(coarse(where))


@pytest.mark.parametrize(
    ("written", "code", "parts"),
    [
        ({"": "cpu", "model.layer.3": "disk"}, "PN-MAP-NAME", ["'model.layer.3' (did you mean 'model.layers.3'?)"]),
        ({"": "cpu", "layers.3": "disk"}, "PN-MAP-NAME", ["did you mean 'model.layers.3'?"]),
        ({"": "cpu", "modle.embed": "disk"}, "PN-MAP-NAME", ["did you mean 'model.embed'?"]),
        ({"": "cpu", "model.layers.": "disk", "x": "disk"}, "PN-MAP-NAME", ["'model.layers.'", "'x'"]),
        ({"": "cpu", "model.layers.99": "disk"}, "PN-MAP-NAME", ["'model.layers.99'"]),
        (
            {"model.embed": "cpu", "head": "cpu", "model.layers.1": "cpu"},
            "PN-MAP-COVER",
            ["'model.layers.0.a.weight'", "and 2 more"],
        ),
        ({"": "cpu", "model": "disk", "head": "disk"}, "PN-MAP-UNUSED", ["'' decides nothing", "'head', 'model'"]),
        ({"": "cpu", "model.layers.2.b": "disk"}, "PN-MAP-SPLIT", ["model.layers.2 (", "model.layers.2.b on disk"]),
        ({"": "cpu", "head": "disk"}, "PN-MAP-TIED", ["model.embed.weight on cpu, head.weight on disk"]),
    ],
)
def test_a_map_that_does_not_fit_the_model_says_why(written: dict[str, str], code: str, parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        read_map(written, WEIGHTS, BLOCKS)
    assert (code, "device_map") == (caught.value.code, caught.value.locus)
    for part in parts:
        assert part in caught.value.reason


def test_all_problems_are_told_at_once() -> None:
    written = {"model.embeds": "cpu", "model": "disk", "model.layers.1.b": "cpu", "model.embed": "disk", "model.layers": "disk"}
    with pytest.raises(PlanError) as caught:
        read_map(written, WEIGHTS, BLOCKS)
    for code in ("NAME", "UNUSED", "SPLIT"):
        assert f"[PN-MAP-{code}]" in caught.value.reason
    assert caught.value.reason.startswith("3 problems:")


def test_a_tied_weight_that_no_name_covers_follows_the_other() -> None:
    assert "disk" == read_map({"model": "disk"}, WEIGHTS, BLOCKS)["head.weight"]


def test_modules_without_weights_may_stand_in_a_map() -> None:
    written = {"model": "cpu", "head": "cpu", "model.rotary_emb": "cpu"}
    assert {"cpu"} == set(read_map(written, WEIGHTS, BLOCKS, modules=["model.rotary_emb"]).values())
    with pytest.raises(PlanError, match="PN-MAP-NAME"):
        read_map(written, WEIGHTS, BLOCKS)


def test_a_container_may_have_its_own_weights_elsewhere_and_a_leaf_not() -> None:
    weights = [Weight("enc.scale", 1), Weight("enc.shift", 1), Weight("enc.a.weight", 1), Weight("enc.a.bias", 1)]
    read_map({"": "cpu", "enc.scale": "disk"}, weights)
    with pytest.raises(PlanError, match=r"PN-MAP-SPLIT.*enc.a \("):
        read_map({"": "cpu", "enc.a.bias": "disk"}, weights)


def test_a_hundred_thousand_wrong_names_are_one_short_message() -> None:
    written = {"": "cpu", **{f"model.layers.{i}": "disk" for i in range(100, 5000)}}
    with pytest.raises(PlanError) as caught:
        read_map(written, WEIGHTS, BLOCKS)
    assert "and 4,880 more" in caught.value.reason
    assert len(caught.value.reason) < 2000
