"""Which component serves each kind, and why every other one does not.

    result = negotiate(situation, fixed, request, registry)
    result.choices["attention"].name, result.choices["attention"].why
    result.refused                            every other component with all its reasons

A component is first matched alone (rules, then its planner's `check`), then beside the others (`modelrig.planning.solver`). What
was asked for by name is a hard wish: when it cannot serve, that is an error with its reasons and the nearest combination that
works. `auto` first tries our own components that need no optional package; only when nothing of that fits it looks further. So
installing a package never changes what a request resolves to, unless nothing fitted before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NoReturn

from attrs import evolve, frozen

from modelrig.components import SLOTS, Quantizer, Reason
from modelrig.errors import ModelrigError, PlanError, PluginError, RequestError, quoted
from modelrig.planning.identify import Identified
from modelrig.planning.needs import NEEDS, Need, Situation, decoder_need
from modelrig.planning.options import OptionsError, structure
from modelrig.planning.request import DEFAULT, Request
from modelrig.planning.rules import link_reasons, unary_reasons, unknown_links
from modelrig.planning.solver import Part, fits_beside, solve
from modelrig.planning.values import Wish
from modelrig.registry import Registered, Registry
from modelrig.registry.ledger import cause

SLOT_OF = {kind: slot for slot, kind in SLOTS.items()}


@frozen(kw_only=True)
class Choice:
    """The component of one kind. `component` is its name in a config: the short one, or the full id where that is ambiguous."""

    component: str
    id: str
    name: str
    why: str
    options: Any = None
    registered: Registered


@frozen
class Refusal:
    """A component that was not chosen, with every reason."""

    kind: str
    component: str
    reasons: tuple[Reason, ...]


@frozen(kw_only=True)
class Negotiated:
    choices: Mapping[str, Choice]
    refused: tuple[Refusal, ...]
    decoder_when_sampling: Choice | None
    notes: tuple[str, ...] = ()


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


def negotiate(situation: Situation, fixed: Mapping[str, Identified], request: Request, registry: Registry) -> Negotiated:
    """Choose a component for every slot.

    Args:
        fixed: the identified kinds, which the others must fit beside.

    Raises:
        PlanError: PN-REFUSED when something asked for cannot serve, PN-NONE when nothing does.
        RequestError, PluginError: a name that means nothing, options that do not fit, a component that is not usable.
    """
    check_preferences(request, registry)
    fields = [gather(slot, situation, request, registry) for slot in SLOTS]
    beside = {kind: Part(one.registered.name, one.registered.descriptor) for kind, one in fixed.items()}
    fields, chosen = search(fields, beside)
    if chosen is None:
        _raise_no_solution(fields, beside)
    sampling = decoder_when_sampling(fields, chosen, beside, situation)
    choices = {field.kind: _choice(field, chosen[field.kind]) for field in fields}
    refused = [row for field in fields for row in _refusals(field, chosen, beside, sampling)]
    return Negotiated(
        choices=choices,
        refused=tuple(refused),
        decoder_when_sampling=None if sampling is None else _sampling_choice(sampling, choices["decoders"]),
        notes=tuple(_notes(fields, chosen)),
    )


# ------------------------------------------------------------------------------------------------ candidates


def check_preferences(request: Request, registry: Registry) -> None:
    """A preferred name that is nobody's is a mistake. Raises `RequestError` (RQ-NAME)."""
    for name in request.prefer:
        if not any(name in (one.name, one.id) for kind in SLOTS.values() for one in registry.components(kind)):
            origin = request.origin("prefer")
            raise RequestError("RQ-NAME", f"no component is called {quoted(name)} (prefer: {origin})", locus="prefer")


def gather(slot: str, situation: Situation, request: Request, registry: Registry) -> Field:
    """Every component of the slot's kind with what data says against it, and the named ones that are not there."""
    kind, wish, origin = SLOTS[slot], request.wish(slot), request.origin(slot)
    need = NEEDS[kind](situation)
    there = registry.components(kind, request.prefer)
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
            if not is_wanted and isinstance(one.descriptor, Quantizer) and _is_lossier(one.descriptor, situation.scheme):
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
    return Field(slot=slot, kind=kind, wish=wish, origin=origin, need=need, candidates=tuple(candidates), absent=tuple(absent))


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
        yield Reason(f"plugin.{one.state}", f"{one.state}: {one.reason}", one.descriptor.install)


def _is_lossier(quantizer: Quantizer, scheme: str) -> bool:
    """Whether it would lose something the checkpoint still has. Reading what is quantised already loses nothing more."""
    capabilities = quantizer.capabilities
    return not getattr(capabilities, "lossless", False) and not (scheme != "none" and scheme in getattr(capabilities, "reads", ()))


