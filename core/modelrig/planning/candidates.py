"""The candidates of a slot: every component of its kind, matched alone with the need.

What data says against a component is found at once for all of them. Its planner is imported and asked (`check`) only when the
component is considered: those `auto` would not take while another fits are never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import evolve, frozen

from modelrig.components import KINDS, SLOTS, Component, Quantizer, Reason
from modelrig.errors import PluginError, RequestError, quoted
from modelrig.planning.needs import NEEDS, PLAIN, Need, Situation
from modelrig.planning.options import OptionsError, structure
from modelrig.planning.probes import Finding, Probe, find, not_asked
from modelrig.planning.request import Request
from modelrig.planning.rules import unary_reasons, unknown_links
from modelrig.planning.solver import Part
from modelrig.planning.values import Wish
from modelrig.registry import Registered, Registry
from modelrig.registry.ledger import cause


@frozen
class Refusal:
    """A component that was not chosen, with every reason."""

    kind: str
    component: str
    reasons: tuple[Reason, ...]


@frozen(kw_only=True)
class Candidate:
    """A component on its way to being chosen or refused.

    `is_base`: asked for, preferred, or ours and without an optional package, so `auto` may take it. `is_checked`: its planner was
    asked. `given` are the options as written.
    """

    registered: Registered
    shown: str
    place: int | None  # in the wish's names
    is_base: bool
    given: Mapping[str, Any]
    is_checked: bool = False
    options: Any = None
    reasons: tuple[Reason, ...] = ()

    @property
    def part(self) -> Part:
        return Part(self.shown, self.registered.descriptor)


@frozen(kw_only=True)
class Field:
    """All candidates of one slot, in the order in which they are tried, and rows for names that are no candidates."""

    slot: str
    kind: str
    wish: Wish
    origin: str
    need: Need
    candidates: tuple[Candidate, ...]
    absent: tuple[Refusal, ...] = ()
    probe: Callable[[Probe], Finding | None] = not_asked

    def need_of(self, candidate: Candidate) -> Need:
        """The need as the candidate's planner sees it: only what was asked for by name may try something out."""
        return self.need if candidate.place is None else evolve(self.need, probe=self.probe)


def check_preferences(request: Request, registry: Registry) -> None:
    """A preferred name that is nobody's is a mistake. Raises `RequestError` (RQ-NAME)."""
    for name in request.prefer:
        if not any(name in (one.name, one.id) for kind in KINDS for one in registry.components(kind)):
            origin = request.origin("prefer")
            raise RequestError("RQ-NAME", f"no component is called {quoted(name)} (prefer: {origin})", locus="prefer")


def gather(slot: str, situation: Situation, request: Request, registry: Registry) -> Field:
    """Every component of the slot's kind with what data says against it, and the named ones that are not there."""
    kind, wish, origin = SLOTS[slot], request.wish(slot), request.origin(slot)
    need = NEEDS[kind](situation)
    there = registry.components(kind, request.prefer)
    with _said_by(slot, origin):
        places, absent = _named(kind, wish, registry, there)
        excluded = {component_id for name in wish.excluded for component_id in _ids(kind, name, registry, there)}
    preferred = {one.id for one in there if one.name in request.prefer or one.id in request.prefer}
    names = [one.name for one in there if one.state != "disabled"]
    candidates = []
    for one in sorted(there, key=lambda one: places.get(one.id, len(places))):  # stable: the registry's order otherwise
        reasons = list(_state_reasons(one))
        if one.id in excluded:
            reasons.append(Reason("request.excluded", f"excluded by {origin}"))
        if not wish.otherwise and one.id not in places:
            reasons.append(Reason("request.pinned", f"{slot} is {' or '.join(map(quoted, wish.names))} by {origin}"))
        is_wanted = one.id in places or one.id in preferred
        if one.state == "active":
            reasons += [*unary_reasons(one.descriptor, need), *unknown_links(one.descriptor)]
            if not is_wanted and _is_lossier(one.descriptor, situation.scheme):
                reasons.append(Reason("auto.lossy", "auto never makes a model lossier", f"ask for it: {slot}={one.name!r}"))
        candidates.append(
            Candidate(
                registered=one,
                shown=one.name if names.count(one.name) < 2 else one.id,
                place=places.get(one.id),
                is_base=is_wanted or (one.is_ours and not one.descriptor.requires),
                given=wish.options_of(one.name, one.id),
                reasons=tuple(reasons),
            )
        )
    return Field(
        slot=slot,
        kind=kind,
        wish=wish,
        origin=origin,
        need=need,
        candidates=tuple(candidates),
        absent=tuple(absent),
        probe=find if situation.is_here else not_asked,
    )


