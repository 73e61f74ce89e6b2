"""Rules from stored tensors to parameters: what each makes is what torch computes, and read backwards it is what was stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.checkpoint.mapping import (
    Concat,
    Drop,
    PermuteRope,
    Rename,
    Rule,
    Split,
    Stack,
    Target,
    Transpose,
    apply_rules,
    check_cover,
    stored_tensors,
)
from modelrig.components import Parameter, Part, Region
from modelrig.errors import LoadError

Tensors = dict[str, torch.Tensor]
LOST = -1.0  # in no tensor of these tests


def numbers(**shapes: Sequence[int]) -> Tensors:
    """name with "__" for "." → a tensor of that shape; no number occurs twice."""
    made, start = {}, 0
    for name, shape in shapes.items():
        size = int(torch.tensor(shape).prod()) if shape else 1
        made[name.replace("__", ".")] = torch.arange(start, start + size, dtype=torch.float64).view(tuple(shape))
        start += size
    return made


def cells(region: Region | None) -> Any:
    return ... if region is None else tuple(slice(start, stop) for start, stop in region)


def forward(targets: Mapping[str, Target], stored: Tensors) -> Tensors:
    """What the parts say, word by word as `Part` is documented."""
    made = {}
    for name, target in targets.items():
        made[name] = torch.full(target.shape, LOST, dtype=torch.float64)
        for part in target.parts:
            values = stored[part.name]
            assert part.shape == tuple(values.shape)
            values = values[cells(part.taken)]
            if part.axes is not None:
                values = values.reshape(part.axes)
            if part.order is not None:
                values = values.permute(part.order)
            into = made[name][cells(part.into)]
            into.copy_(values.reshape(into.shape))
    return made


def backward(targets: Mapping[str, Target], values: Tensors) -> Tensors:
    """The stored tensors again, from what was made of them."""
    found = {}
    for name, (shape, origins) in stored_tensors(targets).items():
        found[name] = torch.full(shape, LOST, dtype=torch.float64)
        for origin in origins:
            part = origin.part
            assert name == part.name
            taken = found[name][cells(part.taken)]
            axes = part.axes or tuple(taken.shape)
            order = part.order or tuple(range(len(axes)))
            read = values[origin.name][cells(part.into)].reshape([axes[place] for place in order])
            taken.copy_(read.permute([order.index(place) for place in range(len(axes))]).reshape(taken.shape))
    return found


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same(expected: Tensors, actual: Tensors) -> bool:
    return list(expected) == list(actual) and all(
        tuple(expected[name].shape) == tuple(actual[name].shape) and torch.equal(expected[name], actual[name]) for name in expected
    )


def check(rules: Sequence[Rule], stored: Tensors, expected: Tensors) -> None:
    """Forwards they make `expected`, and backwards `stored`."""
    targets = apply_rules(rules, shapes_of(stored))
    assert same(expected, forward(targets, stored))
    assert same(stored, dict(sorted(backward(targets, expected).items(), key=lambda item: list(stored).index(item[0]))))
    for name, target in targets.items():
        check_cover(name, target.shape, target.parts)


def permuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """As transformers' conversion of Llama has it."""
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


# ------------------------------------------------------------------------------------------------ each rule


def test_what_no_rule_claims_keeps_its_name_and_place() -> None:
    stored = numbers(a=(2, 3), b=(), c=(0, 4), d=(5,))
    check([], stored, stored)
    check([Rename("nothing.{i}", "something.{i}")], stored, stored)


def test_renaming_carries_fields_over() -> None:
    stored = numbers(h__0__w=(2,), h__12__w=(3,), h__12__deep__w=(1,), other=())
    expected = dict(zip(("layers.0.w", "layers.12.w", "h.12.deep.w", "other"), stored.values(), strict=True))
    check([Rename("h.{i}.w", "layers.{i}.w")], stored, expected)


def test_a_starred_field_spans_dots_and_a_plain_one_does_not() -> None:
    stored = numbers(m__a=(1,), m__a__b__c=(2,), mx=(3,))
    check([Rename("m.{*rest}", "{*rest}")], stored, dict(zip(("a", "a.b.c", "mx"), stored.values(), strict=True)))
    check([Rename("m.{rest}", "{rest}")], stored, dict(zip(("a", "m.a.b.c", "mx"), stored.values(), strict=True)))


def test_a_field_that_stands_twice_must_stand_for_the_same() -> None:
    stored = numbers(a__1__1=(1,), a__1__2=(2,))
    check([Rename("a.{i}.{i}", "b.{i}")], stored, dict(zip(("b.1", "a.1.2"), stored.values(), strict=True)))


