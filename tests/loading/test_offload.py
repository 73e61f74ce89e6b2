"""Weights that are brought when they are needed: the same results as from memory, bit for bit, in the memory of two units."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelrig
from checkpoints import write_llama
from modelrig.checkpoint.mapping import Split
from modelrig.errors import LoadError
from modelrig.loading import filling, offload, pieces, transport
from streamed import NET_IDS, WIDE, WIDTH, Block, Boom, Net, Wide, nothing, raising, saved, streamed, streamer_of

LAYERS = 5
IDS = [[5, 17, 80, 3, 44], [1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    write_llama(folder, num_hidden_layers=LAYERS, max_shard_size="120KB")
    return folder


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    write_llama(folder, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    return folder


def blocks(*numbers: int) -> list[str]:
    return [f"model.layers.{number}" for number in numbers]


ON_DISK = {
    "everything": [],
    "odd blocks": blocks(1, 3),
    "even blocks": blocks(0, 2, 4),
    "one block": blocks(2),
    "two blocks": blocks(1, 2),
    "three of the last": blocks(2, 3, 4),
    "embeddings and head": ["model.embed_tokens", "lm_head"],
    "no block": ["model.norm"],
}


def logits(model: modelrig.Model) -> list[torch.Tensor]:
    """Of two forwards, because the order of units is learned in the first, and of a few steps with a cache."""
    cache = model.new_cache(batch=2, max_len=16)
    steps = [model(torch.tensor(IDS), cache=cache), *(model(torch.tensor([[7], [9]]), cache=cache) for _ in range(3))]
    return [model(IDS), model(IDS), *steps]


@pytest.mark.parametrize("way", ["kept", "dropped", "mixed", "cast", "on_network", "around", "cast in tiny pieces"])
@pytest.mark.parametrize("which", ON_DISK)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_rig_computes_the_same_from_the_disk(
    llama: Path, tied_llama: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tied: bool, which: str, way: str
) -> None:
    if way in ("dropped", "mixed", "on_network", "around"):
        request.getfixturevalue(way)
    if way == "cast in tiny pieces":
        monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
        monkeypatch.setattr(filling, "PIECE_BYTES", 1000)
    folder, dtype = tied_llama if tied else llama, "bfloat16" if "cast" in way else "float32"
    names = ON_DISK[which]
    expected = logits(modelrig.load(folder, dtype=dtype))
    device_map = "disk" if which == "everything" else {"": "cpu"} | dict.fromkeys(names, "disk")
    with modelrig.load(folder, dtype=dtype, device_map=device_map) as model:
        actual = logits(model)
        assert way == "mixed" or (way in ("kept", "dropped")) == (model._streamer.slot_bytes == 0)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


def test_views_and_slots_serve_side_by_side(tmp_path: Path) -> None:
    """Of a block some tensors have the dtype that computes, and others have not."""
    from safetensors.torch import load_file

    write_llama(tmp_path, num_hidden_layers=LAYERS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if "mlp" in name}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = logits(modelrig.load(tmp_path, dtype="float32"))
    with modelrig.load(tmp_path, dtype="float32", device_map="disk") as model:
        assert 0 < model._streamer.slot_bytes
        assert any(state.paged and state.is_slotted for state in model._streamer._states)
        assert all(torch.equal(one, other) for one, other in zip(expected, logits(model), strict=True))


# ------------------------------------------------------------------------------------------------ any module


@pytest.mark.parametrize(
    "device_map",
    [
        "disk",
        {"": "disk", "stack.scale": "cpu"},
        {"": "cpu", "stack.blocks.1": "disk", "stack.blocks.3": "disk"},
        {"": "cpu", "stack.scale": "disk", "stack.blocks.0": "disk", "stack.blocks.4": "disk", "stack.blocks.2": "disk"},
        {"": "cpu", "embed": "disk", "head": "disk"},
    ],
)
@torch.no_grad()
def test_a_module_computes_the_same_from_the_disk(tmp_path: Path, net: Net, way: str, device_map: Any) -> None:
    module = streamed(tmp_path, device_map=device_map)
    for _ in range(3):
        assert torch.equal(net(NET_IDS), module(NET_IDS))
    assert (way in ("on_network", "around")) <= (streamer_of(module).slot_bytes > 0) <= (way not in ("kept", "dropped"))


@torch.no_grad()
def test_modules_without_blocks_are_streamed_one_by_one(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path, no_split_module_classes=())
    assert len(streamer_of(module)._states) > 12
    for _ in range(2):
        assert torch.equal(net(NET_IDS), module(NET_IDS))


@torch.no_grad()
def test_cast_weights_are_streamed_as_they_would_be_loaded(tmp_path: Path, net: Net) -> None:
    module = streamed(tmp_path, dtype="bfloat16")
    expected = net.to(torch.bfloat16)(NET_IDS)
    assert torch.equal(expected, module(NET_IDS)) and torch.equal(expected, module(NET_IDS))


@torch.no_grad()
def test_the_order_of_blocks_may_change_and_one_may_be_called_twice(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    shuffled = random.Random(0)
    for _ in range(8):
        order = [shuffled.randrange(5) for _ in range(7)]
        net.stack.order = module.stack.order = order
        assert torch.equal(net(NET_IDS), module(NET_IDS))
    net.stack.order = module.stack.order = [2, 2, 2, 0, 0]
    assert torch.equal(net(NET_IDS), module(NET_IDS))


@torch.no_grad()
def test_a_part_may_be_called_by_itself(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    x = torch.randn(2, WIDTH)
    for number in (3, 0, 3, 4):
        assert torch.equal(net.stack.blocks[number](x), module.stack.blocks[number](x))


@torch.no_grad()
def test_it_makes_no_difference_whether_it_trains(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    assert not any(part.training for part in module.modules())
    module.train()
    assert torch.equal(net(NET_IDS), module(NET_IDS))


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["inside", "before", "after"])
@torch.no_grad()
def test_what_a_block_raises_leaves_everything_usable(
    tmp_path: Path, net: Net, way: str, where: str, error: type[BaseException]
) -> None:
    module = streamed(tmp_path)
    for number in (1, 2, 4, 2):
        block = module.stack.blocks[number]
        if where == "inside":
            block.inside = raising(error)
        else:
            hook = (block.register_forward_pre_hook if where == "before" else block.register_forward_hook)(raising(error))
        with pytest.raises(error):
            module(NET_IDS)
        assert not any(state.users for state in streamer_of(module)._states)
        if where == "inside":
            block.inside = nothing
        else:
            hook.remove()
        assert torch.equal(net(NET_IDS), module(NET_IDS))


@torch.no_grad()
def test_hooks_see_the_weights(tmp_path: Path, net: Net, way: str) -> None:
    """As those of the older weight_norm, which put a weight together before each forward."""
    module = streamed(tmp_path)
    seen: list[torch.Tensor] = []
    module.stack.blocks[2].register_forward_pre_hook(lambda part, args: seen.append(part.up.weight.clone()))
    module.stack.blocks[2].register_forward_hook(lambda part, args, out: seen.append(part.down.weight.clone()))
    module(NET_IDS)
    assert torch.equal(net.stack.blocks[2].up.weight, seen[0])
    assert torch.equal(net.stack.blocks[2].down.weight, seen[1])


def test_between_calls_nobody_gets_another_units_weights(tmp_path: Path, net: Net, in_slots: None) -> None:
    module = streamed(tmp_path)
    module(NET_IDS)
    assert all(parameter.is_meta for parameter in module.stack.blocks.parameters())
    assert list(net.state_dict()) == list(module.state_dict())
    assert [tuple(one.shape) for one in net.parameters()] == [tuple(one.shape) for one in module.parameters()]


@torch.no_grad()
def test_threads_compute_at_once(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    inputs = [torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [net(ids) for ids in inputs]
    wrong: list[Any] = []

    def compute(number: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                try:
                    if not torch.equal(expected[number], module(inputs[number])):
                        wrong.append(number)
                except BaseException as error:
                    wrong.append(error)

    run(*[lambda number=number: compute(number) for number in range(3)])
    assert [] == wrong


def run(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it waits for ever"


@torch.no_grad()
def test_a_thread_that_fails_does_not_stop_another(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    expected = net(NET_IDS)
    good: list[bool] = []
    bad: list[BaseException] = []
    failing = threading.local()
    for block in module.stack.blocks:
        block.inside = lambda: raising(Boom)() if getattr(failing, "now", False) else None

    def computes() -> None:
        for _ in range(15):
            good.append(torch.equal(expected, module(NET_IDS)))

    def fails() -> None:
        failing.now = True
        for _ in range(15):
            try:
                module(NET_IDS)
            except Boom as error:
                bad.append(error)

    run(torch.no_grad()(computes), torch.no_grad()(fails))
    assert ([True] * 15, 15) == (good, len(bad))


class Slow:
    """Holds up reads of the files until it is told to let them go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        real = transport.os.preadv

        def preadv(*arguments: Any) -> int:
            self.begun.set()
            assert self.go.wait(60)
            return real(*arguments)

        monkeypatch.setattr(transport.os, "preadv", preadv)


