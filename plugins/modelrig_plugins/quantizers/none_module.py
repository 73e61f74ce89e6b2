"""The plain linear kernels, and which of them multiplies a dense weight on this machine.

Decoding one token reads every weight once, so a kernel is as good as the bandwidth it reaches. `F.linear` rearranges a 16-bit
weight in every call; where oneDNN has bfloat16 instructions but no tiles, keeping the rearranged copy makes a step up to twice as
fast, with equal bits (benchmarks/LOG.md, docs/decisions/0005). Rearranging costs about as much as 25 steps save, so it happens
while decoding goes on, a part in each step, and not for a model that is asked for a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelrig.loading.transport import drop_pages
from modelrig.planning.environment import read_environment
from modelrig_plugins.quantizers.none import NoneOptions

PATIENCE = 4  # single-token calls before a weight may be packed
SPREAD = 12  # steps over which the weights of a model are packed


class DenseLinear:
    """Makes the kernels of one model; `options.kernel` was settled when it was planned.

    Attributes:
        vector: single tokens come as [in] rather than [1, in], because `torch.mv` is what multiplies them.
    """

    def __init__(self, options: NoneOptions) -> None:
        self.kernel, self.vector = options.kernel, options.kernel == "mv"
        self.made = 0  # kernels, so that packing can be spread over them
        self.bytes = 0  # of their weights
        self.has_room: bool | None = None  # for packed copies; asked when the first is made

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if self.kernel == "packed":
            self.made += 1
            self.bytes += weight.nbytes
            return PackedLinear(weight, bias, self, self.made)
        if self.vector:
            return _mv(weight, bias)
        return lambda x: F.linear(x, weight, bias)


def _mv(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def linear(x: Tensor) -> Tensor:  # x: [tokens, in] or [in]
        if x.dim() > 1:
            return F.linear(x, weight, bias)
        return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)

    return linear


class PackedLinear:
    """`F.linear` until its turn comes; from then on oneDNN's kernel on a packed copy of the weight, bit for bit the same."""

    traced = ("weight", "bias")  # what a graph of it depends on

    def __init__(self, weight: Tensor, bias: Tensor | None, model: DenseLinear, number: int) -> None:
        self.weight, self.bias, self.model, self.number = weight, bias, model, number
        self.packed: Tensor | None = None
        self.version = weight._version
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:  # x: [tokens, in]
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        if self.version != self.weight._version:  # someone wrote to the weight
            self.packed = None
        if self.packed is None and not self._pack_in_turn(x.shape[0]):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def _pack_in_turn(self, tokens: int) -> bool:
        """Pack if it is this weight's turn and there is room; whether it is packed now."""
        self.calls += tokens == 1
        model = self.model
        if self.calls <= PATIENCE + SPREAD * self.number // model.made:
            return False
        if model.has_room is None:
            available = read_environment().available_bytes("cpu")
            model.has_room = available is None or model.bytes < available
        if model.has_room:
            self.version, self.calls = self.weight._version, 0
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
            drop_pages(self.weight)
        return model.has_room