def test_signs_of_regular_expressions_are_letters_of_a_name() -> None:
    stored = {"a+b(c)": torch.zeros(1, dtype=torch.float64), "aab(c)": torch.ones(2, dtype=torch.float64)}
    check([Rename("a+b({x})", "{x}")], stored, {"c": stored["a+b(c)"], "aab(c)": stored["aab(c)"]})


def test_dropped_tensors_are_in_no_target_and_not_written_again() -> None:
    stored = numbers(w=(2,), rope__inv_freq=(3,))
    targets = apply_rules([Drop("{*rest}.inv_freq", "computed")], shapes_of(stored))
    assert ["w"] == list(targets)
    assert ["w"] == list(stored_tensors(targets))


@pytest.mark.parametrize(
    ("shapes", "dim"), [([(2, 3), (4, 3)], 0), ([(2, 3), (2, 1)], 1), ([(2,), (0,), (3,)], -1), ([(2, 0)] * 2, 0)]
)
def test_concat_is_torch_cat(shapes: list[tuple[int, ...]], dim: int) -> None:
    names = ["q", "k", "v"][: len(shapes)]
    stored = numbers(**{f"l__7__{name}": shape for name, shape in zip(names, shapes, strict=True)})
    rule = Concat([f"l.{{i}}.{name}" for name in names], "l.{i}.all", dim)
    check([rule], stored, {"l.7.all": torch.cat([*stored.values()], dim)})


def test_concat_takes_its_inputs_in_the_rules_order_not_the_files() -> None:
    stored = numbers(k=(1, 2), rest=(1,), q=(3, 2))
    check([Concat(["q", "k"], "qk")], stored, {"qk": torch.cat([stored["q"], stored["k"]]), "rest": stored["rest"]})


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 2)])
def test_stack_is_torch_stack_in_the_order_of_numbers(shape: tuple[int, ...], dim: int) -> None:
    stored = numbers(**{f"e__{number}__w": shape for number in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)})
    expected = torch.stack([stored[f"e.{number}.w"] for number in range(11)], dim)
    check([Stack("e.{n}.w", "e.w", "n", dim)], stored, {"e.w": expected})


def test_stack_of_scalars_is_a_vector() -> None:
    stored = numbers(s__0=(), s__1=())
    check([Stack("s.{n}", "s", "n")], stored, {"s": torch.tensor([0.0, 1.0], dtype=torch.float64)})


