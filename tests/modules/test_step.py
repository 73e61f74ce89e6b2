"""The step contract: few operations, one graph, no dependence on host numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import modelrig
from checkpoints import write_llama

MOST_OPERATIONS = 60  # dispatcher operations per layer and token


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations_of_one_token(folder: Path, cache: str, dtype: str, attention: str) -> int:
    model = modelrig.load(folder, cache=cache, dtype=dtype, attention=attention)
    held = model.new_cache(batch=1, max_len=40)
    token = torch.tensor([[5]])
    with torch.no_grad():
        for _ in range(3):
            model.step(token, held.begin(1))
            held.commit(1)
        slots = held.begin(1)
        with CountOperations() as count:
            model.step(token, slots)
    return sum(count.operations.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding", "offloaded"])
def test_a_layer_needs_at_most_sixty_operations_a_token(tmp_path: Path, cache: str, dtype: str) -> None:
    counts = []
    for layers in (2, 5):
        folder = tmp_path / str(layers)
        write_llama(folder, num_hidden_layers=layers, attention_bias=True)
        counts.append(operations_of_one_token(folder, cache, dtype, "sdpa"))
    per_layer = (counts[1] - counts[0]) / 3
    assert per_layer <= MOST_OPERATIONS
    assert counts[0] - 2 * per_layer <= 40  # everything around the layers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, [0, 3]])
def test_one_graph_serves_64_steps_with_the_static_cache(llama_folder: Path, attention: str, padding: list[int] | None) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = modelrig.load(llama_folder, cache="static", attention=attention)
    batch = 1 if padding is None else 2
    counter = CompileCounter()
    compiled = torch.compile(model.step, fullgraph=True, backend=counter)
    caches = [model.new_cache(batch=batch, max_len=100, padding=padding) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 97, (batch, 20), generator=generator)
    with torch.no_grad():
        for cache in caches:
            model.step(prompt, cache.begin(20))
            cache.commit(20)
        for _ in range(64):
            token = torch.randint(0, 97, (batch, 1), generator=generator)
            eager, traced = (step(token, cache.begin(1)) for step, cache in zip((model.step, compiled), caches, strict=True))
            for cache in caches:
                cache.commit(1)
            torch.testing.assert_close(eager, traced, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_step_with_its_last_position_only_gives_the_last_logits(llama_folder: Path) -> None:
    model = modelrig.load(llama_folder)
    ids = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        whole = model.step(ids, model.new_cache(batch=2, max_len=9).begin(9))
        last = model.step(ids, model.new_cache(batch=2, max_len=9).begin(9), True)
    torch.testing.assert_close(whole[:, -1:], last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_a_step_never_waits_for_the_device(llama_folder: Path, cache: str) -> None:
    model = modelrig.load(llama_folder, cache=cache, device_map="cuda:0")
    held = model.new_cache(max_len=40)
    token = torch.tensor([[5]], device="cuda:0")
    with torch.no_grad():
        model.step(token, held.begin(1))
        held.commit(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model.step(token, held.begin(1))
                held.commit(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