def check(field: Field, candidate: Candidate) -> Candidate:
    """The candidate with its options made and its planner asked. What fails becomes a reason, or an error where it is pinned."""
    if candidate.is_checked or candidate.reasons:
        return candidate
    one, reasons, options = candidate.registered, [], None
    try:
        planner = one.planner()
        options = structure(planner, candidate.given)
        ask = getattr(planner, "check", None)
        reasons = [] if ask is None else [_reason(reason) for reason in ask(field.need, options)]
    except OptionsError as error:
        if field.wish.is_pin:
            code, locus = ("RQ-UNKNOWN" if error.is_unknown else "RQ-VALUE"), f"{field.slot} {one.name}"
            raise RequestError(code, str(error), locus=locus) from error
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


# ------------------------------------------------------------------------------------------------ search


def search(fields: Sequence[Field], beside: Mapping[str, Part]) -> tuple[list[Field], dict[str, Candidate] | None]:
    """(the fields with what was found out on the way, kind → chosen candidate or None if there is no combination).

    First among what `auto` may take; only if that has no solution among everything.
    """
    found: list[Field] = list(fields)
    for only_base in (True, False):
        found = [
            evolve(field, candidates=tuple(check(field, one) if one.is_base or not only_base else one for one in field.candidates))
            for field in found
        ]
        domains = {
            field.kind: [one for one in field.candidates if not one.reasons and (one.is_base or not only_base)] for field in found
        }
        # A wish decides before `auto` does, so that its order is kept.
        order = sorted(found, key=lambda field: not field.wish.names)
        solution = solve({field.kind: [one.part for one in domains[field.kind]] for field in order}, beside)
        if solution is not None:
            return found, {field.kind: domains[field.kind][solution[field.kind]] for field in found}
    return found, None


def decoder_when_sampling(
    fields: Sequence[Field], chosen: Mapping[str, Candidate], beside: Mapping[str, Part], situation: Situation
) -> Candidate | None:
    """The decoder for calls with a temperature: the chosen one if it samples, else the first that does and was not excluded."""
    field = next(field for field in fields if field.kind == "decoders")
    field = evolve(field, need=decoder_need(situation, samples=True))
    others = {**beside, **{kind: one.part for kind, one in chosen.items() if kind != "decoders"}}
    candidates = [chosen["decoders"], *(one for one in field.candidates if one is not chosen["decoders"])]
    for only_base in (True, False):
        for one in candidates:
            if one.reasons or (only_base and not one.is_base) or any(unary_reasons(one.registered.descriptor, field.need)):
                continue
            one = check(field, evolve(one, is_checked=False))
            if not one.reasons and fits_beside(one.part, others):
                return one
    return None


# ------------------------------------------------------------------------------------------------ what is reported


def _choice(field: Field, one: Candidate) -> Choice:
    return Choice(
        component=one.shown,
        id=one.registered.id,
        name=one.registered.name,
        why=_why(field, one),
        options=one.options,
        registered=one.registered,
    )


def _sampling_choice(one: Candidate, chosen: Choice) -> Choice:
    if one.registered.id == chosen.id:
        return chosen
    return Choice(
        component=one.shown,
        id=one.registered.id,
        name=one.registered.name,
        why="when a call asks for a temperature",
        options=one.options,
        registered=one.registered,
    )


def _why(field: Field, chosen: Candidate) -> str:
    if field.wish.is_pin:
        return "the default" if field.origin == DEFAULT else f"asked for by {field.origin}"
    if chosen.place is not None:
        ordinal = f"number {chosen.place + 1} of {len(field.wish.names)}"
        return f"the first that fits of those asked for by {field.origin} ({ordinal})"
    fitting = [one for one in field.candidates if not one.reasons and one is not chosen and one.is_base]
    if not fitting:
        return "auto: the only one that fits" + ("" if chosen.is_base else " (nothing of our own does)")
    return f"auto: before {fitting[0].shown} by {_precedence(chosen, fitting[0])}"


def _precedence(first: Candidate, second: Candidate) -> str:
    """What puts `first` before `second` in the registry's order, for people."""
    if second.place is not None or first.place is not None:
        return "the order asked for"
    if first.registered.descriptor.experimental != second.registered.descriptor.experimental:
        return "being no experiment"
    if first.registered.is_ours != second.registered.is_ours:
        return "being our own"
    ranks = first.registered.descriptor.rank, second.registered.descriptor.rank
    return f"rank {ranks[0]} < {ranks[1]}" if ranks[0] < ranks[1] else "preference or id"


def _refusals(
    field: Field, chosen: Mapping[str, Candidate], beside: Mapping[str, Part], sampling: Candidate | None
) -> Iterator[Refusal]:
    winner = chosen[field.kind]
    others = {**beside, **{kind: one.part for kind, one in chosen.items() if kind != field.kind}}
    for one in field.candidates:
        if one is winner or (field.kind == "decoders" and sampling and one.registered.id == sampling.registered.id):
            continue
        reasons = list(one.reasons)
        if one.registered.state == "active":
            reasons += _links(one, others)
        if not reasons:
            reasons.append(_passed_over(field, one, winner))
        yield Refusal(field.kind, one.shown, tuple(reasons))
    yield from field.absent


