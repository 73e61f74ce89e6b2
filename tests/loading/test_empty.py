"""Modules without memory for their weights, and what is as it would be with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import modelrig
from fillers import peak_bytes
from models import HUGGING_FACE, Parts, build, skeleton, transformers_models


def layout(module: nn.Module) -> list[tuple[Any, ...]]:
    """Names, shapes, dtypes and gradients; which names are one tensor."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(named)}
    return [(name, tuple(one.shape), one.dtype, one.requires_grad, one.stride(), first[id(one)]) for name, one in named]


@pytest.mark.parametrize("name", ["parts", "attention", *HUGGING_FACE])
def test_all_but_the_memory_of_parameters_is_as_usual(name: str) -> None:
    module = skeleton(name)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())
    assert layout(build(name)) == layout(module)
    assert type(module.state_dict()) is type(build(name).state_dict())


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("name", ["llama, tied", "bert", "vit", "gpt2"])
def test_the_same_is_empty_as_with_accelerate(name: str, include_buffers: bool) -> None:
    factory = transformers_models()[name]
    with modelrig.empty_weights(include_buffers):
        ours = factory()
    with accelerate.init_empty_weights(include_buffers):
        theirs = factory()
    for sort in ("named_parameters", "named_buffers"):  # with duplicates: theirs forgets ties
        lists = [[(key, one.device) for key, one in getattr(module, sort)(remove_duplicate=False)] for module in (ours, theirs)]
        assert lists[0] == lists[1]


def test_buffers_keep_their_values() -> None:
    assert torch.equal(torch.arange(4), skeleton("parts").counts)
    assert torch.equal(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), skeleton("parts").computed)


def test_buffers_can_be_empty_too() -> None:
    with modelrig.empty_weights(include_buffers=True):
        module = Parts()
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


class Marked(nn.Parameter):
    """A subclass, with something of its own."""


def test_what_a_parameter_is_and_carries_stays() -> None:
    parameter = Marked(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    parameter.shard = 7
    module = nn.Module()
    with modelrig.empty_weights():
        module.weight = parameter
    assert (Marked, 7, torch.int8, False, True) == (
        type(module.weight), module.weight.shard, module.weight.dtype, module.weight.requires_grad, module.weight.is_meta,
    )  # fmt: skip
    assert not parameter.is_meta


def test_a_tensor_that_modules_share_before_and_after_is_one() -> None:
    with modelrig.empty_weights():
        first, second, third = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        own = nn.Parameter(torch.zeros(2, 2))
        first.weight = own
        second.weight = own
        third.weight = first.weight
    assert first.weight is second.weight and first.weight is third.weight
    assert first.weight.is_meta


def test_at_most_one_parameter_exists_at_a_time() -> None:
    def make() -> Any:
        with modelrig.empty_weights():
            return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(30)])  # 120 MiB

    nn.Linear(1024, 1024)
    assert peak_bytes(make) < 16 << 20


def test_shapes_that_are_not_known_yet_stay_unknown() -> None:
    with modelrig.empty_weights():
        lazy = nn.LazyLinear(3)
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def test_afterwards_everything_has_memory_again() -> None:
    original = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), modelrig.empty_weights(), modelrig.empty_weights(include_buffers=True):
        raise ZeroDivisionError
    assert original is nn.Module.register_parameter
    assert not any(tensor.is_meta for tensor in (*nn.BatchNorm1d(2).parameters(), *nn.BatchNorm1d(2).buffers()))


def test_blocks_may_be_inside_each_other_and_inside_accelerates() -> None:
    with modelrig.empty_weights():
        with modelrig.empty_weights():
            inner = nn.Linear(2, 2)
        with accelerate.init_empty_weights():
            between = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
    assert inner.weight.is_meta and between.weight.is_meta and outer.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_another_thread_has_memory_meanwhile() -> None:
    made: list[nn.Module] = []
    with modelrig.empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta


def test_threads_may_do_so_at_once() -> None:
    made: list[bool] = []

    def make() -> None:
        for _ in range(20):
            with modelrig.empty_weights():
                made.append(nn.Linear(2, 2).weight.is_meta)
            made.append(not nn.Linear(2, 2).weight.is_meta)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [True] * 160 == made


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_other_modes_may_hold_around_it(context: Callable[[], Any], tmp_path: Path) -> None:
    with context(), modelrig.empty_weights():
        module = nn.Linear(2, 2)
    assert module.weight.is_meta and module.weight.requires_grad
