"""How stored tensors become parameters, as rules that can be read, checked and turned round.

    rules = [
        Rename("transformer.{*rest}", "{*rest}"),
        Concat(["layers.{i}.q.weight", "layers.{i}.k.weight"], "layers.{i}.qk.weight"),
        Stack("layers.{i}.experts.{e}.w1.weight", "layers.{i}.experts.w1", over="e"),
        Transpose("layers.{i}.out.weight", "layers.{i}.out.weight"),
        Drop("{*rest}.inv_freq", "computed from the config"),
    ]
    targets = apply_rules(rules, {name: entry.shape for name, entry in catalog.entries.items()}, path)
    targets["layers.0.qk.weight"].shape, targets["layers.0.qk.weight"].parts

`{i}` stands for one name between dots, `{*rest}` for one or more. Rules are applied in order, each to what the ones before it made;
what no rule claims keeps its name. The result is `Part`s, which only move elements: loading copies each straight to its place, and
`stored_tensors` reads them backwards, so that what was loaded from one layout is saved in it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from modelrig.checkpoint.patterns import MisfitError, fill, match
from modelrig.components import Part, Region
from modelrig.errors import LoadError, quoted

Shape = tuple[int, ...]


@frozen
class Target:
    """A tensor put together of parts: a stored one as it is, or what rules made."""

    shape: Shape
    parts: tuple[Part, ...]


# ------------------------------------------------------------------------------------------------ rules


def _patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@frozen
class Rename:
    """`source` under another name."""

    source: str
    target: str


@frozen
class Drop:
    """Tensors that are stored and not wanted, and why. They are not written again."""

    source: str
    reason: str


@frozen
class Concat:
    """`sources` one after the other along `dim`."""

    sources: tuple[str, ...] = field(converter=_patterns)
    target: str
    dim: int = 0


@frozen
class Stack:
    """The tensors that differ in the number `over`, from 0 on without a gap, along a new dimension `dim`."""

    source: str
    target: str
    over: str
    dim: int = 0


@frozen
class Split:
    """`source` cut along `dim` into `targets`, of the given sizes, or of equal ones."""

    source: str
    targets: tuple[str, ...] = field(converter=_patterns)
    sizes: tuple[int, ...] | None = None
    dim: int = 0


@frozen
class Transpose:
    """`source` with two dimensions exchanged."""

    source: str
    target: str
    dims: tuple[int, int] = (0, 1)


@frozen
class PermuteRope:
    """Rows of each of `heads` heads from interleaved pairs (0, 1), (2, 3), ... to halves: the layout rotate-half wants."""

    source: str
    target: str
    heads: int


Rule = Rename | Drop | Concat | Stack | Split | Transpose | PermuteRope


def apply_rules(rules: Sequence[Rule], shapes: Mapping[str, Shape], path: Path | None = None) -> dict[str, Target]:
    """Target name → what it is put together of. `shapes` are those of the stored tensors, `path` is for messages.

    Raises:
        LoadError: LD-MAPPING, naming the rule and the tensor: inputs missing or of shapes that do not go together, two tensors of
            one name, or steps that cannot be joined (cutting what was permuted before).
    """
    tensors = {name: Target(tuple(shape), (Part(name, tuple(shape)),)) for name, shape in shapes.items()}
    for rule in rules:
        try:
            tensors = _apply(rule, tensors)
        except MisfitError as misfit:
            raise LoadError("LD-MAPPING", f"{rule} does not fit: {misfit}", path=path, locus=misfit.name) from misfit
    return tensors


def _apply(rule: Rule, tensors: Mapping[str, Target]) -> dict[str, Target]:
    """`tensors` after one rule; those it does not claim are passed on as they are, all in the order in which they came."""
    if isinstance(rule, Rename | Drop | Transpose | PermuteRope | Split):
        made = [pair for name, tensor in tensors.items() for pair in _alone(rule, name, tensor)]
    else:
        made = list(_together(rule, tensors))
    result = dict(made)
    if len(result) != len(made):
        seen: set[str] = set()
        twice = next(name for name, _ in made if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MisfitError(twice, "several tensors would get this name")
    return result


def _alone(rule: Rename | Drop | Transpose | PermuteRope | Split, name: str, tensor: Target) -> Iterator[tuple[str, Target]]:
    fields = match(rule.source, name)
    if fields is None:
        yield name, tensor
    elif isinstance(rule, Rename):
        yield fill(rule.target, fields), tensor
    elif isinstance(rule, Transpose):
        yield fill(rule.target, fields), _transpose(tensor, rule.dims, name)
    elif isinstance(rule, PermuteRope):
        yield fill(rule.target, fields), _permute_rope(tensor, rule.heads, name)
    elif isinstance(rule, Split):
        dim = _dimension(rule.dim, tensor.shape, name)
        start = 0
        for target, size in zip(rule.targets, _sizes(rule, tensor.shape[dim], name), strict=True):
            yield fill(target, fields), _cut(tensor, dim, start, start + size, name)
            start += size


def _together(rule: Concat | Stack, tensors: Mapping[str, Target]) -> Iterator[tuple[str, Target]]:
    """Inputs are gathered by what the fields they share stand for; the result comes where the first of them was."""
    patterns = rule.sources if isinstance(rule, Concat) else (rule.source,)
    groups: dict[str, dict[int, tuple[str, Target]]] = {}
    target_of: dict[str, str] = {}
    for name, tensor in tensors.items():
        for place, pattern in enumerate(patterns):
            fields = match(pattern, name)
            if fields is None:
                continue
            if isinstance(rule, Stack):
                number = fields.pop(rule.over, "")
                if not (number.isascii() and number.isdigit() and len(number) < 8):
                    raise MisfitError(name, f"{{{rule.over}}} is {quoted(number)}, and must be a number")
                place = int(number)
            target_of[name] = fill(rule.target, fields)
            if place in groups.setdefault(target_of[name], {}):
                raise MisfitError(name, "is the same input as another tensor")
            groups[target_of[name]][place] = (name, tensor)
            break
    done: set[str] = set()
    for name, tensor in tensors.items():
        target = target_of.get(name)
        if target is None:
            yield name, tensor
        elif target not in done:
            done.add(target)
            yield target, _join(rule, target, groups[target])


def _join(rule: Concat | Stack, target: str, inputs: Mapping[int, tuple[str, Target]]) -> Target:
    count = len(rule.sources) if isinstance(rule, Concat) else max(inputs) + 1
    if len(inputs) != count:
        lacking = next(place for place in range(count) if place not in inputs)
        what = rule.sources[lacking] if isinstance(rule, Concat) else f"{rule.source} with {rule.over} = {lacking}"
        raise MisfitError(target, f"there is no {what} ({count - len(inputs)} of {count} inputs are missing)")
    ordered = [inputs[place] for place in range(count)]
    return _stack(ordered, rule.dim) if isinstance(rule, Stack) else _concat(ordered, rule.dim)


# ------------------------------------------------------------------------------------------------ shapes


def _dimension(dim: int, shape: Shape, name: str) -> int:
    place = dim + len(shape) if dim < 0 else dim
    if not 0 <= place < len(shape):
        raise MisfitError(name, f"has no dimension {dim}: its shape is {list(shape)}")
    return place


def _sizes(rule: Split, whole: int, name: str) -> tuple[int, ...]:
    sizes = rule.sizes
    if sizes is None and rule.targets and whole % len(rule.targets) == 0:
        sizes = (whole // len(rule.targets),) * len(rule.targets)
    if sizes is None or len(sizes) != len(rule.targets) or sum(sizes) != whole or min(sizes) < 0:
        said = "equal parts" if rule.sizes is None else f"parts of {list(rule.sizes)}"
        raise MisfitError(name, f"{whole} along dimension {rule.dim} cannot be cut into {len(rule.targets)} {said}")
    return sizes


def whole_region(shape: Shape) -> Region:
    return tuple((0, size) for size in shape)


def extent(region: Region) -> Shape:
    """The shape of a region."""
    return tuple(stop - start for start, stop in region)


def _into(part: Part, shape: Shape) -> Region:
    return whole_region(shape) if part.into is None else part.into


def _concat(inputs: Sequence[tuple[str, Target]], dim: int) -> Target:
    first, (_, model) = inputs[0][0], inputs[0]
    dim = _dimension(dim, model.shape, first)
    parts, start = [], 0
    for name, tensor in inputs:
        if len(tensor.shape) != len(model.shape) or any(
            size != other for place, (size, other) in enumerate(zip(tensor.shape, model.shape, strict=True)) if place != dim
        ):
            raise MisfitError(name, f"has the shape {list(tensor.shape)}, {quoted(first)} {list(model.shape)}")
        for part in tensor.parts:
            region = list(_into(part, tensor.shape))
            region[dim] = (region[dim][0] + start, region[dim][1] + start)
            parts.append(evolve(part, into=tuple(region)))
        start += tensor.shape[dim]
    return Target((*model.shape[:dim], start, *model.shape[dim + 1 :]), tuple(parts))


def _stack(inputs: Sequence[tuple[str, Target]], dim: int) -> Target:
    first, shape = inputs[0][0], inputs[0][1].shape
    dim = _dimension(dim, (*shape, 0), first)
    parts = []
    for place, (name, tensor) in enumerate(inputs):
        if tensor.shape != shape:
            raise MisfitError(name, f"has the shape {list(tensor.shape)}, {quoted(first)} {list(shape)}")
        for part in tensor.parts:
            region = _into(part, shape)
            parts.append(evolve(part, into=(*region[:dim], (place, place + 1), *region[dim:])))
    return Target((*shape[:dim], len(inputs), *shape[dim:]), tuple(parts))


def _cut(tensor: Target, dim: int, start: int, stop: int, name: str) -> Target:
    parts = []
    for part in tensor.parts:
        region = _into(part, tensor.shape)
        low, high = max(start, region[dim][0]), min(stop, region[dim][1])
        is_empty = prod(extent(region)) == 0
        if low > high or (low == high and not is_empty):
            continue
        if (low, high) != region[dim] and not is_empty:
            part = evolve(part, taken=_taken(part, region, dim, (low, high), name))
        parts.append(evolve(part, into=(*region[:dim], (low - start, high - start), *region[dim + 1 :])))
    return Target((*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :]), tuple(parts))


def _taken(part: Part, region: Region, dim: int, kept: tuple[int, int], name: str) -> Region:
    """What of the stored tensor is left of `part`, which fills `region`, once only `kept` of its dimension `dim` is."""
    taken = part.taken if part.taken is not None else whole_region(part.shape)
    # Stacking put dimensions of size 1 between those of the stored tensor; never is one of these cut.
    inner = [place for place, size in enumerate(extent(region)) if size != 1]
    stored = [place for place, size in enumerate(extent(taken)) if size != 1]
    sizes = [extent(region)[place] for place in inner], [extent(taken)[place] for place in stored]
    if part.order is not None or part.axes is not None or sizes[0] != sizes[1]:
        raise MisfitError(name, "cannot be cut after it was permuted")
    place = stored[inner.index(dim)]
    offset = taken[place][0] - region[dim][0]
    return (*taken[:place], (kept[0] + offset, kept[1] + offset), *taken[place + 1 :])


def _transpose(tensor: Target, dims: tuple[int, int], name: str) -> Target:
    one, other = (_dimension(dim, tensor.shape, name) for dim in dims)
    order = list(range(len(tensor.shape)))
    order[one], order[other] = order[other], order[one]
    parts = []
    for part in tensor.parts:
        region = _into(part, tensor.shape)
        parts.append(evolve(_permuted(part, extent(region), order, name), into=tuple(region[place] for place in order)))
    return Target(tuple(tensor.shape[place] for place in order), tuple(parts))


def _permute_rope(tensor: Target, heads: int, name: str) -> Target:
    rows = tensor.shape[0] if tensor.shape else 1
    if heads < 1 or rows % (2 * heads):
        raise MisfitError(name, f"its shape is {list(tensor.shape)}: the rows are not pairs of {heads} heads")
    if len(tensor.parts) != 1:
        raise MisfitError(name, "is put together of several tensors; permute them before")
    pairs = rows // heads // 2
    fine = (heads, pairs, 2, *tensor.shape[1:])
    part = _permuted(tensor.parts[0], fine, [0, 2, 1, *range(3, len(fine))], name)
    return Target(tensor.shape, (part,))


def _permuted(part: Part, shape: Shape, order: Sequence[int], name: str) -> Part:
    """`part`, whose elements are read as `shape`, with these dimensions permuted to `order`."""
    if part.axes is None or part.order is None or prod(shape) == 0:
        return evolve(part, axes=shape, order=tuple(order))
    factors = _common(tuple(part.axes[place] for place in part.order), shape)
    if factors is None:
        raise MisfitError(name, "was permuted before in a way that this rule cannot follow")
    # Each axis is split into its factors, in the order in which they are stored; `number` says which axis a factor is then.
    by_axis = [[] for _ in part.axes]  # type: list[list[int]]
    for factor, (place, _, _) in enumerate(factors):
        by_axis[part.order[place]].append(factor)
    axes = [factor for split in by_axis for factor in split]
    number = {factor: place for place, factor in enumerate(axes)}
    by_size = [[factor for factor, (_, dim, _) in enumerate(factors) if dim == place] for place in range(len(shape))]
    return evolve(
        part,
        axes=tuple(factors[factor][2] for factor in axes),
        order=tuple(number[factor] for which in order for factor in by_size[which]),
    )


def _common(one: Shape, other: Shape) -> list[tuple[int, int, int]] | None:
    """Factors, as (dimension of `one`, dimension of `other`, size), whose products make up both shapes; None if there are none."""
    found = []
    left, right = list(one), list(other)
    first = second = 0
    while first < len(one) or second < len(other):
        # what is used up stays at its last dimension for the sizes of 1 that the other shape may end with
        whole = left[first] if first < len(one) else 1
        part = right[second] if second < len(other) else 1
        size = min(whole, part)
        if (first < len(one) and second < len(other)) and max(whole, part) % size:
            return None
        if first == len(one) or second == len(other):
            size = max(whole, part)
            if size != 1:
                return None
        found.append((min(first, len(one) - 1), min(second, len(other) - 1), size))
        if first < len(one):
            left[first] //= size
            first += left[first] == 1
        if second < len(other):
            right[second] //= size
            second += right[second] == 1
    return found


# ------------------------------------------------------------------------------------------------ back


@frozen
class Origin:
    """A region of a stored tensor that comes out of the tensor `name` by reading `part` backwards."""

    name: str
    part: Part


def stored_tensors(targets: Mapping[str, Any]) -> dict[str, tuple[Shape, tuple[Origin, ...]]]:
    """Stored name → (shape, where its regions are now), for `targets` with `.shape` and `.parts` or `.sources`.

    Raises:
        LoadError: LD-MAPPING for a stored tensor of which some elements are nowhere, or are in two places.
    """
    found: dict[str, tuple[Shape, list[Origin]]] = {}
    for name, target in targets.items():
        parts: tuple[Part, ...] = getattr(target, "sources", None) or target.parts
        for part in parts:
            shape, origins = found.setdefault(part.name, (part.shape, []))
            if shape != part.shape:
                raise LoadError("LD-MAPPING", f"is {list(shape)} for one tensor, {list(part.shape)} for another", locus=part.name)
            origins.append(Origin(name, part))
    for name, (shape, origins) in found.items():
        regions = [origin.part.taken or whole_region(shape) for origin in origins]
        if sum(prod(extent(region)) for region in regions) != prod(shape) or _overlap(regions):
            raise LoadError("LD-MAPPING", f"its {prod(shape)} elements are not each in exactly one tensor of the model", locus=name)
    return {name: (shape, tuple(origins)) for name, (shape, origins) in found.items()}


def check_cover(name: str, shape: Shape, parts: Sequence[Part], path: Path | None = None) -> None:
    """Raise `LoadError` (LD-MAPPING) unless the parts fill each element of a tensor of `shape` exactly once."""
    regions = [part.into or whole_region(shape) for part in parts]
    inside = all(
        len(region) == len(shape) and all(0 <= low <= high <= size for (low, high), size in zip(region, shape, strict=True))
        for region in regions
    )
    if not inside or sum(prod(extent(region)) for region in regions) != prod(shape) or _overlap(regions):
        raise LoadError("LD-MAPPING", f"its parts do not fill the shape {list(shape)} exactly once", path=path, locus=name)


def _overlap(regions: Sequence[Region]) -> bool:
    """Whether two of the regions share an element."""
    filled = [region for region in regions if prod(extent(region)) > 0]
    if len(filled) < 2 or not filled[0]:
        return len(filled) > 1
    # along the dimension that tells the most of them apart, few begin before the one before has ended
    along = max(range(len(filled[0])), key=lambda dim: len({region[dim][0] for region in filled}))
    filled.sort(key=lambda region: region[along])
    for place, one in enumerate(filled):
        for other in filled[place + 1 :]:
            if other[along][0] >= one[along][1]:
                break
            if all(low < end and start < high for (low, high), (start, end) in zip(one, other, strict=True)):
                return True
    return False