def _links(one: Candidate, others: Mapping[str, Part]) -> Iterator[Reason]:
    named = {kind: (part.name, part.descriptor) for kind, part in others.items()}
    return link_reasons(one.registered.descriptor, one.shown, named)


def _passed_over(field: Field, one: Candidate, winner: Candidate) -> Reason:
    hint = f"ask for it: {field.slot}={one.shown!r}"
    if one.is_base or not winner.is_base:
        return Reason("auto.order", f"fits too; {winner.shown} comes before it by {_precedence(winner, one)}", hint)
    code, what = ("auto.optional", "that needs an optional package") if one.registered.is_ours else ("auto.outside", "from outside")
    return Reason(code, f"offered, but auto takes nothing {what} while {winner.shown} fits", hint)


def _notes(fields: Sequence[Field], chosen: Mapping[str, Candidate]) -> Iterator[str]:
    for field in fields:
        one = chosen[field.kind]
        if one.registered.descriptor.plans_with_torch:
            yield f"the planner of {one.shown} needs torch, so this plan imported it"
        if one.registered.descriptor.experimental:
            yield f"{field.slot} {one.shown} is experimental"


# ------------------------------------------------------------------------------------------------ no solution


def _raise_no_solution(fields: Sequence[Field], beside: Mapping[str, Part]) -> NoReturn:
    """PN-REFUSED naming what was asked for and cannot serve, or PN-NONE; every candidate's reasons and the nearest way out."""
    viable = {field.kind: [one for one in field.candidates if not one.reasons] for field in fields}
    refused: dict[str, dict[str, tuple[Reason, ...]]] = {}
    asked: list[str] = []
    others: list[str] = []
    for field in fields:
        rows = {row.component: row.reasons for row in field.absent}
        for one in field.candidates:
            reasons = (*one.reasons, *_blocked(one, viable, beside))
            if reasons:
                rows[one.shown] = reasons
            if field.wish.names and one.place is not None and reasons:
                asked.append(f"{field.slot} {one.shown!r} (asked for by {field.origin}): {_told(reasons)}")
            elif not field.wish.names and not viable[field.kind]:
                others.append(f"{field.slot} {one.shown!r}: {_told(reasons)}")
        asked += [f"{field.slot} {row.component!r} (asked for by {field.origin}): {_told(row.reasons)}" for row in field.absent]
        if not field.candidates:
            others.append(f"{field.slot}: no component is installed")
        if rows:
            refused[field.kind] = rows
    if not asked and not others:
        asked = [
            f"{field.slot}={'|'.join(field.wish.names)} does not fit together with the rest" for field in fields if field.wish.names
        ]
    code = "PN-REFUSED" if asked else "PN-NONE"
    what = "cannot serve: " if asked else "no combination of components fits: "
    lines = asked or others or ["each fits alone, but no combination does"]
    text = what + (lines[0] if len(lines) == 1 else "".join(f"\n  - {line}" for line in lines))
    raise PlanError(code, text, refused=refused, hint=_nearest_working(fields, beside))


def _blocked(one: Candidate, viable: Mapping[str, Sequence[Candidate]], beside: Mapping[str, Part]) -> Iterator[Reason]:
    """Link reasons that stand whatever else is chosen: against what is fixed, and against kinds none of whose candidates fit."""
    if one.registered.state != "active":
        return
    yield from _links(one, beside)
    for kind, candidates in viable.items():
        if (
            kind != one.registered.kind
            and candidates
            and not any(fits_beside(one.part, {kind: other.part}) for other in candidates)
        ):
            yield from _links(one, {kind: candidates[0].part})


def _told(reasons: Sequence[Reason]) -> str:
    return "; ".join(f"{reason.text} [{reason.code}]" for reason in reasons)


def _nearest_working(fields: Sequence[Field], beside: Mapping[str, Part]) -> str | None:
    """The combination that gives up the fewest wishes, as a sentence; None if there is none at all."""
    wishful = [field for field in fields if field.wish.names or field.wish.excluded]
    for count in range(1, len(wishful) + 1):
        for given_up in combinations(wishful, count):
            relaxed = [_without_wish(field) if field in given_up else field for field in fields]
            try:
                _, chosen = search(relaxed, beside)
            except ModelrigError:
                continue
            if chosen is not None:
                rig = ", ".join(f"{field.slot}={chosen[field.kind].shown!r}" for field in fields)
                return f"nearest combination that works: {rig}"
    return None


def _without_wish(field: Field) -> Field:
    """The field as `auto` would see it."""
    candidates = []
    for one in field.candidates:
        reasons = tuple(reason for reason in one.reasons if not reason.code.startswith("request."))
        candidates.append(evolve(one, reasons=reasons, place=None, given={}, is_checked=False))
    return evolve(field, wish=Wish(), candidates=tuple(candidates), absent=())
