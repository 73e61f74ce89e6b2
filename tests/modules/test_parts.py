"""Norms, rotary embeddings, activations, padding and the symbolic mask against independent computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modelrig.checkpoint.activations import ACTIVATIONS
from modelrig.checkpoint.rope import RopeSpec
from modelrig.errors import GenerateError
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.norms import RMSNorm
from modelrig.modules.padding import PaddedBatch
from modelrig.modules.rotary import Rotary, apply_rotary
from modelrig.modules.slots import Visibility

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_the_float64_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype) * 3, torch.rand(37, dtype=dtype)
    norm = RMSNorm(37, 1e-5, dtype)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    norm.init_buffers(CPU)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    actual = norm(x)
    assert dtype == actual.dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}[dtype]
    assert (expected - actual.double()).abs().max().item() <= bound * expected.abs().max().item()


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    torch.manual_seed(0)
    rotary = Rotary(RopeSpec(kind="default", theta=100.0, dim=6, max_positions=64), torch.float32)
    rotary.init_buffers(CPU)
    positions = torch.tensor([[0, 5, 17], [3, 4, 60]])
    x = torch.randn(2, 4, 3, 6)
    actual = apply_rotary(x, rotary(positions))
    for b in range(2):
        for t in range(3):
            for pair in range(3):
                angle = positions[b, t].double() * 100.0 ** (-2 * pair / 6)
                first, second = x[b, :, t, pair].double(), x[b, :, t, pair + 3].double()
                torch.testing.assert_close(
                    first * angle.cos() - second * angle.sin(), actual[b, :, t, pair].double(), rtol=0, atol=2e-5
                )
                torch.testing.assert_close(
                    second * angle.cos() + first * angle.sin(), actual[b, :, t, pair + 3].double(), rtol=0, atol=2e-5
                )


def test_dynamic_rotation_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rotary = Rotary(RopeSpec(kind="dynamic", theta=100.0, dim=8, max_positions=8, factor=2.0), torch.float32)
    rotary.init_buffers(CPU)
    short, long = torch.arange(4)[None], torch.arange(20, 24)[None]
    together = rotary(torch.cat((short, long)))
    for part in range(2):
        torch.testing.assert_close(together[part][:1], rotary(short)[part])
        torch.testing.assert_close(together[part][1:], rotary(long)[part])


def test_the_planners_list_of_activations_is_the_modules() -> None:
    assert set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers_of_the_same_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACT2FN[name](x), FUNCTIONS[name](x), rtol=1e-6, atol=1e-6)


def naive_mask(visible: Visibility, batch: int) -> Tensor:
    rows = []
    for b in range(batch):
        start = 0 if visible.starts is None else int(visible.starts[b])
        rows.append(
            [
                [
                    q == k or (k >= start and (k <= q or not visible.causal) and (visible.window is None or q - k < visible.window))
                    for k in visible.key_index.tolist()
                ]
                for q in visible.query_index.tolist()
            ]
        )
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("starts", [None, [0, 4]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("past", "count"), [(0, 6), (5, 1), (5, 4)])
def test_the_dense_mask_is_the_definition(
    starts: list[int] | None, window: int | None, causal: bool, past: int, count: int
) -> None:
    visible = Visibility(
        torch.arange(past, past + count),
        torch.arange(past + count),
        None if starts is None else torch.tensor(starts),
        window,
        causal,
        past,
    )
    assert torch.equal(naive_mask(visible, 2), visible.dense().expand(2, -1, -1, -1))


def test_padding_on_any_side_is_rolled_to_the_left_and_back() -> None:
    ids = torch.tensor([[0, 0, 1, 2], [3, 4, 0, 0], [0, 5, 6, 0], [7, 8, 9, 10]])
    mask = (ids > 0).int()
    batch = PaddedBatch(ids, mask)
    assert [[0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 5, 6], [7, 8, 9, 10]] == batch.ids.tolist()
    assert [2, 2, 2, 0] == batch.padding
    assert torch.equal(ids[:, :, None].expand(-1, -1, 5), batch.restore(batch.ids[:, :, None].expand(-1, -1, 5)))


@pytest.mark.parametrize(
    "mask", [[[1, 0, 1]], [[0, 0, 0]], [[1, 1]], [[1, 2, 1]]], ids=["a hole", "nothing", "other shape", "not a mask"]
)
def test_masks_that_describe_no_padding_are_refused(mask: list[list[int]]) -> None:
    with pytest.raises(GenerateError, match="attention_mask"):
        PaddedBatch(torch.tensor([[1, 2, 3]]), mask)


def test_silu_is_torchs() -> None:
    assert FUNCTIONS["silu"] is F.silu
