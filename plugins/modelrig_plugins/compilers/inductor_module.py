"""Short steps as native code: one graph for a block that all blocks of its kind share, or one for the whole step.

Weights are inputs of the graph, so one serves every layer, and the artefact holds none. The number of slots in use and the room of
the cache are symbolic, so one serves every length. What remains is an artefact for each number of rows and tokens, and for padded
rows. Prompts run eagerly: they are long products, which compiling does not make faster, and each length would be a graph.

Shapes: b batch, t tokens of this step, n slots in use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from modelrig.errors import LoadError
from modelrig.modules.network import Blocks
from modelrig.modules.slots import Slots
from modelrig_plugins.compilers.graphs import ROOM, USED, Graph, Graphs, Input
from modelrig_plugins.compilers.inductor import InductorOptions
from modelrig_plugins.compilers.steps import Placed, ShortSlots, TracedLayer, TracedSlots, Unlowered, places
from modelrig_plugins.compilers.structure import Lifted, lift

WIDTHS = (1, 2, 4, 8, 16)


class InductorCompiler:
    @staticmethod
    def compile(module: nn.Module, options: InductorOptions) -> Callable[..., Tensor]:
        """See `modelrig.components.StepCompiler`. Nothing is compiled before a step asks for it.

        Raises:
            LoadError: LD-COMPILE, the blocks cannot be compiled one by one.
        """
        if next(module.parameters()).is_cuda:
            from modelrig_plugins.compilers.recorded import RecordedStep

            return RecordedStep(module, WIDTHS)
        return WholeStep(module) if options.scope == "step" else BlockStep(module)


class CompiledStep:
    """`module.step`, compiled where the step is short and follows others; as it is otherwise.

    Attributes:
        widths: tokens of a step that is compiled.
        compiled: graphs that had to be compiled so far.
        loaded: graphs that were found compiled.
    """

    widths = WIDTHS

    def __init__(self, module: nn.Module) -> None:
        self.eager: Callable[..., Tensor] = module.step  # type: ignore[assignment]
        self.graphs = Graphs()

    @property
    def compiled(self) -> int:
        return self.graphs.compiled

    @property
    def loaded(self) -> int:
        return self.graphs.loaded

    def __call__(self, ids: Tensor, slots: Slots, last_only: bool = False, *others: Any) -> Tensor:
        """See `modelrig.components.ModuleBuilder.build`. Raises `LoadError` (LD-COMPILE, LD-STORE)."""
        count = ids.shape[1]
        is_prompt = count > 1 and last_only
        if is_prompt or slots.past == 0 or count not in self.widths or others:
            return self.eager(ids, slots, last_only, *others)
        placed = places(slots)
        return self.eager(ids, slots, last_only) if placed is None else self.run(ids, slots, placed)

    def run(self, ids: Tensor, slots: Slots, placed: Sequence[Placed]) -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ one block


class BlockStep(CompiledStep):
    """Everything around the blocks runs as it is; each block runs the graph of its kind."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        found = [part for part in module.modules() if isinstance(part, Blocks)]
        if len(found) != 1:
            text = f"{type(module).__qualname__} has {len(found) or 'no'} Blocks (modelrig.modules.network), and one is compiled"
            raise LoadError("LD-COMPILE", text, hint="set compiler.scope to 'step', or plan with compiler=None")
        kinds: dict[str, Kind] = {}
        found[0].replaced = [Runner(block, kinds, self.graphs) for block in found[0]]

    def run(self, ids: Tensor, slots: Slots, placed: Sequence[Placed]) -> Tensor:
        return self.eager(ids, ShortSlots(slots, placed))


class Kind(NamedTuple):
    """Blocks that are alike: `lifted` is the first of them."""

    lifted: Lifted
    graphs: dict[Any, Graph]


class Bound(NamedTuple):
    """A graph with the weights of one block: `others` are the numbers of its further inputs."""

    run: Callable[[list[Tensor]], list[Tensor]]
    weights: list[Tensor]
    others: tuple[int, ...]


