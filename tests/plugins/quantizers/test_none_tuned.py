"""Kernels as measured: what the file says serves each shape and number of rows, and only that; else the rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import modelrig
from checkpoints import write_llama
from modelrig.errors import PlanError
from modelrig.planning.environment import read_environment
from modelrig.planning.ledger import COPIES
from modelrig.planning.measured import Measured, keep_measured, kernels_file, machine_of
from modelrig.planning.needs import QuantizerNeed
from modelrig.planning.pipeline import make_plan
from modelrig_plugins.quantizers import none_tuning
from modelrig_plugins.quantizers.none import CLASSES, ID, NoneOptions, TunedOptions, choose, label
from modelrig_plugins.quantizers.none_module import IN_PLACE, DenseLinear, by_rows


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path, dtype="float32")
    return tmp_path


def shapes_of(folder: Path) -> list[tuple[int, int]]:
    facts = make_plan(folder).facts
    return sorted({one.shape for one in facts.parameters if one.role in ("linear", "head")})  # type: ignore[arg-type]


def keep(measured: Measured) -> None:
    keep_measured(machine_of(read_environment()), ID, measured)


def tuned(kernel: str = "tuned", **request: Any) -> dict[str, Any]:
    return {"quantizer": {"name": "none", "kernel": kernel}, **request}


# ------------------------------------------------------------------------------------------------ the table


def test_the_fastest_is_chosen_unless_a_plainer_one_is_hardly_slower() -> None:
    names = ("linear", "mv", "turned", "packed")
    assert "mv" == choose({"linear": 2.0, "mv": 1.0, "turned": 1.5}, names)
    assert "linear" == choose({"linear": 1.02, "mv": 1.0}, names)
    assert "packed" == choose({"linear": 1.5, "packed": 1.0}, names)
    assert "linear" == choose({"linear": 1.5, "packed": 1.0}, names[:3])
    assert choose({"unheard of": 1.0}, names) is None


def test_each_shape_and_number_of_rows_gets_what_was_fastest_for_it(folder: Path) -> None:
    first, second, *_ = shapes_of(folder)
    keep(
        {
            label(first, "float32"): {
                1: {"linear": 2.0, "mv": 1.0},
                2: {"linear": 2.0, "turned": 1.0, "packed": 0.1},
                16: {"linear": 2.0, "onednn": 1.0},
                512: {"linear": 1.0, "turned": 2.0},
            },
            label(second, "float32"): {1: {"linear": 1.0, "mv": 2.0}},
            label(second, "bfloat16"): {1: {"linear": 2.0, "mv": 1.0}},
            "1 x 1 float32": {1: {"mv": 1.0}},
        }
    )
    options = make_plan(folder, **tuned()).choices["quantizers"].options
    assert options.table == {
        label(first): ("mv", *["turned"] * 3, *["onednn"] * 5, "linear"),
        label(second): ("linear",) * CLASSES,
    }
    packed = make_plan(folder, **tuned("tuned_packed")).choices["quantizers"].options
    assert ("mv", "packed", "packed", "packed", "onednn") == packed.table[label(first)][:5]


def test_what_was_measured_later_of_other_models_changes_no_plan(folder: Path) -> None:
    first = shapes_of(folder)[0]
    keep({label(first, "float32"): {1: {"mv": 1.0}}})
    before = make_plan(folder, **tuned()).hash
    keep({"31 x 77 float32": {1: {"linear": 1.0}}})
    assert before == make_plan(folder, **tuned()).hash
    keep({label(first, "float32"): {1: {"mv": 1.0, "linear": 0.5}}})
    assert before != make_plan(folder, **tuned()).hash


@pytest.mark.parametrize("kernel", ["tuned", "tuned_packed"])
@pytest.mark.parametrize(
    ("file", "told"),
    [
        (None, "nothing was measured yet"),
        ("{", "not JSON"),
        ('{"version": 1, "machines": {"another": {}}}', "nothing of this machine"),
        ({"8 x 8 float32": {1: {"linear": 1.0}}}, "none was measured in float32"),
        ({"first float32": {1: {"../../evil": 1.0}}}, "none was measured in float32"),
        ({"first float32": {2: {"linear": 1.0}}}, "none was measured in float32"),
    ],
)
def test_without_measurements_the_reason_names_the_command_that_makes_them(folder: Path, kernel: str, file: Any, told: str) -> None:
    if isinstance(file, str):
        kernels_file().parent.mkdir()
        kernels_file().write_text(file)
    elif file is not None:
        keep({name.replace("first", label(shapes_of(folder)[0])): rows for name, rows in file.items()})
    with pytest.raises(PlanError, match=told) as caught:
        make_plan(folder, **tuned(kernel))
    assert "PN-REFUSED" == caught.value.code
    (reason,) = caught.value.refused["quantizers"]["none"]
    assert "quantizer.kernel" == reason.code
    assert "modelrig bench --tune" in reason.text


def test_a_broken_file_is_nothing_to_those_who_do_not_ask_for_it(folder: Path) -> None:
    kernels_file().parent.mkdir()
    kernels_file().write_text("{")
    assert "mv" == make_plan(folder).choices["quantizers"].options.kernel


def test_only_packed_kernels_put_copies_into_the_ledger(folder: Path) -> None:
    first = shapes_of(folder)[0]
    times = {"linear": 1.0, "packed": 0.1}
    keep({label(shape, "float32"): {1: times if shape == first else {"linear": 1.0}} for shape in shapes_of(folder)})
    assert not [line for line in make_plan(folder, **tuned()).ledger if line.what == COPIES]
    plan = make_plan(folder, **tuned("tuned_packed"))
    expected = sum(4 * shape[0] * shape[1] for shape in (one.shape for one in plan.facts.parameters) if shape == first)
    roles = {one.role for one in plan.facts.parameters if one.shape == first}
    assert roles == {"linear"}
    assert expected == plan.ledger.bytes_of(COPIES, "cpu", "run")


# ------------------------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "turned", "onednn"])
def test_every_kernel_is_the_product_for_any_number_of_rows(name: str, dtype: torch.dtype, bias: bool) -> None:
    if dtype == torch.bfloat16 and name == "onednn" and "avx512bw" not in read_environment().cpu_flags:
        pytest.skip("oneDNN has no bfloat16 here")
    weight, offset = torch.randn(35, 48).to(dtype), torch.randn(35).to(dtype) if bias else None
    multiply = by_rows(weight, offset, {name: IN_PLACE[name](weight, offset)}, (name,) * CLASSES)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for rows in (0, 1, 2, 3, 7, 16, 31, 33, 600, 2000):
        x = torch.randn(rows, 48).to(dtype)
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        y = multiply(x)
        assert y.shape == exact.shape and y.is_contiguous()
        assert not rows or (exact - y.double()).abs().max().item() <= bound * exact.abs().max().item()
        assert name == multiply.name_at(max(1, rows))  # type: ignore[attr-defined]
    x = torch.randn(48).to(dtype)
    torch.testing.assert_close(multiply(x), multiply(x[None])[0])


@pytest.mark.parametrize(
    ("dtype", "flags", "expected"),
    [
        ("bfloat16", {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}, ["mv", "turned", "turned", "turned", "linear"]),
        ("bfloat16", {"avx512f", "avx512_bf16"}, ["mv", "linear", "linear", "linear", "linear"]),
        ("float32", {"avx512f"}, ["mv", "linear", "onednn", "onednn", "linear"]),
        ("float32", {"avx2"}, ["mv", "linear", "linear", "linear", "linear"]),
        ("float16", {"avx512f", "amx_bf16"}, ["mv", "linear", "linear", "linear", "linear"]),
        ("float64", {"avx512f", "amx_bf16"}, ["mv", "linear", "linear", "linear", "linear"]),
    ],
)
def test_steps_of_a_few_rows_have_a_rule(dtype: str, flags: set[str], expected: list[str]) -> None:
    maker = DenseLinear(NoneOptions("mv"))
    maker.flags = frozenset(flags)
    kernel = maker.make_linear(torch.ones(3, 5, dtype=getattr(torch, dtype)), None)
    assert expected == [kernel.name_at(rows) for rows in (1, 3, 4, 31, 32)]  # type: ignore[attr-defined]


def test_a_model_by_measured_kernels_computes_the_same_and_says_which_serve(folder: Path) -> None:
    shapes = shapes_of(folder)
    rows = {1: {"mv": 1.0}, 2: {"turned": 1.0}, 8: {"packed": 1.0, "linear": 2.0}, 64: {"onednn": 1.0}}
    keep({label(shape, "float32"): rows if shape != shapes[0] else {1: {"linear": 1.0}} for shape in shapes})
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(0))
    with modelrig.load(folder, set={"quantizer.kernel": "linear"}) as plain:
        assert {"linear"} == plain.kernels().keys() == plain.kernels(rows=99).keys()
        expected, tokens = plain(ids), plain.generate([3, 1, 4, 1, 5], max_new_tokens=60).tokens
        total = plain.kernels()["linear"]
    with modelrig.load(folder, **tuned()) as model:
        torch.testing.assert_close(expected, model(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected[:, :3], model(ids[:, :3]), rtol=1e-4, atol=1e-4)
        assert tokens == model.generate([3, 1, 4, 1, 5], max_new_tokens=60).tokens
        for count, name in ((1, "mv"), (3, "turned"), (9, "linear"), (100, "onednn")):
            served = model.kernels(rows=count)
            assert total == sum(served.values()) and {name, "linear"} == served.keys()
    with modelrig.load(folder, **tuned("tuned_packed")) as model:
        assert tokens == model.generate([3, 1, 4, 1, 5], max_new_tokens=60).tokens
        assert "packed" not in model.kernels(rows=9)  # no step had so many rows yet
        for _ in range(20):
            torch.testing.assert_close(expected[:, :5], model(ids[:, :5]), rtol=1e-4, atol=1e-4)
        assert {"packed", "linear"} == model.kernels(rows=9).keys()
        assert {"mv", "linear"} == model.kernels().keys()


def test_a_weight_that_was_not_measured_is_multiplied_by_the_rule() -> None:
    maker = DenseLinear(TunedOptions("tuned", {"4 x 8": ("linear",) * CLASSES, "2 x 2": ("mv",) * CLASSES}))
    other = maker.make_linear(torch.ones(6, 8), None)
    assert maker.vector
    assert "mv" == other.name_at(1)  # type: ignore[attr-defined]
    assert "linear" == maker.make_linear(torch.ones(4, 8), None).name_at(1)  # type: ignore[attr-defined]
    assert torch.full((6,), 8.0).equal(other(torch.ones(8)))


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_measuring_finds_times_for_every_shape_and_number_of_rows(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(none_tuning, "SECONDS", 0.01)
    monkeypatch.setattr(none_tuning, "POOL_BYTES", 1 << 16)
    told: list[str] = []
    found = DenseLinear.tune([(64, 48), (129, 1)], dtype, told.append)
    assert {label((64, 48), dtype), label((129, 1), dtype)} == found.keys()
    for rows in found.values():
        assert none_tuning.ROWS == tuple(rows)
        assert {"linear", "mv", "turned"} <= rows[1].keys() and "mv" not in rows[2]
        assert all(0 < seconds < 1 for times in rows.values() for seconds in times.values())
    assert 2 * len(none_tuning.ROWS) == len(told)
    keep(found)
    need = QuantizerNeed(
        device="cpu", dtype=dtype, scheme="none", shapes=frozenset(), multiplied=frozenset({(64, 48)}),
        machine=machine_of(read_environment()),
    )  # fmt: skip
    from modelrig_plugins.quantizers.none import NonePlanner

    assert not [*NonePlanner.check(need, NoneOptions("tuned"))]
    settled = NonePlanner.settle(need, NoneOptions("tuned"))
    assert isinstance(settled, TunedOptions) and {label((64, 48))} == settled.table.keys()


def test_a_weight_for_which_there_is_no_room_is_left_out() -> None:
    told: list[str] = []
    assert DenseLinear.tune([(1 << 24, 1 << 20)], "float32", told.append) == {}
    assert 1 == len(told) and "left out" in told[0]
