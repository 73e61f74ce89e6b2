"""The symbolic mask as flash-attn's arguments.

Where a GPU and the package are, its kernels run; everywhere, a float64 implementation of what its documentation says its functions
compute, which also checks what they demand of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from attrs import evolve
from torch import Tensor

import modelrig
from attention_reference import inputs, reference, ring, visibility
from checkpoints import write_bert, write_decoder
from modelrig.components import FLOATING, NOTHING_TO_PLAN, AttentionBackend, AttentionCapabilities, AttentionSpec
from modelrig.errors import PluginError
from modelrig.hookspecs import hookimpl
from modelrig.modules.slots import Visibility
from modelrig.planning.needs import attention_need
from modelrig.planning.probes import Finding
from modelrig.registry import temporary
from modelrig_plugins.attention import modelrig_attention
from modelrig_plugins.attention.flash_attention_2 import FlashAttention2Planner
from modelrig_plugins.attention.flash_attention_2_module import FlashAttention2, Functions, load_functions
from rigs import gpu, situation, spec

# ------------------------------------------------------------------------------------------------ what the package documents


def one_row(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float
) -> Tensor:
    """q [t, h, d], k and v [s, g, d] → [t, h, d]. Masks are aligned to the last query and the last key; a query that sees nothing
    gives zeros."""
    t, s = q.shape[0], k.shape[0]
    left, right = window_size
    assert window_size == (-1, -1) or left >= 0 or right >= 0
    out = torch.zeros_like(q, dtype=torch.float64)
    for i in range(t):
        at = i + s - t
        first = 0 if left < 0 else max(0, at - left)
        last = s if right < 0 else min(s, at + right + 1)
        last = min(last, at + 1) if causal else last
        if first >= last:
            continue
        for head in range(q.shape[1]):
            g = head // (q.shape[1] // k.shape[1])
            scores = k[first:last, g].double() @ q[i, head].double() * softmax_scale
            scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
            out[i, head] = torch.softmax(scores, 0) @ v[first:last, g].double()
    return out.to(q.dtype)


def demand(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert k.shape == v.shape
    assert q.shape[-1] == k.shape[-1] <= 256
    assert q.shape[-2] % k.shape[-2] == 0
    assert q.dtype == k.dtype == v.dtype
    assert 1 == q.stride(-1) == k.stride(-1) == v.stride(-1) or q.shape[-1] == 1


def documented_plain(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    demand(q, k, v)
    assert q.shape[0] == k.shape[0]
    return torch.stack([one_row(*row, **how) for row in zip(q, k, v, strict=True)])


def documented_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, **how: Any
) -> Tensor:
    demand(q, k, v)
    assert 3 == q.dim() == k.dim()
    out = torch.full_like(q, float("nan"))
    for ends, longest, total in ((cu_seqlens_q, max_seqlen_q, q.shape[0]), (cu_seqlens_k, max_seqlen_k, k.shape[0])):
        assert torch.int32 == ends.dtype
        assert (0, total) == (int(ends[0]), int(ends[-1]))
        assert 0 <= int(ends.diff().min()) <= int(ends.diff().max()) <= longest
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        out[a:b] = one_row(q[a:b], k[c:d], v[c:d], **how)
    return out


def documented_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    **how: Any,
) -> Tensor:
    demand(q, k_cache, v_cache)
    rows = q.shape[0]
    for numbers in (cache_seqlens, cache_leftpad):
        assert numbers is None or ((rows,), torch.int32, True) == (tuple(numbers.shape), numbers.dtype, numbers.is_contiguous())
    # Without lengths its kernel takes the last block of keys for whole, and would read beyond it.
    assert cache_leftpad is None or cache_seqlens is not None
    out = []
    for row in range(rows):
        end = k_cache.shape[1] if cache_seqlens is None else int(cache_seqlens[row])
        start = 0 if cache_leftpad is None else int(cache_leftpad[row])
        assert 0 <= start <= end <= k_cache.shape[1]
        out.append(one_row(q[row], k_cache[row, start:end], v_cache[row, start:end], **how))
    return torch.stack(out)


(OURS,) = (one for one in modelrig_attention() if one.name == "flash_attention_2")
DOCUMENTED = Functions(documented_plain, documented_varlen, documented_with_kvcache)

# ------------------------------------------------------------------------------------------------ one backend, twice


class Backend(NamedTuple):
    kernel: FlashAttention2
    device: str
    dtype: torch.dtype
    bound: float
    calls: list[str]


def logged(functions: Functions, calls: list[str]) -> Functions:
    def wrap(name: str, function: Any) -> Any:
        return lambda *args, **how: (calls.append(name), function(*args, **how))[1]

    return Functions(*(wrap(name, function) for name, function in zip(Functions._fields, functions, strict=True)))


def is_there() -> bool:
    try:
        version("flash-attn")
    except PackageNotFoundError:
        return False
    return torch.cuda.is_available()


@pytest.fixture(params=["documented", pytest.param("kernels", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    calls: list[str] = []
    if request.param == "documented":
        return Backend(FlashAttention2(None, logged(DOCUMENTED, calls)), "cpu", torch.float32, 2e-6, calls)
    if not is_there():
        pytest.skip("needs a GPU and the package flash-attn")
    return Backend(FlashAttention2(None, logged(load_functions(), calls)), "cuda", torch.bfloat16, 2e-2, calls)


def check(backend: Backend, layer: AttentionSpec, visible: Visibility, extra: int = 0) -> None:
    """Equal to the definition, except where a row is padding: what that gives is nobody's business, but it is finite."""
    q, k, v = (x.to(backend.device, backend.dtype) for x in inputs(layer, visible))
    here = Visibility(*(x.to(backend.device) if isinstance(x, Tensor) else x for x in visible))
    actual = backend.kernel.attend(q, k, v, backend.kernel.prepare(layer, here), layer).cpu().double()
    expected = reference(q, k, v, visible, layer)
    assert expected.shape == actual.shape
    assert bool(actual.isfinite().all())
    scale = v[:, :, (visible.key_index <= visible.query_index[-1]).to(v.device)].abs().max().item()
    for row in range(len(q)):
        first = 0 if visible.starts is None else max(0, int(visible.starts[row] - visible.query_index[0]))
        difference = (expected - actual)[row, first:].abs()
        assert not difference.numel() or difference.max().item() <= backend.bound * scale


