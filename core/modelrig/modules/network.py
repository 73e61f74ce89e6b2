"""What every architecture's outermost module offers to loading: buffers that are computed, and kernels that are bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from modelrig.components import AttentionKernel, AttentionSpec, LinearMaker
from modelrig.modules.slots import Slots


@frozen
class BuildContext:
    """What a builder needs besides the facts: the parts that were negotiated, and the dtype to compute in."""

    attention: AttentionKernel
    linear: LinearMaker
    dtype: torch.dtype


class Network(nn.Module):
    """The outermost module. Submodules that compute buffers have `init_buffers(device)`, those with weights that a quantizer
    holds have `bind(linear)`."""

    def init_buffers(self, device: torch.device) -> None:
        for module in list(self.modules())[1:]:
            if (init_buffers := getattr(module, "init_buffers", None)) is not None:
                init_buffers(device)

    def bind(self, linear: LinearMaker) -> None:
        for module in list(self.modules())[1:]:
            if (bind := getattr(module, "bind", None)) is not None:
                bind(linear)


class Blocks(nn.ModuleList):
    """The blocks of a decoder, in the order in which they run; parameters are named as in any `ModuleList`.

    Attributes:
        replaced: what a compiler runs in their place, one for each; None where they run themselves.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.replaced: Sequence[Callable[..., Tensor]] | None = None

    @property
    def calls(self) -> Iterable[Callable[..., Tensor]]:
        """What runs, called as block(x, *others, mask, slots, layer), others being tensors and tuples of them, or None."""
        return self if self.replaced is None else self.replaced


class Masks:
    """The lowered mask of every layer: layers with equal specs share one, made once a step."""

    def __init__(self, specs: tuple[AttentionSpec, ...], context: BuildContext) -> None:
        self.prepare = context.attention.prepare
        self.specs = tuple(dict.fromkeys(specs))  # distinct ones, in order of appearance
        self.of_layer = tuple(self.specs.index(spec) for spec in specs)

    def __call__(self, slots: Slots) -> list[object]:
        """One mask for each layer."""
        masks = [slots.lower(self.prepare, spec) for spec in self.specs]
        return [masks[place] for place in self.of_layer]