class Runner:
    """Runs in place of `block`: its graph in a short step, the block itself in any other."""

    def __init__(self, block: nn.Module, kinds: dict[str, Kind], graphs: Graphs) -> None:
        self.block, self.kinds, self.graphs = block, kinds, graphs
        self.lifted: Lifted | None = None
        self.bound: dict[Any, Bound] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the module runs its own blocks."""
        return copy.deepcopy(self.block, memo)

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        *others, mask, slots, layer = args
        if type(slots) is not ShortSlots:
            y: Tensor = self.block(x, *args)
            return y
        keys, values, where, key_index = layer
        starts = () if slots.starts is None else (slots.starts,)
        tensors: list[Tensor] = []
        marks: list[Any] = [slots.positions.shape, len(starts)]
        spread((x, *others), tensors, marks)
        key = tuple(marks)
        bound = self.bound.get(key)
        if bound is None:
            bound = self.bound[key] = self._bind(key, (x, *others), mask, slots, layer)
        tensors += (slots.positions, slots.index, where, key_index, keys, values, *starts)
        return bound.run(bound.weights + [tensors[number] for number in bound.others])[0]

    def _bind(self, key: tuple[Any, ...], args: tuple[Any, ...], mask: Any, slots: ShortSlots, placed: Placed) -> Bound:
        if not isinstance(mask, Unlowered):
            text = f"{type(self.block).__qualname__} is given a {type(mask).__qualname__} for a mask, and not one of `Masks`"
            raise LoadError("LD-COMPILE", text, hint="set compiler.scope to 'step'")
        if self.lifted is None:
            self.lifted = lift((self.block, mask))
        kind = self.kinds.setdefault(self.lifted.signature, Kind(self.lifted, {}))
        graph = kind.graphs.get(key)
        if graph is None:
            graph = kind.graphs[key] = self._graph(kind.lifted, key, args, slots, placed)
        tensors, count = self.lifted.tensors, len(self.lifted.tensors)
        weights = [tensors[number] for number in graph.inputs if number < count]
        return Bound(graph.run, weights, tuple(number - count for number in graph.inputs if number >= count))

    def _graph(self, lifted: Lifted, key: tuple[Any, ...], args: tuple[Any, ...], slots: ShortSlots, placed: Placed) -> Graph:
        passed: list[Tensor] = []
        spread(args, passed, [])
        inputs = [Input(tensor) for tensor in (*lifted.tensors, *passed, slots.positions, slots.index)]
        inputs += placed_inputs(placed)
        inputs += [] if slots.starts is None else [Input(slots.starts)]
        count = len(lifted.tensors)

        def function(given: Sequence[Tensor]) -> Tensor:
            block, (prepare, spec) = lifted.rebuild(given[:count])
            rest = iter(given[count:])
            others = gather(args, rest)
            positions, index, where, key_index, keys, values, *starts = rest
            layer = TracedLayer(Placed(keys, values, where, key_index))
            traced = TracedSlots(index, positions, starts[0] if starts else None, [layer], {spec: key_index})
            y: Tensor = block(*others, prepare(spec, traced.visible(spec)), traced, layer)
            return y

        b, t = slots.positions.shape
        return self.graphs.get(
            f"a block of the kind {lifted.signature[:6]} for {b} x {t} tokens{'' if slots.starts is None else ', padded'}",
            function,
            inputs,
            ["block", lifted.signature, repr(key)],
            lifted.homes | {__name__} | {mark.__module__ for mark in key if isinstance(mark, type)},
            is_kept=not lifted.opaque,
        )


# ------------------------------------------------------------------------------------------------ the whole step


class WholeStep(CompiledStep):
    """Embedding, masks, blocks and head as one graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module = module
        self.lifted: Lifted | None = None
        self.bound: dict[Any, Bound] = {}

    def run(self, ids: Tensor, slots: Slots, placed: Sequence[Placed]) -> Tensor:
        if self.lifted is None:
            self.lifted = lift(self.module, "step")
        seen = [slots.visible(spec).key_index for spec in self.lifted.specs]
        groups, group_of = grouped(placed)
        starts = () if slots.starts is None else (slots.starts,)
        key = (*ids.shape, len(starts), group_of)
        tensors = [ids.contiguous(), slots.positions, slots.index, *starts, *seen]
        for one in groups:
            tensors += (one.where, one.key_index)
        for one in placed:
            tensors += (one.keys, one.values)
        bound = self.bound.get(key)
        if bound is None:
            bound = self.bound[key] = self._bind(key, tensors, len(starts), len(seen), group_of)
        return bound.run(bound.weights + [tensors[number] for number in bound.others])[0]

    def _bind(self, key: Any, tensors: Sequence[Tensor], padded: int, specs: int, group_of: tuple[int, ...]) -> Bound:
        lifted = self.lifted
        assert lifted is not None
        count, groups = len(lifted.tensors), max(group_of) + 1
        inputs = [Input(tensor) for tensor in lifted.tensors]
        for number, tensor in enumerate(tensors):
            place = number - 3 - padded  # among those that follow ids, positions, index and starts
            if place >= specs + 2 * groups:
                inputs.append(Input(tensor, {2: ROOM}))
            elif place >= 0 and (place < specs or (place - specs) % 2):
                inputs.append(Input(tensor, {0: USED}))
            else:
                inputs.append(Input(tensor))

        def function(given: Sequence[Tensor]) -> Tensor:
            module, rest = lifted.rebuild(given[:count]), iter(given[count:])
            ids, positions, index = next(rest), next(rest), next(rest)
            starts = next(rest) if padded else None
            seen = {spec: next(rest) for spec in lifted.specs}
            places = [(next(rest), next(rest)) for _ in range(groups)]
            layers = [TracedLayer(Placed(next(rest), next(rest), *places[group])) for group in group_of]
            y: Tensor = module.step(ids, TracedSlots(index, positions, starts, layers, seen))
            return y

        b, t = tensors[0].shape
        graph = self.graphs.get(
            f"a step of {b} x {t} tokens{', padded' if padded else ''}",
            function,
            inputs,
            ["step", lifted.signature, repr(key)],
            lifted.homes | {__name__},
            is_kept=not lifted.opaque,
        )
        weights = [lifted.tensors[number] for number in graph.inputs if number < count]
        return Bound(graph.run, weights, tuple(number - count for number in graph.inputs if number >= count))