LAYERS = [(6, 2, 16, 16), (3, 3, 24, 24), (4, 1, 64, 64), (4, 2, 8, 16), (4, 2, 16, 8), (4, 2, 10, 10)]


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize(("past", "count"), [(0, 9), (0, 1), (9, 1), (9, 5)])
@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 3.0), (4, None), (1, 3.0), (100, None)])
def test_prompts_and_what_follows_them(
    backend: Backend,
    dims: tuple[int, int, int, int],
    past: int,
    count: int,
    starts: list[int] | None,
    window: int | None,
    softcap: float | None,
) -> None:
    starts = None if starts is None else [min(start, past + count - 1) for start in starts]
    layer = AttentionSpec(*dims, 0.3, window=window, softcap=softcap)
    check(backend, layer, visibility(past, count, starts, window))
    assert ["plain" if past == 0 and starts is None else "with_kvcache"] == backend.calls


@pytest.mark.parametrize("starts", [[0, 6, 2], [8, 8, 0]])
def test_a_first_chunk_that_is_all_padding_stays_finite(backend: Backend, starts: list[int]) -> None:
    layer = AttentionSpec(4, 2, 16, 16, 0.3)
    for past, count in ((0, 4), (4, 4), (8, 3)):
        check(backend, layer, visibility(past, count, starts))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("starts", "function"), [(None, "plain"), ([0, 6, 2], "varlen"), ([0, 0, 0], "varlen")])
def test_encoders(backend: Backend, starts: list[int] | None, function: str, window: int | None) -> None:
    layer = AttentionSpec(4, 2, 16, 16, 0.3, causal=False, window=window)
    check(backend, layer, visibility(0, 9, starts, window, causal=False))
    assert [function] == backend.calls


