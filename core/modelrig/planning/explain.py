"""A plan as text: the rig with the reason for each part, every refused part with every reason, and the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from modelrig.components import PLANNED
from modelrig.errors import MAX_QUOTED
from modelrig.planning.generation_config import IDS, RECOMMENDED, SAMPLING
from modelrig.planning.ledger import MOMENTS
from modelrig.planning.memory import human
from modelrig.planning.plan import LayerKind, RigPlan, plain_options
from modelrig.planning.request import DEFAULT
from modelrig.planning.rules import SINGULAR
from modelrig.planning.units import DISK

MOMENT_NAMES = {"load_peak": "while loading", "steady": "loaded", "run": "generating"}


def explain(plan: RigPlan) -> str:
    """The whole plan, in sections."""
    sections = (
        ("", _model(plan)),
        ("rig", _rig(plan)),
        *((f"{role} model", _companion(one)) for role, one in plan.companions.items()),
        ("places", _places(plan)),
        ("generation", _generation(plan)),
        ("asked for", _asked(plan)),
        ("not chosen", _refused(plan)),
        ("memory", _memory(plan)),
        ("notes", (f"  {note}" for note in plan.notes)),
    )
    blocks = [[*([title] if title else []), *lines] for title, found in sections if (lines := list(found))]
    return "\n\n".join("\n".join(block) for block in blocks)


def summary(plan: RigPlan) -> str:
    """One line: the model, the parts, the place, the bytes."""
    parts = " · ".join(plan.choices[kind].component for kind in PLANNED[2:] if kind in plan.choices)
    size = human(plan.ledger.total("run", plan.device))
    others = "".join(f" and {device}" for device in dict.fromkeys(plan.device_map.values()) if device != plan.device)
    return f"{plan.reference}: {parts} · {plan.dtype} on {plan.device}{others} · context {plan.context} · {size}"


def _model(plan: RigPlan) -> Iterator[str]:
    counts = f"{plan.num_parameters:,} parameters in {len(plan.catalog.entries):,} tensors"
    yield f"{plan.reference}  ({plan.facts.architecture}, {counts})"
    yield f"  {plan.snapshot.root}" + (f" at {plan.snapshot.revision}" if plan.snapshot.revision else "")


def _rig(plan: RigPlan) -> Iterator[str]:
    rows = []
    for kind in (kind for kind in PLANNED if kind in plan.choices):
        choice = plan.choices[kind]
        options = plain_options(choice.options) or {}
        set_to = f" ({', '.join(f'{key}={_shortened(_plain(value))}' for key, value in options.items())})" if options else ""
        rows.append((SINGULAR[kind], choice.component + set_to, choice.why))
        sampling = plan.decoder_when_sampling
        if kind == "decoders" and sampling is not None and sampling.id != choice.id:
            rows.append(("", sampling.component, sampling.why))
    kinds = plan.layer_kinds
    if any(one.kind != "full" for one in kinds):
        rows.append(("layers", ", ".join(f"{one.layers} {one.kind}" for one in kinds), "; ".join(_layers(kinds))))
    rows.append(("device", plan.device, plan.origins["device"]))
    rows.append(("dtype", plan.dtype, plan.origins["dtype"]))
    rows.append(("context", f"{plan.context:,} tokens", plan.origins["context"]))
    rows.append(("batch", str(plan.batch), plan.origins["batch"]))
    yield from _aligned(rows)


def _companion(plan: RigPlan) -> Iterator[str]:
    yield from _model(plan)
    yield f"  {summary(plan)}"


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _layers(kinds: Sequence[LayerKind]) -> Iterator[str]:
    """What layers of each kind see and keep."""
    for one in kinds:
        window = f", a window of {one.window:,} tokens" if one.window is not None else ""
        kept = f", a cache of {human(one.cache_bytes)}" if one.cache_bytes else ""
        if window or kept:
            yield f"{one.kind}{window}{kept}"


def _places(plan: RigPlan) -> Iterator[str]:
    """Where the weights are, unless all are on the device that runs: runs of numbered blocks as `model.layers.0-3`."""
    if plan.device_map.keys() == {""} and plan.device_map[""] == plan.device:
        return
    of_device: dict[str, list[str]] = {plan.device: []}
    for name, device in plan.device_map.items():
        of_device.setdefault(device, []).append(name)
    yield from _aligned([(device, ", ".join(_ranges(names)), "") for device, names in of_device.items() if names])


def _generation(plan: RigPlan) -> Iterator[str]:
    """What the checkpoint says of how to generate, and when it counts: options that a call gives come first."""
    when = {
        **dict.fromkeys(SAMPLING, ": in calls with a temperature"),
        **dict.fromkeys(RECOMMENDED, ": a recommendation, calls sample by their own temperature"),
        **dict.fromkeys(IDS[1:], ": for information"),
        "max_length": ": prompt and new tokens" + (", after max_new_tokens" if "max_new_tokens" in plan.generation.values else ""),
    }
    rows = [
        (key, _shortened(_written(entry["value"])), entry["origin"] + when.get(key, ""))
        for key, entry in plan.generation.to_json().items()
    ]
    yield from _aligned(rows)


def _written(value: object) -> str:
    """A value of a JSON file as it is written there; a list without its brackets."""
    return json.dumps(value).strip("[]") or "none"


def _ranges(names: Sequence[str]) -> Iterator[str]:
    """Names in order, consecutive numbers under one parent drawn together."""
    runs: list[tuple[str, list[int]]] = []
    for name in names:
        parent, dot, last = name.rpartition(".")
        number = int(last) if dot and last.isdecimal() and len(last) < 8 else None
        if number is None:
            runs.append((name, []))
        elif runs and runs[-1][0] == parent and runs[-1][1] and runs[-1][1][-1] == number - 1:
            runs[-1][1].append(number)
        else:
            runs.append((parent, [number]))
    for place, (name, numbers) in enumerate(runs):
        again = place > 0 and numbers and runs[place - 1][1] and runs[place - 1][0] == name
        span = "-".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else ""
        yield span if again else f"{name}.{span}" if numbers else name or "the whole model"


def _asked(plan: RigPlan) -> Iterator[str]:
    asked = plan.request.to_json().items()
    rows = [(key, _shortened(str(entry["value"])), entry["origin"]) for key, entry in asked if entry["origin"] != DEFAULT]
    rows += [(key, "", origin) for key, origin in plan.request.origins.items() if "." in key]
    yield from _aligned(rows)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


def _refused(plan: RigPlan) -> Iterator[str]:
    for row in plan.refused:
        yield f"  {SINGULAR[row.kind]} {row.component}"
        for reason in row.reasons:
            hint = f" ({reason.hint})" if reason.hint else ""
            yield f"    {reason.text}{hint} [{reason.code}]"


def _memory(plan: RigPlan) -> Iterator[str]:
    for device in plan.ledger.devices:
        available = plan.environment.available_bytes(device)
        free = f"{human(available)} available" if available is not None else "what is free is not known"
        yield f"  {device}: " + ("read in each step" if device == DISK else free)
        for moment in MOMENTS:
            lines = [line for line in plan.ledger if line.device == device and line.moment == moment]
            if not lines:
                continue
            name = MOMENT_NAMES[moment] if plan.facts.generates or moment != "run" else "computing"
            yield f"    {name}: {human(sum(line.bytes for line in lines))}"
            for line in lines:
                model = f"{line.model}: " if line.model else ""
                yield f"      {human(line.bytes):<28} {model}{line.what}" + ("" if line.exact else ", an estimate")


def _aligned(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, value, why in rows:
        yield f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {why}".rstrip()