def grouped(placed: Sequence[Placed]) -> tuple[list[Placed], tuple[int, ...]]:
    """(the first layer of each place, of each layer the number of its place): layers that write to the same slots share them."""
    first: dict[int, int] = {}
    groups: list[Placed] = []
    group_of = []
    for one in placed:
        number = first.setdefault(one.where.data_ptr(), len(groups))
        if number == len(groups):
            groups.append(one)
        group_of.append(number)
    return groups, tuple(group_of)


# ------------------------------------------------------------------------------------------------ inputs


def placed_inputs(placed: Placed) -> Iterator[Input]:
    """As where, key_index, keys, values."""
    yield Input(placed.where)
    yield Input(placed.key_index, {0: USED})
    yield Input(placed.keys, {2: ROOM})
    yield Input(placed.values, {2: ROOM})


def spread(parts: Iterable[Any], tensors: list[Tensor], marks: list[Any]) -> None:
    """Append the tensors of `parts` to `tensors`, and to `marks` what a graph of them depends on: shapes, types of tuples, and
    constants. Raises `LoadError` (LD-COMPILE) for anything else."""
    for part in parts:
        if isinstance(part, Tensor):
            tensors.append(part if part.is_contiguous() else part.contiguous())
            marks.append(part.shape)
        elif isinstance(part, tuple):
            marks += (type(part), len(part))
            spread(part, tensors, marks)
        elif part is None or isinstance(part, bool | int | float | str):
            marks.append((type(part), part))
        else:
            text = f"a block is given a {type(part).__qualname__}, and only tensors, tuples of them and constants can be"
            raise LoadError("LD-COMPILE", text, hint="set compiler.scope to 'step'")


def gather(parts: tuple[Any, ...], tensors: Iterator[Tensor]) -> tuple[Any, ...]:
    """`parts` with the next of `tensors` in place of theirs."""
    made = [
        next(tensors) if isinstance(part, Tensor) else gather(part, tensors) if isinstance(part, tuple) else part for part in parts
    ]
    return type(parts)(*made) if hasattr(parts, "_fields") else tuple(made)
