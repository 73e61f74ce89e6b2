"""Every attention backend of ours against float64, over all that it declares; what it does not declare is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attention_reference import NOWHERE, inputs, reference, ring, visibility
from modelrig.components import FLOATING, AttentionBackend, AttentionSpec
from modelrig.errors import PluginError
from modelrig.modules.slots import Visibility
from modelrig.planning.environment import read_environment
from modelrig.planning.needs import attention_need
from modelrig.planning.rules import unary_reasons
from modelrig.registry import current
from rigs import situation, spec

DECLARED: dict[str, AttentionBackend] = {
    one.name: one.descriptor  # type: ignore[misc]
    for one in current().components("attention")
    if one.is_ours
}
HERE = read_environment()


def runs_here(name: str) -> bool:
    """On CPU, by what it declares and its planner says of this machine."""
    if "cpu" not in DECLARED[name].capabilities.devices:
        return False
    check = getattr(current().find("attention", name).planner(), "check", None)
    options = getattr(current().find("attention", name).planner(), "Options", lambda: None)()
    at = situation(cpu_flags=HERE.cpu_flags, lacks_cpp=HERE.lacks_cpp)
    return check is None or not list(check(attention_need(at), options))


BACKENDS = [name for name in DECLARED if runs_here(name)]
#: compiles for seconds for each dtype and head layout, so it is not tried with every one
COMPILED = "flex"
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3, "float64": 2e-6}
LAYOUTS = [(6, 2, 10, 10), (3, 3, 17, 17), (4, 1, 64, 64), (4, 2, 12, 20), (4, 2, 20, 12), (2, 2, 1, 1)]
GRID = [
    (name, layout, dtype)
    for name in BACKENDS
    for layout in LAYOUTS
    for dtype in sorted(DECLARED[name].capabilities.dtypes)
    if name != COMPILED or (layout in LAYOUTS[3:4] if dtype == "float32" else layout == LAYOUTS[0])
]


def kernel_of(name: str) -> Any:
    return current().find("attention", name).implementation()(None)


def check(name: str, layer: AttentionSpec, visible: Visibility, dtype: str = "float32") -> None:
    q, k, v = inputs(layer, visible, dtype=getattr(torch, dtype))
    kernel = kernel_of(name)
    expected, scale = reference(q, k, v, visible, layer), v[:, :, visible.key_index <= visible.query_index[-1]].abs().max().item()
    with torch.no_grad():
        for seen in (visible, visible._replace(past=None)):  # eager, and where host numbers are not to be used
            actual = kernel.attend(q, k, v, kernel.prepare(layer, seen), layer)
            assert expected.shape == actual.shape
            assert q.dtype == actual.dtype
            assert (expected - actual.double()).abs().max().item() <= BOUNDS[dtype] * scale


def test_every_backend_of_ours_is_tried_or_needs_a_gpu() -> None:
    assert {"sdpa", "eager"} <= set(BACKENDS)
    assert {name for name in DECLARED if "cpu" in DECLARED[name].capabilities.devices} - set(BACKENDS) <= {COMPILED}


@pytest.mark.parametrize(("name", "layout", "dtype"), GRID)
@pytest.mark.parametrize(("past", "count"), [(0, 9), (9, 1), (9, 5)])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_causal_attention(
    name: str, layout: tuple[int, int, int, int], past: int, count: int, starts: list[int] | None, dtype: str
) -> None:
    check(name, AttentionSpec(*layout, 1 / math.sqrt(layout[2])), visibility(past, count, starts), dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize(("past", "count"), [(0, 9), (9, 1), (9, 5)])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_sliding_windows(name: str, window: int, past: int, count: int, starts: list[int] | None) -> None:
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, window=window), visibility(past, count, starts, window))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
@pytest.mark.parametrize(("past", "count"), [(3, 4), (20, 1), (30, 4)])
def test_rings_in_whatever_order_their_tokens_lie(name: str, past: int, count: int, starts: list[int] | None) -> None:
    starts = None if starts is None else [min(start, past + count - 1) for start in starts]
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, window=6), ring(past, count, 11, 6, starts))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
def test_bidirectional_attention(name: str, starts: list[int] | None) -> None:
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, causal=False), visibility(0, 9, starts, causal=False))


@pytest.mark.parametrize("name", [name for name in BACKENDS if "uniform" not in DECLARED[name].needs.get("caches", ())])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
@pytest.mark.parametrize(("count", "which"), [(1, "both"), (4, "both"), (4, "seen_from"), (4, "seen_until")])
def test_tokens_that_a_cache_holds_twice(name: str, count: int, starts: list[int] | None, window: int | None, which: str) -> None:
    """As they were and packed: queries up to the one that fills a group see the former, later ones the latter."""
    past, switch = 9, 11  # tokens 0 ... 3 are packed for queries from 11 on
    packed = torch.arange(4)
    keys = torch.cat((packed, torch.arange(past + count)))
    since = torch.cat((torch.full((4,), switch), torch.zeros(past + count, dtype=torch.int64)))
    until = torch.full((len(keys),), NOWHERE)
    until[4:8] = switch
    visible = visibility(past, count, starts, window)._replace(
        key_index=keys,
        past=None,
        seen_from=since if which != "seen_until" else None,
        seen_until=until if which != "seen_from" else None,
    )
    check(name, AttentionSpec(4, 2, 16, 16, 0.3, window=window), visible)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_that_are_all_padding_stay_finite_and_spoil_no_other(name: str) -> None:
    kernel, layer = kernel_of(name), AttentionSpec(4, 2, 16, 16, 0.3)
    visible = visibility(0, 4, [0, 9, 4])
    q, k, v = inputs(layer, visible)
    actual = kernel.attend(q, k, v, kernel.prepare(layer, visible), layer)
    assert bool(actual.isfinite().all())
    single = visibility(0, 4)
    alone = kernel.attend(q[:1], k[:1], v[:1], kernel.prepare(layer, single), layer)
    torch.testing.assert_close(actual[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
def test_rows_of_a_left_padded_batch_give_what_they_give_alone(name: str, window: int | None) -> None:
    kernel, layer, starts = kernel_of(name), AttentionSpec(4, 2, 16, 16, 0.3, window=window), [0, 6, 2]
    for past, count in ((0, 9), (9, 1), (9, 3)):
        visible = visibility(past, count, starts, window)
        q, k, v = inputs(layer, visible)
        together = kernel.attend(q, k, v, kernel.prepare(layer, visible), layer)
        for row, start in enumerate(starts):
            first = max(0, start - past)
            alone = visibility(max(0, past - start), count - first, None, window)
            parts = (q[row : row + 1, :, first:], k[row : row + 1, :, start:], v[row : row + 1, :, start:])
            single = kernel.attend(*parts, kernel.prepare(layer, alone), layer)
            torch.testing.assert_close(together[row : row + 1, first:], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_lies_behind_the_keys_is_never_read(name: str) -> None:
    kernel, layer = kernel_of(name), AttentionSpec(4, 2, 16, 16, 0.3)
    for past, count, starts in ((0, 9, None), (9, 1, None), (9, 4, [0, 6, 2])):
        visible = visibility(past, count, starts)
        q, k, v = inputs(layer, visible)
        room = [torch.full((3, 2, 64, 16), float("nan")) for _ in range(2)]
        for buffer, held in zip(room, (k, v), strict=True):
            buffer[:, :, : past + count] = held
        keys, values = (buffer[:, :, : past + count] for buffer in room)
        actual = kernel.attend(q, keys, values, kernel.prepare(layer, visible), layer)
        torch.testing.assert_close(reference(q, k, v, visible, layer), actual.double(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ declarations


@pytest.mark.parametrize("name", [name for name in BACKENDS if DECLARED[name].capabilities.softcap])
@pytest.mark.parametrize("starts", [None, [0, 1, 2]])
def test_soft_caps_where_declared(name: str, starts: list[int] | None) -> None:
    for cap in (3.0, 0.5):
        check(name, AttentionSpec(4, 2, 16, 16, 2.0, softcap=cap), visibility(3, 6, starts))


@pytest.mark.parametrize("name", [name for name in BACKENDS if not DECLARED[name].capabilities.softcap])
def test_what_declares_no_soft_caps_has_none(name: str) -> None:
    kernel, layer, visible = kernel_of(name), AttentionSpec(4, 2, 16, 16, 2.0, softcap=0.5), visibility(3, 6)
    q, k, v = inputs(layer, visible)
    actual = kernel.attend(q, k, v, kernel.prepare(layer, visible), layer)
    assert (reference(q, k, v, visible, layer) - actual.double()).abs().max().item() > 0.1


@pytest.mark.parametrize("name", [name for name in BACKENDS if "float64" not in DECLARED[name].capabilities.dtypes])
def test_what_declares_no_float64_cannot_compute_in_it(name: str) -> None:
    kernel, layer, visible = kernel_of(name), AttentionSpec(4, 2, 16, 16, 0.3), visibility(0, 4)
    with pytest.raises(PluginError, match="float64") as caught:
        kernel.attend(*inputs(layer, visible, dtype=torch.float64), kernel.prepare(layer, visible), layer)
    assert "PL-KERNEL" == caught.value.code


def declares(component: AttentionBackend, what: str) -> bool:
    """Whether the data says so, read field by field."""
    can = component.capabilities
    return {
        **{dtype: dtype in can.dtypes for dtype in FLOATING},
        "cpu": "cpu" in can.devices,
        "cuda": "cuda" in can.devices,
        "head_dim 512": 512 in can.head_dims,
        "head_dim 3": 3 in can.head_dims,
        "window": "window" in can.masks,
        "bidirectional": "bidirectional" in can.masks,
        "grouped_heads": can.grouped_heads,
        "softcap": can.softcap,
        "sinks": can.sinks,
        "unequal_value_dim": can.unequal_value_dim,
    }[what]


#: what is needed → how a layer and a request need it, and the code of a refusal
NEEDED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    **{dtype: ({}, {"dtype": dtype}, "attention.dtype") for dtype in FLOATING},
    "cpu": ({}, {"device": "cpu"}, "attention.device"),
    "cuda": ({}, {"device": "cuda:0"}, "attention.device"),
    "head_dim 512": ({"head_dim": 512, "value_dim": 512}, {}, "attention.head_dim"),
    "head_dim 3": ({"head_dim": 3, "value_dim": 3}, {}, "attention.head_dim"),
    "window": ({"window": 4}, {}, "attention.mask"),
    "bidirectional": ({"causal": False}, {}, "attention.mask"),
    "grouped_heads": ({"num_key_value_heads": 2}, {}, "attention.grouped_heads"),
    "softcap": ({"softcap": 3.0}, {}, "attention.softcap"),
    "sinks": ({"sinks": True}, {}, "attention.sinks"),
    "unequal_value_dim": ({"value_dim": 8}, {}, "attention.value_dim"),
}


@pytest.mark.parametrize("what", NEEDED)
@pytest.mark.parametrize("name", DECLARED)
def test_what_is_not_declared_is_refused_with_its_code_and_nothing_else_is(name: str, what: str) -> None:
    layer, changes, code = NEEDED[what]
    component = DECLARED[name]
    usual = {"device": "cpu" if "cpu" in component.capabilities.devices else "cuda:0", "dtype": "bfloat16"}
    need = attention_need(situation(spec(**layer), **(usual | changes)))
    codes = [reason.code for reason in unary_reasons(component, need)]
    assert ([] if declares(component, what) else [code]) == codes
