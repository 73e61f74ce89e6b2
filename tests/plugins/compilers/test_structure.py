"""Blocks are alike exactly if one graph serves both."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor, nn

import modelrig
from checkpoints import write_decoder
from modelrig.components import AttentionSpec
from modelrig_plugins.compilers.structure import lift
from modelrig_plugins.quantizers.none import NoneOptions
from modelrig_plugins.quantizers.none_module import DenseLinear

SPEC = AttentionSpec(num_heads=2, num_key_value_heads=1, head_dim=4, value_dim=4, scale=0.5)


def signatures(model: modelrig.Model) -> list[str]:
    return [lift(block).signature for block in model.module.model.layers]


def test_layers_of_one_kind_are_alike_and_layers_with_a_window_are_not(llama_folder: Path, tmp_path: Path) -> None:
    assert 1 == len(set(signatures(modelrig.load(llama_folder))))
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    write_decoder(tmp_path, "Gemma3Text", sliding_window=7, layer_types=kinds)
    first, second, third = signatures(modelrig.load(tmp_path))
    assert (True, False) == (first == third, first == second)


def test_two_loads_of_a_model_are_alike_and_another_attention_is_not(llama_folder: Path) -> None:
    once, twice, other = (signatures(modelrig.load(llama_folder, attention=name))[0] for name in ("sdpa", "sdpa", "eager"))
    assert (True, False) == (once == twice, once == other)


def test_a_rebuilt_block_computes_with_the_other_weights(llama_folder: Path) -> None:
    blocks = modelrig.load(llama_folder).module.model.layers
    first, second = lift(blocks[0]), lift(blocks[1])
    rebuilt = first.rebuild(second.tensors)
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert torch.equal(blocks[1].mlp(x), rebuilt.mlp(x))
        assert not torch.equal(blocks[0].mlp(x), rebuilt.mlp(x))
    assert {SPEC.num_heads} != first.specs and len(first.specs) == 1
    assert {"modelrig.modules.decoder", "modelrig.modules.norms", "modelrig_plugins.attention.sdpa_module"} <= first.homes


class Holder:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def kernel(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # type: ignore[attr-defined]


@frozen
class Frozen:
    weight: Tensor
    factor: float = 2.0


def closure(weight: Tensor, factor: float) -> Any:
    return lambda x: x @ weight * factor


W = torch.arange(4.0).view(2, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Holder(n=1), Holder(n=2)),
        (Holder(n=1), Holder(m=1)),
        (Holder(n=1), Holder(n=True)),
        (Frozen(W), Frozen(W, 3.0)),
        (Frozen(W), Frozen(W.double())),
        (Frozen(W), Frozen(W.t())),
        (Frozen(W), Frozen(W[:1])),
        (closure(W, 1.0), closure(W, 2.0)),
        (functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu, approximate="none")),
        (F.silu, F.relu),
        (SPEC, evolve(SPEC, window=3)),
        ([W, W], [W, W.clone()]),
        ({"a": 1}, {"b": 1}),
        ((1, 2), [1, 2]),
        (lambda x: x + 1, lambda x: x + 2),
        (nn.Linear(2, 2), nn.Linear(2, 2).eval()),
    ],
)
def test_what_differs_is_told_apart(one: Any, other: Any) -> None:
    assert lift(one).signature != lift(other).signature
    assert lift(one).signature == lift(one).signature
    assert () == lift(one).opaque == lift(other).opaque


def test_closures_methods_partials_and_objects_are_rebuilt_around_other_tensors() -> None:
    holder = Holder(weight=W, again=W)
    whole = (closure(W, 2.0), holder.kernel, functools.partial(F.linear, weight=W), Frozen(W), holder)
    lifted = lift(whole)
    assert [id(W)] == [id(tensor) for tensor in lifted.tensors]
    other = W + 1
    made, kernel, part, fixed, again = lifted.rebuild([other])
    x = torch.ones(2, 2)
    assert torch.equal(x @ other * 2, made(x))
    assert torch.equal(F.linear(x, other), kernel(x))
    assert torch.equal(F.linear(x, other), part(x))
    assert fixed.weight is other and fixed.factor == 2.0
    assert again.weight is other and again.again is other and kernel.__self__ is again
    assert holder.weight is W  # type: ignore[attr-defined]


def test_what_cannot_be_taken_apart_equals_nothing() -> None:
    generator = torch.Generator()
    one, other = lift(Holder(source=generator)), lift(Holder(source=generator))
    assert ("block.source: Generator",) == one.opaque
    assert one.signature != other.signature
    listed: list[Any] = []
    listed.append(listed)
    assert lift(listed).opaque


def test_what_holds_itself_is_rebuilt_so() -> None:
    def recursive(weight: Tensor) -> Any:
        def multiply(x: Tensor) -> Tensor:
            return multiply(x.unsqueeze(0)).squeeze(0) if x.dim() == 1 else x @ weight

        return multiply

    holder = Holder(weight=W, kernel=recursive(W))
    holder.itself = holder  # type: ignore[attr-defined]
    lifted = lift(holder)
    assert () == lifted.opaque
    assert lifted.signature == lift(holder).signature
    made = lifted.rebuild([W + 1])
    assert made.itself is made
    assert torch.equal(torch.ones(2) @ (W + 1), made.kernel(torch.ones(2)))


@pytest.mark.parametrize("kernel", ["mv", "linear"])
def test_kernels_of_dense_weights_are_understood(kernel: str) -> None:
    maker = DenseLinear(NoneOptions(kernel))
    first, second = (lift(maker.make_linear(W.bfloat16() + n, None)) for n in range(2))
    assert (True, ()) == (first.signature == second.signature, first.opaque)


def test_an_object_says_itself_what_a_graph_of_it_depends_on() -> None:
    maker = DenseLinear(NoneOptions("packed"))
    first, second = (maker.make_linear(W.bfloat16(), None) for _ in range(2))
    assert lift(first).signature == lift(second).signature
    assert 1 == len(lift(first).tensors)