@pytest.mark.parametrize(
    ("shape", "sizes", "dim"),
    [((6, 2), None, 0), ((6, 2), (1, 3, 2), 0), ((2, 6), (4, 0, 2), -1), ((3,), None, 0), ((0, 3), None, 1), ((0,), None, 0)],
)
def test_split_is_torch_split(shape: tuple[int, ...], sizes: tuple[int, ...] | None, dim: int) -> None:
    stored = numbers(qkv=shape)
    parts = torch.split(stored["qkv"], list(sizes) if sizes else max(1, shape[dim] // 3), dim)
    parts = parts if len(parts) == 3 else (stored["qkv"],) * 3  # torch cuts nothing into one piece
    check([Split("qkv", ["q", "k", "v"], sizes, dim)], stored, dict(zip("qkv", parts, strict=True)))


@pytest.mark.parametrize(
    ("shape", "dims"), [((2, 3), (0, 1)), ((2, 3, 4), (1, 2)), ((2, 3, 4), (0, -1)), ((5, 5), (0, 0)), ((0, 3), (0, 1))]
)
def test_transpose_is_torch_transpose(shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    stored = numbers(w=shape)
    check([Transpose("w", "w", dims)], stored, {"w": stored["w"].transpose(*dims)})


@pytest.mark.parametrize(("shape", "heads"), [((24, 5), 3), ((24,), 3), ((8, 1), 1), ((4, 0), 2), ((0, 4), 2), ((12, 2, 3), 6)])
def test_permuting_for_rope_is_what_transformers_does(shape: tuple[int, ...], heads: int) -> None:
    stored = numbers(q=shape)
    expected = permuted(stored["q"], heads) if stored["q"].numel() else stored["q"]
    check([PermuteRope("q", "q", heads)], stored, {"q": expected})


# ------------------------------------------------------------------------------------------------ chains


def test_experts_are_renamed_concatenated_and_stacked() -> None:
    stored = numbers(**{f"m__layers__0__moe__experts__{e}__{w}": (3, 2) for e in range(3) for w in ("w1", "w3")})
    rules = [
        Rename("m.{*rest}", "{*rest}"),
        Concat([f"layers.{{i}}.moe.experts.{{e}}.{w}" for w in ("w1", "w3")], "layers.{i}.moe.{e}.gate_up"),
        Stack("layers.{i}.moe.{e}.gate_up", "layers.{i}.experts.gate_up", "e"),
    ]
    each = [torch.cat([stored[f"m.layers.0.moe.experts.{e}.{w}"] for w in ("w1", "w3")]) for e in range(3)]
    check(rules, stored, {"layers.0.experts.gate_up": torch.stack(each)})


def test_stacks_are_concatenated() -> None:
    stored = numbers(**{f"{w}__{e}": (3, 2) for w in ("w1", "w3") for e in range(4)})
    rules = [Stack("w1.{e}", "gate", "e"), Stack("w3.{e}", "up", "e"), Concat(["gate", "up"], "gate_up", 1)]
    stacks = [torch.stack([stored[f"{w}.{e}"] for e in range(4)]) for w in ("w1", "w3")]
    check(rules, stored, {"gate_up": torch.cat(stacks, 1)})


def test_a_stack_is_transposed_and_transposed_back() -> None:
    stored = numbers(**{f"e__{number}": (3, 2) for number in range(4)})
    whole = torch.stack([*stored.values()])
    rules: list[Rule] = [Stack("e.{n}", "e", "n"), Transpose("e", "e", (1, 2))]
    check(rules, stored, {"e": whole.transpose(1, 2)})
    check([*rules, Transpose("e", "e", (0, 2))], stored, {"e": whole.transpose(1, 2).transpose(0, 2)})
    check([*rules, Transpose("e", "e", (1, 2))], stored, {"e": whole})


def test_transposed_tensors_are_stacked_and_concatenated() -> None:
    stored = numbers(**{f"e__{number}": (3, 2) for number in range(4)}, last=(1, 3, 2))
    rules = [
        Transpose("e.{n}", "e.{n}"), Stack("e.{n}", "e", "n"), Transpose("last", "last", (1, 2)), Concat(["e", "last"], "all"),
        Transpose("all", "all", (0, 1)),
    ]  # fmt: skip
    each = [stored[f"e.{number}"].T for number in range(4)]
    expected = torch.cat([torch.stack(each), stored["last"].transpose(1, 2)]).transpose(0, 1)
    check(rules, stored, {"all": expected})


def test_a_stack_is_split_along_a_dimension_of_its_own_and_of_its_inputs() -> None:
    stored = numbers(**{f"e__{number}": (4, 2) for number in range(3)})
    whole = torch.stack([*stored.values()], 1)
    stack = Stack("e.{n}", "e", "n", 1)
    check([stack, Split("e", ["a", "b"], (1, 3))], stored, dict(zip("ab", whole.split((1, 3)), strict=True)))
    check([stack, Split("e", ["a", "b"], (1, 2), 1)], stored, dict(zip("ab", whole.split((1, 2), 1), strict=True)))


def test_parts_of_a_split_are_transposed_permuted_and_concatenated_anew() -> None:
    stored = numbers(qkv=(24, 5), extra=(5, 2))
    q, k, v = stored["qkv"].split((8, 8, 8))
    rules = [
        Split("qkv", ["q", "k", "v"]), PermuteRope("q", "q", 2), Transpose("v", "v"), Concat(["v", "extra"], "ve", -1),
    ]  # fmt: skip
    check(rules, stored, {"q": permuted(q, 2), "k": k, "ve": torch.cat([v.T, stored["extra"]], 1)})


def test_queries_and_keys_are_permuted_before_they_are_fused() -> None:
    stored = numbers(q=(12, 4), k=(4, 4), v=(4, 4))
    rules = [PermuteRope("q", "q", 3), PermuteRope("k", "k", 1), Concat(["q", "k", "v"], "qkv")]
    check(rules, stored, {"qkv": torch.cat([permuted(stored["q"], 3), permuted(stored["k"], 1), stored["v"]])})


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_what_was_transposed_is_permuted_and_the_other_way_round(heads: int) -> None:
    stored = numbers(w=(12, 12))
    value = stored["w"]
    check([Transpose("w", "w"), PermuteRope("w", "w", heads)], stored, {"w": permuted(value.T, heads)})
    check([PermuteRope("w", "w", heads), Transpose("w", "w")], stored, {"w": permuted(value, heads).T})
    thrice = [PermuteRope("w", "w", heads), Transpose("w", "w"), PermuteRope("w", "w", 2)]
    check(thrice, stored, {"w": permuted(permuted(value, heads).T, 2)})


def test_permuting_twice_by_heads_that_divide_each_other_is_followed() -> None:
    stored = numbers(w=(16, 3))
    check([PermuteRope("w", "w", 1), PermuteRope("w", "w", 2)], stored, {"w": permuted(permuted(stored["w"], 1), 2)})


class Chain:
    """A chain of rules that grows, beside what torch makes of the same tensors."""

    def __init__(self, stored: Tensors) -> None:
        self.stored, self.values, self.rules = stored, dict(stored), list[Rule]()
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def add(self, taken: Sequence[str], made: Tensors, *rules: Rule) -> None:
        """Append, unless the mapping says that it cannot follow: then nothing has changed."""
        try:
            apply_rules([*self.rules, *rules], shapes_of(self.stored))
        except LoadError as error:
            assert any(text in str(error) for text in ("cannot be cut after", "cannot follow", "permute them before"))
            return
        self.rules.extend(rules)
        self.values = {name: value for name, value in self.values.items() if name not in taken} | made

    def step(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        name = draw(st.sampled_from(sorted(self.values)))
        value, new = self.values[name], self.name()
        kind = draw(st.sampled_from(["rename", "concat", "stack", "split", "transpose", "rope"]))
        alike = [other for other, tensor in self.values.items() if tensor.shape == value.shape and other != name][:2]
        dim = draw(st.integers(-value.dim(), value.dim() - 1)) if value.dim() else 0
        if kind == "rename":
            self.add([name], {new: value}, Rename(name, new))
        elif kind == "concat" and value.dim() and alike:
            inputs = [name, *alike]
            self.add(inputs, {new: torch.cat([self.values[one] for one in inputs], dim)}, Concat(inputs, new, dim))
        elif kind == "stack" and alike and value.dim() < 4:
            inputs = [name, *alike]
            dim = draw(st.integers(-value.dim() - 1, value.dim()))
            renames = [Rename(one, f"{new}.part.{number}") for number, one in enumerate(inputs)]
            made = torch.stack([self.values[one] for one in inputs], dim)
            self.add(inputs, {new: made}, *renames, Stack(f"{new}.part.{{e}}", new, "e", dim))
        elif kind == "split" and value.dim():
            first = draw(st.integers(0, value.shape[dim]))
            sizes = (first, value.shape[dim] - first)
            made = dict(zip((f"{new}.a", f"{new}.b"), value.split(sizes, dim), strict=True))
            self.add([name], made, Split(name, [*made], sizes, dim))
        elif kind == "transpose" and value.dim():
            dims = dim, draw(st.integers(-value.dim(), value.dim() - 1))
            self.add([name], {new: value.transpose(*dims)}, Transpose(name, new, dims))
        elif kind == "rope" and value.dim() and value.numel():
            heads = draw(st.sampled_from([1, 2, 3]))
            if value.shape[0] % (2 * heads) == 0:
                self.add([name], {new: permuted(value.contiguous(), heads)}, PermuteRope(name, new, heads))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_chain_of_rules_is_what_torch_computes_and_can_be_turned_round(data: st.DataObject) -> None:
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), max_size=3)
    shapes = data.draw(st.lists(sizes, min_size=1, max_size=2))
    chain = Chain(numbers(**{f"t__{number}": shapes[number % len(shapes)] for number in range(data.draw(st.integers(1, 5)))}))
    for _ in range(data.draw(st.integers(1, 7))):
        chain.step(data.draw)
    targets = apply_rules(chain.rules, shapes_of(chain.stored))
    made = forward(targets, chain.stored)
    assert sorted(chain.values) == sorted(made)
    assert same({name: chain.values[name] for name in made}, made)
    for name, target in targets.items():
        check_cover(name, target.shape, target.parts)
    back = backward(targets, made)
    lost = {name for name, value in chain.stored.items() if name not in back}
    assert all(chain.stored[name].numel() == 0 for name in lost)
    assert same({name: chain.stored[name] for name in back}, back)


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = {
    "an input of concat is missing": ([Concat(["q", "k"], "qk")], {"q": (2,)}, "qk", "there is no k (1 of 2 inputs are missing)"),
    "a gap in a stack": ([Stack("e.{n}", "e", "n")], {"e.0": (2,), "e.2": (2,)}, "e", "e.{n} with n = 1 (1 of 3"),
    "a stack that does not begin at 0": ([Stack("e.{n}", "e", "n")], {"e.1": (2,)}, "e", "with n = 0 (1 of 2"),
    "a stack over what is no number": ([Stack("e.{n}", "e", "n")], {"e.x": (2,)}, "e.x", "{n} is 'x', and must be a number"),
    "a number with an accent": ([Stack("e.{n}", "e", "n")], {"e.²": (2,)}, "e.²", "must be a number"),
    "one number spelt twice": ([Stack("e.{n}", "e", "n")], {"e.1": (2,), "e.01": (2,)}, "e.01", "same input"),
    "shapes in a stack": ([Stack("e.{n}", "e", "n")], {"e.0": (2,), "e.1": (3,)}, "e.1", "has the shape [3], 'e.0' [2]"),
    "shapes in a concat": ([Concat(["a", "b"], "c")], {"a": (2, 3), "b": (2, 4)}, "b", "has the shape [2, 4], 'a' [2, 3]"),
    "ranks in a concat": ([Concat(["a", "b"], "c")], {"a": (2, 3), "b": (2,)}, "b", "has the shape [2]"),
    "concat of scalars": ([Concat(["a", "b"], "c")], {"a": (), "b": ()}, "a", "has no dimension 0"),
    "concat by another group's tensors": (
        [Concat(["a.{i}.x", "a.{i}.y"], "c")], {"a.0.x": (1,), "a.1.x": (1,), "a.0.y": (1,)}, "a.1.x", "same input",
    ),
    "two results of one name": ([Rename("a.{i}", "same")], {"a.0": (1,), "a.1": (1,)}, "same", "several tensors"),
    "a name that is taken": ([Rename("a", "b")], {"a": (1,), "b": (1,)}, "b", "several tensors would get this name"),
    "a field without a source": ([Rename("a.{i}", "b.{j}")], {"a.0": (1,)}, "b.{j}", "no source has the field {j}"),
    "a field that stacking used up": ([Stack("a.{n}", "b.{n}", "n")], {"a.0": (1,)}, "b.{n}", "no source has the field {n}"),
    "a dimension that is not there": ([Transpose("a", "a", (0, 2))], {"a": (1, 2)}, "a", "has no dimension 2: its shape is [1, 2]"),
    "splitting a scalar": ([Split("a", ["b", "c"])], {"a": ()}, "a", "has no dimension 0"),
    "unequal parts": ([Split("a", ["b", "c"])], {"a": (3,)}, "a", "3 along dimension 0 cannot be cut into 2 equal parts"),
    "sizes that do not add up": ([Split("a", ["b", "c"], (1, 3))], {"a": (3,)}, "a", "cut into 2 parts of [1, 3]"),
    "as many sizes as targets": ([Split("a", ["b", "c"], (1, 1, 1))], {"a": (3,)}, "a", "cut into 2 parts of [1, 1, 1]"),
    "a negative size": ([Split("a", ["b", "c"], (4, -1))], {"a": (3,)}, "a", "parts of [4, -1]"),
    "cutting into nothing": ([Split("a", [])], {"a": (3,)}, "a", "cut into 0 equal parts"),
    "rows that are no pairs": ([PermuteRope("a", "a", 2)], {"a": (6, 2)}, "a", "[6, 2]: the rows are not pairs of 2 heads"),
    "heads that are none": ([PermuteRope("a", "a", 0)], {"a": (6, 2)}, "a", "not pairs of 0 heads"),
    "a scalar has no rows": ([PermuteRope("a", "a", 1)], {"a": ()}, "a", "its shape is []"),
    "permuting what was fused": (
        [Concat(["a", "b"], "c"), PermuteRope("c", "c", 1)], {"a": (2, 2), "b": (2, 2)}, "c", "permute them before",
    ),
    "cutting after permuting": ([PermuteRope("a", "a", 1), Split("a", ["b", "c"])], {"a": (4, 2)}, "a", "after it was permuted"),
    "cutting after transposing": ([Transpose("a", "a"), Split("a", ["b", "c"])], {"a": (4, 2)}, "a", "after it was permuted"),
    "permuting by heads that do not divide": (
        [PermuteRope("a", "a", 2), PermuteRope("a", "a", 3)], {"a": (12,)}, "a", "cannot follow",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "shapes", "locus", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_rule_and_tensor(
    rules: list[Rule], shapes: dict[str, tuple[int, ...]], locus: str, text: str
) -> None:
    with pytest.raises(LoadError) as caught:
        apply_rules(rules, shapes, Path("some/folder"))
    error = caught.value
    assert ("LD-MAPPING", "some/folder", locus) == (error.code, error.path, error.locus)
    assert text in error.reason
    assert str(rules[-1]) in error.reason


def test_a_huge_number_in_a_name_costs_nothing() -> None:
    with pytest.raises(LoadError, match=r"9999999 of 10000000 inputs"):
        apply_rules([Stack("e.{n}", "e", "n")], {"e.9999999": (1,)})
    with pytest.raises(LoadError, match="must be a number"):
        apply_rules([Stack("e.{n}", "e", "n")], {"e.99999999": (1,)})


def test_one_name_for_a_hundred_thousand_tensors_is_found_at_once() -> None:
    shapes = dict.fromkeys([f"a.{number}" for number in range(100_000)], (1,)) | {"b.1": (1,), "b.2": (1,)}
    with pytest.raises(LoadError, match="several tensors"):
        apply_rules([Rename("b.{i}", "same")], shapes)


def test_many_parts_side_by_side_are_compared_with_neighbours_only() -> None:
    count = 20_000
    parts = [Part(f"e.{number}", (4,), into=((0, 4), (number, number + 1))) for number in range(count)]
    check_cover("e", (4, count), parts)
    twice = [*parts[:-1], Part("e.x", (4,), into=((0, 4), (7, 8)))]
    with pytest.raises(LoadError, match="exactly once"):
        check_cover("e", (4, count), twice)


def test_a_stored_tensor_in_two_places_is_not_written_from_either() -> None:
    targets = {"a": Target((2,), (Part("w", (2,)),)), "b": Target((2,), (Part("w", (2,)),))}
    with pytest.raises(LoadError, match="not each in exactly one tensor") as caught:
        stored_tensors(targets)
    assert ("LD-MAPPING", "w") == (caught.value.code, caught.value.locus)


def test_a_stored_tensor_of_which_something_is_nowhere_is_refused() -> None:
    half = Target((1, 3), (Part("w", (2, 3), taken=((0, 1), (0, 3))),))
    with pytest.raises(LoadError, match="its 6 elements"):
        stored_tensors({"a": half})
    overlap = [Target((1, 3), (Part("w", (2, 3), taken=((0, 1), (0, 3))),))] * 2
    with pytest.raises(LoadError, match="its 6 elements"):
        stored_tensors(dict(zip("ab", overlap, strict=True)))


def test_a_stored_tensor_of_two_shapes_is_refused() -> None:
    targets = {"a": Target((2,), (Part("w", (2,)),)), "b": Target((1,), (Part("w", (1,)),))}
    with pytest.raises(LoadError, match=r"is \[2\] for one tensor, \[1\] for another"):
        stored_tensors(targets)


def test_parameters_of_a_plan_can_be_turned_round_too() -> None:
    plain = Parameter("a", (2,), "linear", "w")
    tie = Parameter("b", (2,), "head", None)
    assert {"w"} == set(stored_tensors({"a": plain}))
    assert () == tie.sources


COVERS = {
    "a gap": ((4,), [((0, 1),), ((2, 4),)], False),
    "an overlap that makes up for a gap": ((4,), [((0, 2),), ((1, 3),)], False),
    "outside": ((2,), [((1, 3),)], False),
    "of another rank": ((2,), [((0, 2), (0, 1))], False),
    "turned round": ((2,), [((2, 0),)], False),
    "nothing of something": ((2,), [], False),
    "nothing of nothing": ((0, 3), [], True),
    "a scalar": ((), [()], True),
    "a scalar twice": ((), [(), ()], False),
    "four quarters": ((2, 2), [((i, i + 1), (j, j + 1)) for i in (0, 1) for j in (0, 1)], True),
    "empty ones beside": ((2,), [((0, 2),), ((1, 1),)], True),
}


@pytest.mark.parametrize(("shape", "regions", "fits"), COVERS.values(), ids=COVERS)
def test_parts_must_fill_a_tensor_exactly_once(shape: tuple[int, ...], regions: list[Region], fits: bool) -> None:
    parts = [Part("w", shape, into=region) for region in regions]
    if fits:
        check_cover("t", shape, parts)
        return
    with pytest.raises(LoadError, match="exactly once") as caught:
        check_cover("t", shape, parts, Path("x"))
    assert ("LD-MAPPING", "t", "x") == (caught.value.code, caught.value.locus, caught.value.path)
