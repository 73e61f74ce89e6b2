"""A feed-forward that is several, of which each token uses a few (Shazeer et al., 2017; Mixtral, 2024).

Tokens are grouped by the expert they chose, so that each expert's weights are read once a step, and only those that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelrig.components import LinearMaker
from modelrig.modules.compiling import is_compiling
from modelrig.modules.network import BuildContext

Kernel = Callable[[Tensor], Tensor]


class Router(nn.Module):
    """Which experts each token uses, and how much of each: the most likely ones by a softmax in float32."""

    def __init__(self, hidden: int, experts: int, chosen: int, renormalises: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden, dtype=dtype, device="meta"), requires_grad=False)
        self.chosen, self.renormalises = chosen, renormalises

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # x: [n, hidden] -> two of [n, chosen]
        likely = torch.softmax(F.linear(x, self.weight), dim=-1, dtype=torch.float32)
        share, which = likely.topk(self.chosen, dim=-1)
        return which, share / share.sum(dim=-1, keepdim=True) if self.renormalises else share


class Experts(nn.Module):
    """Gated feed-forwards with stacked weights: gate and up [experts, 2 * size, hidden], down [experts, hidden, size]."""

    def __init__(self, hidden: int, size: int, count: int, act: Kernel, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden, dtype=dtype, device="meta"), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(count, hidden, size, dtype=dtype, device="meta"), requires_grad=False)
        self.act, self.count = act, count
        self.kernels: list[tuple[Kernel, Kernel]] = []

    def bind(self, linear: LinearMaker) -> None:
        pairs = zip(self.gate_up_proj, self.down_proj, strict=True)
        self.kernels = [(linear.make_linear(gate_up, None), linear.make_linear(down, None)) for gate_up, down in pairs]

    @property
    def bound(self) -> tuple[Kernel, ...]:
        """Its kernels, for `count_kernels`."""
        return tuple(kernel for pair in self.kernels for kernel in pair)

    def forward(self, x: Tensor, which: Tensor, share: Tensor) -> Tensor:
        """x [n, hidden] or [hidden]; `which` and `share` [n, chosen] or [chosen], float32 → like x."""
        if is_compiling():
            return self._traced(x.view(-1, x.shape[-1]), which.view(-1, which.shape[-1]), share).view(x.shape)
        if which.numel() == which.shape[-1]:
            return self._one(x, which.flatten().tolist(), share.flatten())
        n, chosen = which.shape
        flat = which.flatten()
        order = flat.argsort(stable=True)  # pairs of token and expert, by expert
        sizes = flat.bincount(minlength=self.count).tolist()
        groups = torch.split(x.index_select(0, order // chosen), sizes)
        outputs = torch.cat([self._run(expert, group) for expert, group in enumerate(groups) if group.shape[0]])
        # Each token's experts are added up in the order it chose them, whatever tokens stand beside it.
        places = order.argsort().view(n, chosen)
        total = outputs.index_select(0, places[:, 0]) * share[:, :1]
        for choice in range(1, chosen):
            total.addcmul_(outputs.index_select(0, places[:, choice]), share[:, choice, None])
        return total.to(x.dtype)

    def _one(self, x: Tensor, which: list[int], share: Tensor) -> Tensor:
        outputs = torch.stack([self._run(expert, x).view(-1) for expert in which])
        return (share @ outputs.to(share.dtype)).to(x.dtype).view(x.shape)

    def _traced(self, x: Tensor, which: Tensor, share: Tensor) -> Tensor:
        """The same without looking at which experts were chosen, as a graph needs: for a few tokens their weights are gathered, for
        more every expert is run."""
        if which.numel() <= self.count:
            gate, up = torch.einsum("nkoh,nh->nko", self.gate_up_proj[which], x).chunk(2, dim=-1)
            outputs = torch.einsum("nkhs,nks->nkh", self.down_proj[which], self.act(gate) * up)
            return (outputs * share.view(*which.shape, 1)).sum(dim=1).to(x.dtype)
        shares = share.new_zeros(x.shape[0], self.count).scatter(1, which, share)
        total = torch.zeros_like(x, dtype=share.dtype)
        for expert in range(self.count):
            total = total + self._run(expert, x) * shares[:, expert, None]
        return total.to(x.dtype)

    def _run(self, expert: int, x: Tensor) -> Tensor:
        gate_up, down = self.kernels[expert]
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(self.act(gate) * up)


class SparseMLP(nn.Module):
    """Router and experts, in place of a feed-forward."""

    def __init__(
        self, hidden: int, size: int, count: int, chosen: int, renormalises: bool, act: Kernel, context: BuildContext
    ) -> None:
        super().__init__()
        self.gate = Router(hidden, count, chosen, renormalises, context.dtype)
        self.experts = Experts(hidden, size, count, act, context.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x))