@torch.no_grad()
def test_an_interruption_while_it_waits_leaves_everything_usable(
    tmp_path: Path, net: Net, on_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = streamed(tmp_path)
    slow = Slow(monkeypatch)

    def interrupt() -> None:
        slow.begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        module(NET_IDS)
    thread.join()
    assert not any(state.users for state in streamer_of(module)._states)
    slow.go.set()
    assert torch.equal(net(NET_IDS), module(NET_IDS))


@torch.no_grad()
def test_the_next_unit_is_read_while_one_computes(
    tmp_path: Path, net: Net, on_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block waits until a read for the next one has begun."""
    module = streamed(tmp_path)
    module(NET_IDS)  # the order is known now
    slow = Slow(monkeypatch)
    slow.go.set()

    def until_read() -> None:
        assert slow.begun.wait(60)
        slow.begun.clear()

    for block in module.stack.blocks[:-1]:
        block.inside = until_read
    assert torch.equal(net(NET_IDS), module(NET_IDS))


# ------------------------------------------------------------------------------------------------ shared and nested


class Outer(nn.Module):
    """Units inside units, two of which one module needs at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()
        self.second.up.weight = self.first.up.weight  # a tie between blocks
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x) * self.gain) * self.gain)


@torch.no_grad()
def test_blocks_that_share_a_tensor_have_it_both(tmp_path: Path, way: str) -> None:
    outer = Outer().eval()
    module = streamed(saved(tmp_path, outer), Outer)
    x = torch.randn(3, WIDTH)
    for _ in range(3):
        assert torch.equal(outer(x), module(x))


