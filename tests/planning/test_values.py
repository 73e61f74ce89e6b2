from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.planning import values
from modelrig.planning.values import Wish


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", Wish()),
        ("sdpa", Wish(("sdpa",), False)),
        ("attention:sdpa", Wish(("attention:sdpa",), False)),
        (None, Wish(("none",), False)),
        ("!sdpa", Wish((), True, ("sdpa",))),
        (["a", "b"], Wish(("a", "b"), False)),
        (["a", "auto"], Wish(("a",), True)),
        (["!a", "!b"], Wish((), True, ("a", "b"))),
        ({"name": "int4", "group_size": 64}, Wish(("int4",), False, (), {"int4": {"group_size": 64}})),
        ({"group_size": 64}, Wish((), True, (), {"": {"group_size": 64}})),
    ],
)
def test_a_slot_takes_names_lists_exclusions_and_tables(written: object, meant: Wish) -> None:
    assert meant == values.slot(written)


@pytest.mark.parametrize("written", ["auto", "sdpa", "!sdpa", ["a", "b"], ["a", "auto"], {"name": "int4", "group_size": 64}])
def test_a_wish_is_written_back_as_it_was(written: object) -> None:
    assert written == values.slot(written).to_json()


@pytest.mark.parametrize("written", [1, True, "", "!", [], [1], {"name": 3}, {"name": "a", 1: 2}, 2.5])
def test_a_slot_refuses_what_names_nothing(written: object) -> None:
    with pytest.raises(ValueError, match=r"accepted|empty|strings"):
        values.slot(written)


def test_only_one_name_without_a_fallback_is_a_pin() -> None:
    assert [True, False, False, False] == [values.slot(one).is_pin for one in ("a", ["a", "b"], ["a", "auto"], "!a")]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("float", "float32"),
        ("torch.float32", "float32"),
        ("auto", "auto"),
    ],
)
def test_dtypes_have_short_spellings(written: str, name: str) -> None:
    assert name == values.dtype(written)


@pytest.mark.parametrize("written", ["int8", "bfloat", 16, None, ["float32"]])
def test_other_dtypes_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        values.dtype(written)


def test_a_torch_dtype_and_device_serve_as_their_names() -> None:
    import torch

    assert ("bfloat16", "cuda:1", "cpu") == (
        values.dtype(torch.bfloat16),
        values.device_map(torch.device("cuda", 1)),
        values.device_map(torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("written", "device"),
    [
        ("auto", "auto"),
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("cuda:3", "cuda:3"),
        (0, "cuda:0"),
        ({"": "cpu"}, "cpu"),
        ({"": 1}, "cuda:1"),
        ("disk", "disk"),
        ("1", "cuda:1"),
        ("balanced", "balanced"),
        ("balanced_low_0", "balanced_low_0"),
        ("sequential", "sequential"),
    ],
)
def test_a_device_map_is_a_strategy_or_names_one_device(written: object, device: str) -> None:
    assert device == values.device_map(written)


def test_a_device_map_of_modules_has_a_device_for_each() -> None:
    import torch

    written = {"": "disk", "a": 0, "a.b": "cuda", "c": "cuda:1", "d": torch.device("cpu"), "e": "1"}
    expected = {"": "disk", "a": "cuda:0", "a.b": "cuda:0", "c": "cuda:1", "d": "cpu", "e": "cuda:1"}
    assert expected == values.device_map(written)


def test_every_device_of_a_map_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="'mps' for 'a', 'auto' for 'b', the name 7; for the name"):
        values.device_map({"a": "mps", "ok": "cpu", "b": "auto", 7: "cpu"})
    with pytest.raises(ValueError, match="and 80 more"):
        values.device_map({str(i): "gpu" for i in range(100)})
    with pytest.raises(ValueError, match="an empty map"):
        values.device_map({})


@pytest.mark.parametrize("written", ["gpu", "cuda:", "cuda:x", -1, True, 1.0, "cpu:0", "mps"])
def test_other_devices_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="accepted"):
        values.device_map(written)


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [(1, 1), ("5", 5), ("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), (" 7 mib ", 7 << 20), ("0.1kB", 100), ("2tib", 2 << 40)],
)
def test_sizes_have_units(written: object, bytes_: int) -> None:
    assert bytes_ == values.size(written)


@pytest.mark.parametrize("written", [0, -1, True, 1.5, "GB", "1 XB", "1e9", "-1GB", "nan", "9" * 40, 1 << 63, "0GB"])
def test_other_sizes_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="accepted"):
        values.size(written)


def test_max_memory_is_one_limit_or_one_for_each_device() -> None:
    assert {"": 8 * 10**9} == values.max_memory("8GB")
    assert {"cuda:0": 1000, "cpu": 2000} == values.max_memory({0: "1kB", "cpu": 2000})


@pytest.mark.parametrize(("written", "variant"), [("fp16", "fp16"), ("non_ema-2", "non_ema-2"), (8, "8")])
def test_a_variant_is_a_short_name(written: object, variant: str) -> None:
    assert variant == values.variant(written)


@pytest.mark.parametrize("written", ["", "a.b", "../x", "a/b", "fp16\n", "é", "x" * 65, True, 1.5, -1 << 400, None, ["fp16"]])
def test_other_variants_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="short name"):
        values.variant(written)


@pytest.mark.parametrize("written", [0, -3, True, 1.0, "many", 1 << 31, None])
def test_counts_are_whole_numbers_from_one_on(written: object) -> None:
    for parse in (values.context, values.batch):
        with pytest.raises(ValueError, match="from 1 to"):
            parse(written)


def test_options_are_sorted_by_slot() -> None:
    parse = values.options_of_slots(("quantizer", "cache"))
    assert {"quantizer": {"a": 1, "b": 2}, "cache": {"c.d": 3}} == parse({"quantizer.a": 1, "quantizer.b": 2, "cache.c.d": 3})
    with pytest.raises(ValueError, match="did you mean 'quantizer'"):
        parse({"quantiser.a": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("true", True),
        ("0.5", 0.5),
        ('["a", "b"]', ["a", "b"]),
        ('{name = "int4"}', {"name": "int4"}),
        ('{"" = "cpu", "a.b" = 0}', {"": "cpu", "a.b": 0}),
        ('{"": "cpu", "a.b": 0}', {"": "cpu", "a.b": 0}),
        ("{", "{"),
        ("cuda:0", "cuda:0"),
        (" sdpa ", "sdpa"),
        ("2024-01-01", "2024-01-01"),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_text_is_toml_or_a_json_object_where_it_is_and_itself_otherwise(text: str, value: object) -> None:
    assert value == values.from_text(text)


@given(st.text())
def test_any_text_has_a_value(text: str) -> None:
    assert isinstance(values.from_text(text), str | int | float | bool | list | dict)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_parsers_accept_a_value_or_raise_value_error(value: object) -> None:
    for parse in (values.slot, values.dtype, values.context, values.batch, values.device_map, values.max_memory, values.names):
        try:
            parse(value)
        except ValueError as error:
            assert len(str(error)) < 700
