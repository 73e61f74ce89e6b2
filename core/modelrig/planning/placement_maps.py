"""Maps from names of modules to devices, as Hugging Face writes them: read, checked and written.

A name holds for the module or parameter it names and all that is inside, unless a longer name says otherwise. Names end at dots:
`"model.layers.1"` says nothing of `model.layers.10`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from modelrig.errors import PlanError, nearest, quoted
from modelrig.planning.units import Weight, is_gpu, owners_of

LISTED = 20  # names that a message spells out
MOST_COMPARED = 500  # names among which the nearest is looked for


def find(device_map: Mapping[str, str], name: str) -> str | None:
    """The longest key that holds for `name`; None if there is none."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def resolve(device_map: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Each name's device. Raises `PlanError` (PN-MAP-COVER) naming those that have none."""
    keys = {name: find(device_map, name) for name in names}
    uncovered = [name for name, key in keys.items() if key is None]
    if uncovered:
        raise PlanError("PN-MAP-COVER", _uncovered(uncovered), locus="device_map")
    return {name: device_map[key] for name, key in keys.items() if key is not None}


def require_one_gpu(device_map: Mapping[str, str]) -> None:
    """Raise `PlanError` (PN-DEVICE) for a map that computes on several GPUs: such a plan can be looked at, and not run yet."""
    gpus = sorted({device for device in device_map.values() if is_gpu(device)})
    if len(gpus) > 1:
        reason = f"the map computes on {', '.join(gpus)}; a rig runs on one GPU, with the rest in main memory or on disk"
        hint = "load_and_dispatch spreads any module over several"
        raise PlanError("PN-DEVICE", reason, locus="device_map", hint=hint)


def coarse(where: Mapping[str, str]) -> dict[str, str]:
    """The shortest map of disjoint names that says the same, in the order of `where`: modules, or a parameter by its own name."""
    common: dict[str, str | None] = {}  # module → the device of all inside, None if there are several
    for name, device in where.items():
        for prefix in _prefixes(name):
            if common.setdefault(prefix, device) != device:
                common[prefix] = None
    found: dict[str, str] = {}
    for name, device in where.items():
        found[next(prefix for prefix in _prefixes(name) if common[prefix] is not None)] = device
    return found


def _prefixes(name: str) -> Iterator[str]:
    """`"", "a", "a.b"` and `"a.b.c"` itself."""
    yield ""
    end = name.find(".")
    while end != -1:
        yield name[:end]
        end = name.find(".", end + 1)
    if name:
        yield name


def read_map(
    device_map: Mapping[str, str], weights: Sequence[Weight], blocks: Collection[str] = (), modules: Collection[str] = ()
) -> dict[str, str]:
    """Each weight's device by a map that somebody wrote. A weight that is not covered follows one it is tied to.

    `modules` are names of modules without weights, which may stand in the map and decide nothing.

    Raises:
        PlanError: PN-MAP-NAME, -COVER, -UNUSED or -SPLIT; the message has every problem of each sort.
    """
    keys = {weight.name: find(device_map, weight.name) for weight in weights}
    where = {name: device_map[key] for name, key in keys.items() if key is not None}
    of_tie = {weight.tie: where[weight.name] for weight in reversed(weights) if weight.tie and weight.name in where}
    for weight in weights:
        if weight.name not in where and weight.tie in of_tie:
            where[weight.name] = of_tie[weight.tie]
    problems = [
        *_unknown(device_map, weights, modules),
        *_unused(device_map, keys),
        *([("PN-MAP-COVER", _uncovered(missing))] if (missing := [name for name in keys if name not in where]) else []),
        *_split(where, weights, blocks),
    ]
    if problems:
        code, text = problems[0]
        if len(problems) > 1:
            text = f"{len(problems)} problems:" + "".join(f"\n  - {text} [{code}]" for code, text in problems)
        raise PlanError(code, text, locus="device_map")
    return {weight.name: where[weight.name] for weight in weights}