@pytest.mark.parametrize("starts", [None, [0, 6, 2], [0, 30, 33]])
@pytest.mark.parametrize(("past", "count"), [(0, 5), (3, 4), (20, 1), (30, 4), (33, 3)])
def test_a_ring_in_whatever_order_its_tokens_lie(backend: Backend, starts: list[int] | None, past: int, count: int) -> None:
    window, size = 6, 11
    starts = None if starts is None else [min(start, past + count - 1) for start in starts]
    check(backend, AttentionSpec(4, 2, 16, 16, 0.3, window=window), ring(past, count, size, window, starts))
    assert ["with_kvcache"] == backend.calls


@pytest.mark.parametrize("starts", [None, [0, 6, 2]])
@pytest.mark.parametrize("window", [None, 4])
def test_a_static_buffer_much_longer_than_what_it_holds(backend: Backend, starts: list[int] | None, window: int | None) -> None:
    """As it is lowered where host numbers are not to be used: every slot of the buffer is given, most of them empty."""
    for past, count in ((0, 9), (9, 1), (10, 4)):
        visible = visibility(past, count, starts, window)._replace(past=None, key_index=torch.arange(200))
        check(backend, AttentionSpec(4, 2, 16, 16, 0.3, window=window), visible)


def test_stale_slots_are_never_read(backend: Backend) -> None:
    layer, visible = AttentionSpec(4, 2, 16, 16, 0.3), visibility(9, 2, [0, 3, 1])._replace(past=None, key_index=torch.arange(64))
    q, k, v = (x.to(backend.device, backend.dtype) for x in inputs(layer, visible))
    k[:, :, 11:], v[:, :, 11:] = float("nan"), float("nan")
    here = Visibility(*(x.to(backend.device) if isinstance(x, Tensor) else x for x in visible))
    assert bool(backend.kernel.attend(q, k, v, backend.kernel.prepare(layer, here), layer).isfinite().all())


def test_chunks_of_a_prompt_give_what_the_prompt_gives(backend: Backend) -> None:
    layer = AttentionSpec(4, 2, 16, 16, 0.3)
    q, k, v = (x.to(backend.device, backend.dtype) for x in inputs(layer, visibility(0, 12)))

    def attend(past: int, count: int) -> Tensor:
        visible = visibility(past, count)
        here = visible._replace(query_index=visible.query_index.to(backend.device), key_index=visible.key_index.to(backend.device))
        end = past + count
        return backend.kernel.attend(q[:, :, past:end], k[:, :, :end], v[:, :, :end], backend.kernel.prepare(layer, here), layer)

    parts = torch.cat([attend(past, count) for past, count in ((0, 5), (5, 1), (6, 6))], dim=1)
    torch.testing.assert_close(attend(0, 12), parts, rtol=backend.bound, atol=backend.bound)


def test_a_cache_that_holds_a_token_twice_is_refused(backend: Backend) -> None:
    visible = visibility(0, 4)._replace(seen_until=torch.full((4,), 9))
    with pytest.raises(PluginError, match="cannot hide keys from single queries"):
        backend.kernel.prepare(AttentionSpec(4, 2, 16, 16, 0.3), visible)
    assert "uniform" in OURS.needs["caches"]  # so that the plan refuses it before


# ------------------------------------------------------------------------------------------------ whole models