@contextmanager
def _said_by(slot: str, origin: str) -> Iterator[None]:
    """A name that cannot be used is a problem of the place where it is written: an argument, a variable, a file."""
    try:
        yield
    except RequestError as error:
        raise RequestError(error.code, f"{error.reason} (asked for by {origin})", locus=slot, hint=error.hint) from error


def _named(kind: str, wish: Wish, registry: Registry, there: Sequence[Registered]) -> tuple[dict[str, int], list[Refusal]]:
    """Component id → place in the wish, and rows for names nobody has. A pin is an error instead of a row."""
    places: dict[str, int] = {}
    absent = []
    for place, name in enumerate(wish.names):
        try:
            places.setdefault(registry.find(kind, name).id, place)
        except (RequestError, PluginError) as error:
            if wish.is_pin or error.code == "RQ-AMBIGUOUS":
                raise
            same = [one for one in there if name in (one.name, one.id)]
            if same:  # a row of its own says what is the matter with it
                places.setdefault(same[0].id, place)
            else:
                absent.append(Refusal(kind, name, (Reason("request.unknown", error.reason, error.hint),)))
    return places, absent


def _ids(kind: str, name: str, registry: Registry, there: Sequence[Registered]) -> Iterator[str]:
    """Ids of everything called `name`, usable or not. Raises `RequestError` (RQ-NAME) if nothing is."""
    found = [one.id for one in there if name in (one.name, one.id)]
    yield from found or [registry.find(kind, name).id]


def _state_reasons(one: Registered) -> Iterator[Reason]:
    if one.state != "active":
        install = one.descriptor.install
        is_said = install is not None and install in (one.reason or "")
        yield Reason(f"plugin.{one.state}", f"{one.state}: {one.reason}", None if is_said else install)


def _is_lossier(descriptor: Component, scheme: str) -> bool:
    """Whether it would lose something the checkpoint still has. Reading what is quantised already loses nothing more."""
    capabilities = getattr(descriptor, "capabilities", None)
    if not isinstance(descriptor, Quantizer):
        return getattr(capabilities, "lossy", False)
    return not getattr(capabilities, "lossless", False) and not (scheme != PLAIN and scheme in getattr(capabilities, "reads", ()))


def check(field: Field, candidate: Candidate) -> Candidate:
    """The candidate with its options made and its planner asked. What fails becomes a reason, or an error where it is pinned."""
    if candidate.is_checked or candidate.reasons:
        return candidate
    one, need, reasons, options = candidate.registered, field.need_of(candidate), [], None
    try:
        planner = one.planner()
        options = structure(planner, candidate.given)
        ask = getattr(planner, "check", None)
        reasons = [] if ask is None else [_reason(reason) for reason in ask(need, options)]
        settle = getattr(planner, "settle", None)
        if settle is not None and not reasons:
            options = settle(need, options)
    except OptionsError as error:
        if field.wish.is_pin:
            code, locus = ("RQ-UNKNOWN" if error.is_unknown else "RQ-VALUE"), f"{field.slot} {one.name}"
            raise RequestError(code, f"{error} (asked for by {field.origin})", locus=locus) from error
        reasons = [Reason(f"{field.slot}.options", str(error))]
    except PluginError as error:
        if field.wish.is_pin:
            raise
        reasons = [Reason("plugin.broken", error.reason)]
    except MemoryError:
        raise
    except Exception as error:
        reasons = [Reason("plugin.failed", f"its planner failed: {cause(error)}")]
    return evolve(candidate, options=options, reasons=tuple(reasons), is_checked=True)


def _reason(reason: object) -> Reason:
    if not isinstance(reason, Reason):
        raise TypeError(f"check returned {quoted(reason)}, which is no Reason")
    return reason
