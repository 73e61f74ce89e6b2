"""Modules whose weights can be streamed from the disk, and how they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import modelrig
from modelrig.loading.offload import Streamer

WIDTH = 24


def nothing() -> None:
    pass


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.register_buffer("shift", torch.randn(width))
        self.inside: Callable[[], None] = nothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inside()
        return x + self.down(torch.tanh(self.up(x)) + self.shift)


class Stack(nn.Module):
    """Blocks inside of something that has a parameter of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.order: list[int] = list(range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in self.order:
            x = self.blocks[number](x * self.scale)
        return x * self.scale


class Net(nn.Module):
    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, WIDTH)
        self.stack = Stack(count)
        self.head = nn.Linear(WIDTH, 31)
        self.head.weight = self.embed.weight  # tied, and the head has a bias besides

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.stack(self.embed(ids)))


WIDE = 1024  # a block of 2 x 4 MiB


class Wide(nn.Module):
    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDE) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) / 2
        return x


NET_IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def saved(folder: Path, net: nn.Module) -> Path:
    tensors, seen = {}, set()
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() not in seen:
            tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
    save_file(tensors, folder / "model.safetensors")
    return folder


def streamed(folder: Path, build: Callable[[], nn.Module] = Net, **more: Any) -> Any:
    with modelrig.empty_weights():
        made = build()
    return modelrig.load_and_dispatch(made, folder, **({"device_map": "disk", "no_split_module_classes": ("Block",)} | more))


def streamer_of(module: nn.Module) -> Streamer:
    return next(part.__dict__["_call_impl"].streamer for part in module.modules() if "_call_impl" in part.__dict__)


class Boom(Exception):
    pass


def raising(error: type[BaseException]) -> Callable[..., None]:
    def fails(*arguments: Any) -> None:
        raise error

    return fails
