"""The plain linear kernels, and which of them multiplies a dense weight on this machine.

Decoding one token reads every weight once, so a kernel is as good as the bandwidth it reaches. For 16-bit weights `F.linear` lets
oneDNN rearrange the weight in every call. `turned` computes (W · xᵀ)ᵀ, so that the few rows are rearranged instead; `packed` keeps
a rearranged copy, up to twice as fast where there are bfloat16 instructions but no tiles (benchmarks/LOG.md, docs/decisions/0005).
Rearranging costs about as much as 25 steps save, so it happens while decoding goes on, a part in each step, and not for a model
that is asked for a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from modelrig.loading.transport import drop_pages
from modelrig.modules.compiling import is_compiling
from modelrig.modules.linear import named
from modelrig.planning.environment import read_environment
from modelrig.planning.measured import Measured
from modelrig_plugins.quantizers.none import CLASSES, MOST_STEPPED, NoneOptions, TunedOptions, few_rows_kernel, label

Kernel = Callable[[Tensor], Tensor]

PATIENCE = 4  # calls of few tokens before a weight may be packed
SPREAD = 12  # steps over which the weights of a model are packed


class DenseLinear:
    """Makes the kernels of one model; `options` were settled when it was planned.

    Attributes:
        vector: single tokens come as [in] rather than [1, in], because `torch.mv` is what multiplies most of them.
    """

    def __init__(self, options: NoneOptions) -> None:
        self.kernel = options.kernel
        self.table: Mapping[str, tuple[str, ...]] = options.table if isinstance(options, TunedOptions) else {}
        firsts = [names[0] for names in self.table.values()]
        self.vector = "mv" in firsts if firsts else self.kernel == "mv"
        self.flags = read_environment().cpu_flags if self.kernel != "linear" else frozenset[str]()
        self.made = 0  # kernels that may pack, so that packing can be spread over them
        self.bytes = 0  # of their weights
        self.has_room: bool | None = None  # for packed copies; asked when the first is made

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> Kernel:
        names = self.table.get(label(weight.shape)) or self._by_rule(weight)
        if "packed" not in names:
            return by_rows(weight, bias, {name: IN_PLACE[name](weight, bias) for name in set(names)}, names)
        self.made += 1
        self.bytes += weight.nbytes
        packed = Packed(weight, bias, self, self.made, keeps_pages=set(names) != {"packed"})
        kernels = {name: packed if name == "packed" else IN_PLACE[name](weight, bias) for name in set(names)}
        return by_rows(weight, bias, kernels, names)

    def _by_rule(self, weight: Tensor) -> tuple[str, ...]:
        """The kernel for each class of rows; the same whatever the machine is busy with."""
        if self.kernel in ("linear", "packed") or weight.device.type != "cpu":
            return (self.kernel if weight.device.type == "cpu" else "linear",) * CLASSES
        dtype = str(weight.dtype).removeprefix("torch.")
        counts = (1 << place for place in range(1, CLASSES))
        several = (few_rows_kernel(dtype, self.flags, rows) if rows < MOST_STEPPED else "linear" for rows in counts)
        return ("mv" if self.vector else "linear", *several)

    @staticmethod
    def tune(shapes: Iterable[tuple[int, int]], dtype: str, progress: Callable[[str], None]) -> Measured:
        from modelrig_plugins.quantizers.none_tuning import measure

        return measure(shapes, dtype, progress)


# -------------------------------------------------------------------------------------------- kernels: [rows, in] → [rows, out]


def linear(weight: Tensor, bias: Tensor | None) -> Kernel:
    return lambda x: F.linear(x, weight, bias)


def mv(weight: Tensor, bias: Tensor | None) -> Kernel:
    """Of a single row, [1, in] or [in]."""

    def multiply(x: Tensor) -> Tensor:
        row = x if x.dim() == 1 else x[0]
        y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return y if x.dim() == 1 else y.unsqueeze(0)

    return multiply


def turned(weight: Tensor, bias: Tensor | None) -> Kernel:
    column = None if bias is None else bias.unsqueeze(1)

    def multiply(x: Tensor) -> Tensor:
        y = torch.mm(weight, x.t()) if column is None else torch.addmm(column, weight, x.t())
        return y.t().contiguous()

    return multiply


def onednn(weight: Tensor, bias: Tensor | None) -> Kernel:
    def multiply(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    return multiply


#: kernels that use the weight where it lies
IN_PLACE: dict[str, Callable[[Tensor, Tensor | None], Kernel]] = {"linear": linear, "mv": mv, "turned": turned, "onednn": onednn}


def by_rows(weight: Tensor, bias: Tensor | None, kernels: Mapping[str, Kernel], names: tuple[str, ...]) -> Kernel:
    """The kernel that `names` says for each power of two of rows. What compilers trace is `mv` or `F.linear`."""
    of_class = tuple(kernels[name] for name in names)
    one, last, is_mv = of_class[0], len(names) - 1, names[0] == "mv"

    def matrix(x: Tensor) -> Tensor:  # x: [rows, in]
        if is_compiling():
            return F.linear(x, weight, bias)
        return of_class[min(x.shape[0].bit_length() - 1, last)](x)

    def multiply(x: Tensor) -> Tensor:  # x: [rows, in] or [in]
        if x.dim() > 1:
            return matrix(x)
        return one(x) if is_mv else matrix(x.unsqueeze(0)).squeeze(0)

    def name_at(rows: int) -> str:
        place = min(rows.bit_length() - 1, last)
        chosen = of_class[place]
        return chosen.name_now if isinstance(chosen, Packed) else names[place]

    return named(multiply, name_at)


class Packed:
    """`F.linear` until its turn comes; from then on oneDNN's kernel on a packed copy of the weight, bit for bit the same."""

    traced = ("weight", "bias")  # what a graph of it depends on

    def __init__(self, weight: Tensor, bias: Tensor | None, model: DenseLinear, number: int, *, keeps_pages: bool) -> None:
        self.weight, self.bias, self.model, self.number = weight, bias, model, number
        self.keeps_pages = keeps_pages  # of the weight: other kernels read it
        self.packed: Tensor | None = None
        self.version = weight._version
        self.calls = 0

    @property
    def name_now(self) -> str:
        return "linear" if self.packed is None else "packed"

    def __call__(self, x: Tensor) -> Tensor:  # x: [rows, in]
        if self.version != self.weight._version:  # someone wrote to the weight
            self.packed = None
        if self.packed is None and not self._pack_in_turn(x.shape[0]):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def _pack_in_turn(self, rows: int) -> bool:
        """Pack if it is this weight's turn and there is room; whether it is packed now."""
        self.calls += rows < MOST_STEPPED
        model = self.model
        if self.calls <= PATIENCE + SPREAD * self.number // model.made:
            return False
        if model.has_room is None:
            available = read_environment().available_bytes("cpu")
            model.has_room = available is None or model.bytes < available
        if model.has_room:
            self.version, self.calls = self.weight._version, 0
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
            if not self.keeps_pages:
                drop_pages(self.weight)
        return model.has_room
