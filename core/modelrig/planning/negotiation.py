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

from modelrig.components import SLOTS, Reason
from modelrig.errors import ModelrigError, PlanError, RequestError, quoted
from modelrig.planning.candidates import Candidate, Field, Refusal, check, check_preferences, gather
from modelrig.planning.identify import Identified
from modelrig.planning.needs import Situation, decoder_need
from modelrig.planning.request import DEFAULT, Request
from modelrig.planning.rules import link_reasons, unary_reasons
from modelrig.planning.solver import Part, fits_beside, solve
from modelrig.planning.values import NOTHING, Wish
from modelrig.registry import Registered, Registry

__all__ = ["Choice", "Negotiated", "Refusal", "negotiate"]

#: slots that only a model that generates has a use for
GENERATING = ("cache", "decoder")


@frozen(kw_only=True)
class Choice:
    """The component of one kind. `component` is its name in a config: the short one, or the full id where that is ambiguous."""

    component: str
    id: str
    name: str
    why: str
    options: Any = None
    registered: Registered


@frozen(kw_only=True)
class Negotiated:
    choices: Mapping[str, Choice]
    refused: tuple[Refusal, ...]
    decoder_when_sampling: Choice | None
    notes: tuple[str, ...] = ()


def negotiate(situation: Situation, fixed: Mapping[str, Identified], request: Request, registry: Registry) -> Negotiated:
    """Choose a component for every slot.

    Args:
        fixed: the identified kinds, which the others must fit beside.

    Raises:
        PlanError: PN-REFUSED when something asked for cannot serve, PN-NONE when nothing does.
        RequestError, PluginError: a name that means nothing, options that do not fit, a component that is not usable.
    """
    check_preferences(request, registry)
    unused = () if situation.facts.generates else GENERATING
    require_no_wish(unused, situation, request, registry)
    fields = [gather(slot, situation, request, registry) for slot in SLOTS if slot not in unused]
    beside = {kind: Part(one.registered.name, one.registered.descriptor) for kind, one in fixed.items()}
    fields, chosen = search(fields, beside)
    if chosen is None:
        _raise_no_solution(fields, beside)
    sampling = None if unused else decoder_when_sampling(fields, chosen, beside, situation)
    choices = {field.kind: _choice(field, chosen[field.kind]) for field in fields}
    refused = [row for field in fields for row in _refusals(field, chosen, beside, sampling)]
    return Negotiated(
        choices=choices,
        refused=tuple(refused),
        decoder_when_sampling=None if sampling is None else _sampling_choice(sampling, choices["decoders"]),
        notes=(*((no_use(situation),) if unused else ()), *_notes(fields, chosen)),
    )


def require_no_wish(slots: Sequence[str], situation: Situation, request: Request, registry: Registry) -> None:
    """Raise `PlanError` (PN-REFUSED) if a component, or an option, was asked for in a slot that this model has no use for."""
    refused: dict[str, dict[str, tuple[Reason, ...]]] = {}
    lines = []
    for slot in slots:
        wish = request.wish(slot)
        if wish.names == (NOTHING,):
            continue
        field = gather(slot, situation, request, registry)  # a name that means nothing is a mistake here too
        if wish.otherwise and not wish.options:
            continue
        reason = Reason("model.generates", no_use(situation), f"leave {slot} at 'auto'")
        named = [one.shown for one in field.candidates if one.place is not None] + [row.component for row in field.absent]
        refused[field.kind] = dict.fromkeys(named, (reason,))
        lines.append(f"{slot} {', '.join(map(quoted, named)) or 'options'} (asked for by {field.origin})")
    if lines:
        reason = Reason("model.generates", no_use(situation))
        text = f"cannot serve: {' and '.join(lines)}: {_told([reason])}"
        raise PlanError("PN-REFUSED", text, refused=refused, hint="leave cache and decoder at 'auto'")


def no_use(situation: Situation) -> str:
    """Why there is neither cache nor decoder."""
    return f"this {situation.facts.architecture} model is an encoder: it generates no text, so it has no cache and no decoder"


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
        remarks = getattr(one.registered.planner(), "notes", None)
        if remarks is not None:
            yield from (f"{field.slot} {one.shown}: {remark}" for remark in remarks(field.need_of(one), one.options))


# ------------------------------------------------------------------------------------------------ no solution


def _raise_no_solution(fields: Sequence[Field], beside: Mapping[str, Part]) -> NoReturn:
    """PN-REFUSED naming what was asked for and cannot serve, or PN-NONE; every candidate's reasons and the nearest way out."""
    for field in fields:
        _require_known_options(field)
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
    what = "cannot serve:" if asked else "no combination of components fits:"
    lines = asked or others or ["each fits alone, but no combination does"]
    text = what + (f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  - {line}" for line in lines))
    raise PlanError(code, text, refused=refused, hint=_nearest_working(fields, beside))


def _require_known_options(field: Field) -> None:
    """Options that every component that could serve refuses are a mistake of the request. Raises `RequestError` (RQ-VALUE)."""
    code = f"{field.slot}.options"
    found = [(one.shown, reason.text) for one in field.candidates for reason in one.reasons if reason.code == code]
    is_taken = any(one.options is not None for one in field.candidates)  # by one that other reasons speak against
    if found and not is_taken and all(one.reasons for one in field.candidates):
        texts = "; ".join(f"{name}: {text}" for name, text in found)
        raise RequestError("RQ-VALUE", f"no {field.slot} that fits takes these options: {texts}", locus=field.slot)


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