@torch.no_grad()
def test_what_is_stored_as_one_is_streamed_apart(tmp_path: Path, way: str) -> None:
    wide = Wide(3).eval()
    both = {f"blocks.{number}.both": torch.cat([block.up.weight, block.down.weight]) for number, block in enumerate(wide.blocks)}
    rest = {name: tensor for name, tensor in wide.state_dict().items() if not name.endswith(".weight")}
    save_file(both | rest, tmp_path / "model.safetensors")
    rule = Split("{*block}.both", ["{*block}.up.weight", "{*block}.down.weight"])
    module = streamed(tmp_path, lambda: Wide(3), mapping=[rule])
    x = torch.randn(2, WIDE)
    for _ in range(3):
        assert torch.equal(wide(x), module(x))
    assert (way in ("kept", "dropped")) == (0 == streamer_of(module).slot_bytes)


class Crossed(nn.Module):
    """A block that calls another one, of which it is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[0].inside = lambda: self.blocks[2](torch.zeros(1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


@torch.no_grad()
def test_what_would_wait_for_itself_is_an_error(tmp_path: Path, on_network: None) -> None:
    module = streamed(saved(tmp_path, Crossed()), Crossed)
    with pytest.raises(LoadError, match=r"blocks\.2: was called by blocks\.0") as caught:
        module(torch.zeros(1, WIDTH))
    assert ("LD-STREAM", "blocks.2") == (caught.value.code, caught.value.locus)
    module.blocks[0].inside = nothing
    assert torch.isfinite(module(torch.zeros(1, WIDTH))).all()  # and it goes on


def test_a_streamed_module_is_neither_copied_nor_pickled(tmp_path: Path, net: Net, way: str) -> None:
    module = streamed(tmp_path)
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(LoadError, match="LD-STREAM"):
            call(module.stack.blocks[0])


# ------------------------------------------------------------------------------------------------ gradients


def gradients(net: nn.Module, leaf: torch.Tensor) -> torch.Tensor:
    leaf.grad = None
    net.stack(leaf).square().sum().backward()
    return leaf.grad.clone()


def test_gradients_go_through_paged_weights(tmp_path: Path, net: Net, dropped: None) -> None:
    module = streamed(tmp_path)
    leaf = torch.randn(2, WIDTH, requires_grad=True)
    expected = gradients(net, leaf)
    assert torch.equal(expected, gradients(module, leaf))
    weight = module.stack.blocks[1].up.weight
    assert torch.equal(net.stack.blocks[1].up.weight.grad, weight.grad)


def test_a_step_of_training_on_paged_weights_is_kept(tmp_path: Path, net: Net, dropped: None) -> None:
    module = streamed(tmp_path)
    for one in (net, module):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            one(NET_IDS).square().mean().backward()
            optimizer.step()
    assert torch.equal(net(NET_IDS), module(NET_IDS))


def test_gradients_through_weights_that_are_gone_are_refused(tmp_path: Path, net: Net, in_slots: None) -> None:
    module = streamed(tmp_path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(module, torch.randn(2, WIDTH, requires_grad=True))


def test_units_take_turns_in_two_slots_and_those_at_the_same_time_have_their_own() -> None:
    outer, other = Outer(), Block()
    one = offload.Unit("first", (), (outer.first,))
    tie = offload.Unit("tie", (), (outer.first, outer.second))
    whole = offload.Unit("whole", (), (outer,))
    apart = [offload.Unit(str(number), (), (Block(),)) for number in range(3)]
    assert [0, 1, 0] == offload._turns(apart, [True] * 3)
    assert [0, 0, 1] == offload._turns(apart, [False, True, True])
    assert [0, 2, 1] == offload._turns(
        [apart[0], offload.Unit("x", (), (outer,)), offload.Unit("y", (), (outer.third,))], [True] * 3
    )
    assert [2, 3, 4, 0] == offload._turns([one, tie, whole, offload.Unit("other", (), (other,))], [True] * 4)