class Documented(FlashAttention2):
    """The backend over the documented semantics, as a component that runs on CPU."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options, DOCUMENTED)


class Plugin:
    MODELRIG_API = "1.0"

    @hookimpl
    def modelrig_attention(self) -> list[AttentionBackend]:
        can: AttentionCapabilities = evolve(OURS.capabilities, devices={"cpu"}, dtypes=FLOATING)
        given = {"implementation": f"{__name__}:Documented", "planner": NOTHING_TO_PLAN, "requires": (), "capabilities": can}
        return [evolve(OURS, name="documented", **given)]


@pytest.fixture
def documented() -> Iterator[str]:
    """The name of a component."""
    with temporary(Plugin(), "local"):
        yield "documented"


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_models_generate_what_they_do_with_eager(tmp_path: Path, documented: str, family: str, cache: str) -> None:
    window = {} if family == "Llama" else {"sliding_window": 6}
    heads = {"head_dim": 8} if family == "Gemma2" else {}
    write_decoder(tmp_path, family, num_hidden_layers=2, **window, **heads)
    prompts = [list(range(5, 19)), [7, 8, 9], list(range(40, 49))]
    found = []
    for attention in ("eager", documented):
        options = {"cache": {"name": cache, "headroom": 3}} if cache == "sliding" else {"cache": cache}
        with modelrig.load(tmp_path, attention=attention, dtype="float32", **options) as model:
            together = model.generate(prompts, max_new_tokens=12, ignore_eos=True)
            alone = [model.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]
            held = model.new_cache(batch=1, max_len=40)
            chunks = [model(torch.tensor([part]), cache=held) for part in (prompts[0][:6], prompts[0][6:7], prompts[0][7:])]
            found.append(([one.tokens for one in (*together, *alone)], torch.cat(chunks, dim=1)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


def test_padded_encoders_give_what_they_do_with_eager(tmp_path: Path, documented: str) -> None:
    write_bert(tmp_path)
    ids = torch.arange(2 * 7).view(2, 7)
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    found = []
    for attention in ("eager", documented):
        with modelrig.load(tmp_path, attention=attention, dtype="float32") as model:
            found.append(model(ids, attention_mask=mask)[mask.bool()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the plan


def need(**changes: Any) -> Any:
    at = situation(
        changes.pop("layer", spec()), device="cuda:0", dtype="bfloat16", gpus=(changes.pop("gpu", gpu()),), driver="580.1"
    )
    return evolve(attention_need(at), **changes)


@pytest.mark.parametrize(("capability", "codes"), [((7, 5), ["attention.capability"]), ((8, 0), []), ((9, 0), []), (None, [])])
def test_gpus_before_ampere_are_refused(capability: tuple[int, int] | None, codes: list[str]) -> None:
    reasons = list(FlashAttention2Planner.check(need(gpu=gpu(capability=capability)), None))
    assert codes == [reason.code for reason in reasons]
    assert all("needs compute capability 8.0; H200 has 7.5" == reason.text for reason in reasons)


def test_what_a_trial_found_names_versions_and_cause() -> None:
    found = {"error": "ImportError: undefined symbol: _ZN3c105Error", "versions": {"torch": "2.13.0", "flash-attn": "2.8.3"}}
    asked = []
    failing = need(probe=lambda probe: (asked.append(probe), Finding(found))[1])
    (reason,) = FlashAttention2Planner.check(failing, None)
    assert "attention.probe" == reason.code
    assert "flash-attn 2.8.3 with torch 2.13.0 cannot be used on H200: ImportError: undefined symbol: _ZN3c105Error" == reason.text
    assert "pip install flash-attn --no-build-isolation" == reason.hint
    assert (("H200", "580.1"), ("torch", "flash-attn")) == (asked[0].machine, asked[0].packages)
    (crashed,) = FlashAttention2Planner.check(need(probe=lambda probe: Finding(None, "a probe ended with signal 11")), None)
    assert "flash-attn cannot be used on H200: a probe ended with signal 11" == crashed.text
    works = need(probe=lambda probe: Finding({"error": None, "versions": found["versions"]}))
    assert [] == list(FlashAttention2Planner.check(works, None))
    assert "flash-attn 2.8.3 with torch 2.13.0 was tried on H200" in next(iter(FlashAttention2Planner.notes(works, None)))
    assert "unverified" in next(iter(FlashAttention2Planner.notes(need(), None)))


def test_wider_values_than_its_kernels_know_are_refused() -> None:
    reasons = list(FlashAttention2Planner.check(need(layer=spec(head_dim=128, value_dim=512)), None))
    assert ["attention.value_dim"] == [reason.code for reason in reasons]


@pytest.mark.skipif(is_there(), reason="the package is here")
def test_without_the_package_it_cannot_be_loaded_and_says_why() -> None:
    with pytest.raises(PluginError, match=r"flash-attn .* cannot be imported beside torch") as caught:
        FlashAttention2()
    assert ("PL-IMPORT", "pip install flash-attn --no-build-isolation") == (caught.value.code, caught.value.hint)
