"""The rules by which a component is matched with a need, as data.

The world is closed: a capability that is absent, or that a component built for an older API does not declare, refuses. A rule is
one row of `RULES`; what data cannot say is the planner's `check`. Two components of different kinds fit together if each offers
what the other needs of its kind (`link_reasons`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

from modelrig.components import PLANNED, SLOTS, Component, Reason
from modelrig.errors import nearest
from modelrig.planning.needs import Need

#: kind → its singular, the first word of the kind's reason codes
SINGULAR = {"sources": "source", "formats": "format", "architectures": "architecture"} | {
    kind: slot for slot, kind in SLOTS.items()
}

Relation = Callable[[Any, Any], Any]


def member(need: Any, capability: Any) -> Any:
    """`need` itself where the capability does not contain it."""
    return None if need in capability else need


def subset(need: Any, capability: Any) -> Any:
    """What of `need` the capability does not contain."""
    return sorted(item for item in need if item not in capability) or None


def implies(need: Any, capability: Any) -> Any:
    """True where something is needed that the capability denies."""
    return True if need and capability is not True else None


@frozen
class Rule:
    """Refuses a component of `kind` with `code` when `relation(need.<need>, capabilities.<capability>)` is not None.

    `text` may use {seen} (what the relation found wanting), {accepted} (the capability) and {origin} (of the need's field).
    """

    kind: str
    code: str
    need: str
    capability: str
    relation: Relation
    text: str


_DEVICE = "does not run on {seen}; it runs on {accepted}"
_DTYPE = "does not compute in {seen} (dtype: {origin}); it computes in {accepted}"

RULES = (
    Rule("quantizers", "quantizer.device", "device", "devices", member, _DEVICE),
    Rule("quantizers", "quantizer.dtype", "dtype", "dtypes", member, _DTYPE),
    Rule("quantizers", "quantizer.scheme", "scheme", "reads", member,
         "does not read weights stored as {seen} ({origin}); it reads {accepted}"),
    Rule("quantizers", "quantizer.streams", "streamed", "streams", implies,
         "cannot hold weights that are brought from cpu or disk for each step, as this placement does ({origin})"),
    Rule("attention", "attention.device", "device", "devices", member, _DEVICE),
    Rule("attention", "attention.dtype", "dtype", "dtypes", member, _DTYPE),
    Rule("attention", "attention.head_dim", "head_dims", "head_dims", subset,
         "head_dim {seen} ({origin}) is not among {accepted}"),
    Rule("attention", "attention.mask", "masks", "masks", subset, "cannot mask {seen}; it masks {accepted}"),
    Rule("attention", "attention.grouped_heads", "grouped_heads", "grouped_heads", implies,
         "needs as many key/value heads as query heads; this model has fewer ({origin})"),
    Rule("attention", "attention.softcap", "softcap", "softcap", implies, "does not cap scores, as this model does ({origin})"),
    Rule("attention", "attention.sinks", "sinks", "sinks", implies, "has no attention sinks, as this model does ({origin})"),
    Rule("attention", "attention.value_dim", "unequal_value_dim", "unequal_value_dim", implies,
         "needs keys and values of one size; this model's differ ({origin})"),
    Rule("caches", "cache.device", "device", "devices", member, _DEVICE),
    Rule("caches", "cache.dtype", "dtype", "dtypes", member, "does not hold {seen} (dtype: {origin}); it holds {accepted}"),
    Rule("caches", "cache.layers", "kinds", "layers", subset,
         "cannot hold layers of kind {seen} ({origin}); it holds {accepted}"),
    Rule("caches", "cache.batch", "batched", "batched", implies, "holds one sequence, and a batch was asked for ({origin})"),
    Rule("decoders", "decoder.samples", "samples", "samples", implies, "cannot sample, as a temperature asks for"),
    Rule("decoders", "decoder.batch", "batched", "batched", implies,
         "decodes one sequence, and a batch was asked for ({origin})"),
    Rule("compilers", "compiler.device", "device", "devices", member, "does not compile for {seen}; it compiles for {accepted}"),
)  # fmt: skip

_MISSING = object()


def unary_reasons(component: Component, need: Need) -> Iterator[Reason]:
    """Every rule of the component's kind that `component` breaks."""
    capabilities = getattr(component, "capabilities", None)
    for rule in RULES:
        if rule.kind != component.kind:
            continue
        capability = getattr(capabilities, rule.capability, _MISSING)
        if capability is _MISSING or capability is None:
            yield Reason(rule.code, f"does not declare {rule.capability!r}, and what is not declared is refused")
            continue
        seen = rule.relation(getattr(need, rule.need), capability)
        if seen is not None:
            origin = need.origins.get(rule.need, "the model")
            yield Reason(rule.code, rule.text.format(seen=_plain(seen), accepted=_plain(capability), origin=origin))


def unknown_links(component: Component) -> Iterator[Reason]:
    """A component that needs something of a kind there is not can never fit."""
    for kind in component.needs:
        if kind not in PLANNED:
            guess = nearest(str(kind), PLANNED)
            yield Reason(f"{SINGULAR[component.kind]}.needs", f"needs something of the unknown kind {kind!r}{guess}")


def link_reasons(component: Component, name: str, others: Mapping[str, tuple[str, Component]]) -> Iterator[Reason]:
    """Why `component` does not fit beside `others`: kind → (shown name, component). Both directions are checked."""
    me = (name, component)
    for kind, other in others.items():
        if kind == component.kind:
            continue
        code = f"{SINGULAR[component.kind]}.link.{SINGULAR[kind]}"
        for (needing_name, needing), (offering_name, offering) in ((me, other), (other, me)):
            lacking = needing.needs.get(offering.kind, frozenset()) - offering.offers
            if lacking:
                whose = "" if needing is component else f"{needing_name} "
                offered = _plain(offering.offers) or "nothing"
                text = f"{whose}needs {_plain(lacking)} of the {SINGULAR[offering.kind]}; {offering_name} offers {offered}"
                yield Reason(code, text)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(item) for item in sorted(value, key=str))
    return str(value) if not hasattr(value, "low") else _range(value)


def _range(value: Any) -> str:
    steps = f", multiples of {value.multiple_of}" if value.multiple_of != 1 else ""
    return f"{value.low} to {value.high}{steps}"
