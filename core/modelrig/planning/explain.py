"""A plan as text: the rig with the reason for each part, every refused part with every reason, and the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelrig.components import KINDS
from modelrig.planning.ledger import MOMENTS
from modelrig.planning.memory import human
from modelrig.planning.plan import RigPlan, plain_options
from modelrig.planning.request import DEFAULT
from modelrig.planning.rules import SINGULAR

MOMENT_NAMES = {"load_peak": "while loading", "steady": "loaded", "run": "generating"}


def explain(plan: RigPlan) -> str:
    """The whole plan, in sections."""
    sections = (
        ("", _model(plan)),
        ("rig", _rig(plan)),
        ("asked for", _asked(plan)),
        ("not chosen", _refused(plan)),
        ("memory", _memory(plan)),
        ("notes", (f"  {note}" for note in plan.notes)),
    )
    blocks = [[*([title] if title else []), *lines] for title, found in sections if (lines := list(found))]
    return "\n\n".join("\n".join(block) for block in blocks)


def summary(plan: RigPlan) -> str:
    """One line: the model, the parts, the place, the bytes."""
    parts = " · ".join(plan.choices[kind].component for kind in KINDS[2:])
    size = human(plan.ledger.total("run", plan.device))
    return f"{plan.reference}: {parts} · {plan.dtype} on {plan.device} · context {plan.context} · {size}"


def _model(plan: RigPlan) -> Iterator[str]:
    counts = f"{plan.num_parameters:,} parameters in {len(plan.catalog.entries):,} tensors"
    yield f"{plan.reference}  ({plan.facts.architecture}, {counts})"
    yield f"  {plan.snapshot.root}" + (f" at {plan.snapshot.revision}" if plan.snapshot.revision else "")


def _rig(plan: RigPlan) -> Iterator[str]:
    rows = []
    for kind in KINDS:
        choice = plan.choices[kind]
        options = plain_options(choice.options) or {}
        set_to = f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
        rows.append((SINGULAR[kind], choice.component + set_to, choice.why))
        sampling = plan.decoder_when_sampling
        if kind == "decoders" and sampling is not None and sampling.id != choice.id:
            rows.append(("", sampling.component, sampling.why))
    rows.append(("device", plan.device, plan.origins["device"]))
    rows.append(("dtype", plan.dtype, plan.origins["dtype"]))
    rows.append(("context", f"{plan.context:,} tokens", plan.origins["context"]))
    rows.append(("batch", str(plan.batch), plan.origins["batch"]))
    yield from _aligned(rows)


def _asked(plan: RigPlan) -> Iterator[str]:
    asked = plan.request.to_json().items()
    rows = [(key, str(entry["value"]), entry["origin"]) for key, entry in asked if entry["origin"] != DEFAULT]
    rows += [(key, "", origin) for key, origin in plan.request.origins.items() if "." in key]
    yield from _aligned(rows)


def _refused(plan: RigPlan) -> Iterator[str]:
    for row in plan.refused:
        yield f"  {SINGULAR[row.kind]} {row.component}"
        for reason in row.reasons:
            hint = f" ({reason.hint})" if reason.hint else ""
            yield f"    {reason.text}{hint} [{reason.code}]"


def _memory(plan: RigPlan) -> Iterator[str]:
    for device in plan.ledger.devices:
        available = plan.environment.available_bytes(device)
        yield f"  {device}: " + ("what is free is not known" if available is None else f"{human(available)} available")
        for moment in MOMENTS:
            lines = [line for line in plan.ledger if line.device == device and line.moment == moment]
            if not lines:
                continue
            yield f"    {MOMENT_NAMES[moment]}: {human(sum(line.bytes for line in lines))}"
            for line in lines:
                yield f"      {human(line.bytes):<28} {line.what}" + ("" if line.exact else ", an estimate")


def _aligned(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, value, why in rows:
        yield f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {why}".rstrip()