Problem = tuple[str, str]


def _unknown(device_map: Mapping[str, str], weights: Sequence[Weight], modules: Collection[str]) -> Iterator[Problem]:
    known = {prefix for name in (*(weight.name for weight in weights), *modules) for prefix in _prefixes(name)}
    known.add("")
    unknown = [key for key in device_map if key not in known]
    if unknown:
        guesses = [quoted(key) + _guess(key, known) for key in unknown[:LISTED]]
        yield "PN-MAP-NAME", f"no module or parameter is called {_and_more(guesses, len(unknown))}"


def _guess(key: str, known: Collection[str]) -> str:
    """`" (did you mean ...?)"`: each part of the name corrected by what is there, or a longer name that ends so."""
    path = ""
    for part in key.split("."):
        exact = f"{path}.{part}" if path else part
        if exact not in known:
            depth = exact.count(".")
            inside = [name for name in known if name.count(".") == depth and name.rpartition(".")[0] == path and name]
            guess = nearest(exact, inside[:MOST_COMPARED])
            exact = guess.partition("'")[2].rpartition("'")[0] if guess else ""
        if not exact:
            longer = sorted((name for name in known if name.endswith(f".{key}")), key=len)
            return f" (did you mean {longer[0]!r}?)" if longer else ""
        path = exact
    return f" (did you mean {path!r}?)"


def _unused(device_map: Mapping[str, str], keys: Mapping[str, str | None]) -> Iterator[Problem]:
    """Names that decide nothing, because longer ones decide for all that is inside."""
    used = set(keys.values())
    if used >= device_map.keys():
        return
    inside: dict[str, set[str]] = {}
    for name, key in keys.items():
        for prefix in _prefixes(name):
            if prefix in device_map and prefix not in used and key is not None:
                inside.setdefault(prefix, set()).add(key)
    for name, longer in list(inside.items())[:LISTED]:
        shown = _and_more([quoted(one) for one in sorted(longer)[:3]], len(longer))
        yield "PN-MAP-UNUSED", f"{quoted(name)} decides nothing: all that is inside is decided by {shown}"


def _split(where: Mapping[str, str], weights: Sequence[Weight], blocks: Collection[str]) -> Iterator[Problem]:
    """Blocks, modules and ties on more than one device. A module that has others inside may have its own weights anywhere."""
    whole = frozenset(blocks)
    owners = owners_of(weights, blocks)
    containers = {prefix for owner in set(owners.values()) for prefix in _prefixes(owner) if prefix != owner}
    of_owner: dict[str, dict[str, str]] = {}
    of_tie: dict[str, dict[str, str]] = {}
    for weight in weights:
        device = where.get(weight.name)
        if device is None:
            continue
        if owners[weight.name] in whole or owners[weight.name] not in containers:
            of_owner.setdefault(owners[weight.name], {}).setdefault(device, weight.name)
        if weight.tie is not None:
            of_tie.setdefault(weight.tie, {}).setdefault(device, weight.name)
    split = [f"{owner or 'the model'} ({_places(found)})" for owner, found in of_owner.items() if len(found) > 1]
    if split:
        yield "PN-MAP-SPLIT", f"blocks and modules stay whole; divided are {_and_more(split[:LISTED], len(split))}"
    torn = [f"({_places(found)})" for found in of_tie.values() if len(found) > 1]
    if torn:
        yield "PN-MAP-TIED", f"weights that are one tensor stay together; divided are {_and_more(torn[:LISTED], len(torn))}"


def _places(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} on {device}" for device, name in found.items())


def _uncovered(names: Sequence[str]) -> str:
    shown = _and_more([quoted(name) for name in names[:LISTED]], len(names))
    return f'no name of the map covers {shown}; "" covers what no longer name does'


def _and_more(shown: Sequence[str], count: int) -> str:
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")
