"""The parts for one device that runs, where the weights go from there, and the bytes it all takes: negotiate → place → ledger.

By a strategy everything stays on the device that runs if it fits there, pages of mapped files included. Otherwise weights are
spread, and parts are negotiated again if some are streamed, since not every quantizer's kernels can take that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from attrs import evolve, field, frozen

from modelrig.components import FLOATING, AttentionSpec, Catalog, ModelFacts, Snapshot
from modelrig.errors import ModelrigError, PlanError, PluginError, ResourceLimitError
from modelrig.planning.environment import Environment
from modelrig.planning.generation_config import GenerationConfig
from modelrig.planning.identify import Identified
from modelrig.planning.ledger import LOOKED_UP, Account, Ledger, Line, Weighed, add_up, weigh_each
from modelrig.planning.memory import broken_limit, human, require_fit
from modelrig.planning.needs import Situation
from modelrig.planning.negotiation import Negotiated, negotiate
from modelrig.planning.placement import Device, Placed, Weight, main_of, placed_by, runs, spread
from modelrig.planning.placement_maps import read_map
from modelrig.planning.places import Placement, tiers
from modelrig.planning.plan import RigPlan
from modelrig.planning.request import Request
from modelrig.planning.units import CPU, DISK, is_gpu
from modelrig.planning.values import AUTO
from modelrig.registry import Registry
from modelrig.registry.ledger import cause


@frozen(kw_only=True)
class Checkpoint:
    """What was identified: the parts that claim it, and all that is known without reading weights."""

    snapshot: Snapshot
    catalog: Catalog
    facts: ModelFacts
    scheme: str  # how its 2-D weights are stored
    parts: Mapping[str, Identified]
    generation: GenerationConfig
    notes: tuple[str, ...]


@frozen(kw_only=True)
class Decision:
    """What was settled for one device that runs."""

    situation: Situation
    negotiated: Negotiated
    device_map: Mapping[str, str]
    ledger: Ledger
    companions: Mapping[str, RigPlan]
    notes: tuple[str, ...]


@frozen(kw_only=True)
class Desk:
    """What every step of a decision looks at."""

    checkpoint: Checkpoint
    request: Request
    environment: Environment
    registry: Registry
    #: (reference, the situation of the model it works with) → plan
    plan_companion: Callable[[str, Situation], RigPlan]
    _weighed: dict[Any, list[Weighed]] = field(factory=dict, init=False, repr=False, eq=False)
    _companions: dict[Any, Mapping[str, RigPlan]] = field(factory=dict, init=False, repr=False, eq=False)

    def weighed(self, at: Situation, negotiated: Negotiated) -> list[Weighed]:
        """Every parameter's bytes, counted once for each way to hold them."""
        quantizer = negotiated.choices["quantizers"]
        key = (quantizer.id, repr(quantizer.options), at.dtype)
        if key not in self._weighed:
            facts, stored = self.checkpoint.facts, self.checkpoint.catalog
            self._weighed[key] = list(weigh_each(facts, stored, quantizer.registered.planner(), quantizer.options, at.dtype))
        return self._weighed[key]

    def companions(self, at: Situation, negotiated: Negotiated) -> Mapping[str, RigPlan]:
        """Role → the plan of a further model that the decoder works with."""
        decoder = negotiated.choices.get("decoders")
        named = None if decoder is None else getattr(decoder.registered.planner(), "companions", None)
        if decoder is None or named is None:
            return {}
        key = (decoder.id, repr(decoder.options), at.device, at.context, at.batch)
        if key in self._companions:
            return self._companions[key]
        made = {role: self.plan_companion(reference, at) for role, reference in named(decoder.options).items()}
        planner: Any = decoder.registered.planner()
        reasons = list(planner.check_companions(self.checkpoint.facts, self.checkpoint.snapshot, made))
        if reasons:
            text = "; ".join(f"{one.text} [{one.code}]" for one in reasons)
            refused = {"decoders": {decoder.component: tuple(reasons)}}
            raise PlanError("PN-REFUSED", f"the decoder {decoder.component}: {text}", refused=refused, hint=reasons[0].hint)
        self._companions[key] = made
        return made

    def negotiate(self, at: Situation) -> Negotiated:
        return negotiate(at, self.checkpoint.parts, self.request, self.registry)


def decide(situation: Situation, placement: Placement, desk: Desk) -> Decision:
    """The decision for `placement`. Raises `PlanError` and its subclasses when there is none."""
    if placement.device_map:
        return _by_map(situation, placement.device_map, desk)
    if placement.strategy is None:
        negotiated = desk.negotiate(situation)
        account = open_account(situation, desk, negotiated)
        return _whole(situation, desk, negotiated, account, _spread_out(situation, desk))
    return _by_strategy(situation, placement.strategy, desk)


Offers = Iterable[tuple[str, Account]]  # rigs that a hint may suggest, made when they are looked at


def _whole(at: Situation, desk: Desk, negotiated: Negotiated, account: Account, offers: Offers = ()) -> Decision:
    """All on one device. Mapped weights may exceed what is free."""
    return _decision(at, desk, negotiated, account, None, chain(_cheaper(at, desk), offers))


def _by_map(at: Situation, device_map: Mapping[str, str], desk: Desk) -> Decision:
    """Where a map of the caller's says. Raises `PlanError` (PN-MAP-*) for one that does not fit the model."""
    facts = desk.checkpoint.facts
    names = [Weight(one.name, 0, _tie(facts, one.name)) for one in facts.parameters]
    where = read_map(device_map, names, facts.blocks, facts.empty)
    main = main_of(where.values())
    at = evolve(at, device=main, streamed=any(not runs(device, main) for device in where.values()))
    negotiated = desk.negotiate(at)
    placed = placed_by(where, _weights(at, desk, negotiated), facts.blocks, main)
    account = open_account(at, desk, negotiated, placed)
    return _decision(at, desk, negotiated, account, placed, _spread_out(at, desk))


def _by_strategy(at: Situation, strategy: str, desk: Desk) -> Decision:
    """On the device that runs if that holds everything, else spread."""
    places = tiers(desk.request, desk.environment, gpus=is_gpu(at.device))
    can_stay = strategy == AUTO or sum(is_gpu(device.name) for device in places) < 2
    negotiated, too_much = desk.negotiate(at), ""
    account = open_account(at, desk, negotiated)
    if can_stay:
        ledger = account.draw(at.context, at.batch)
        broken = broken_limit(ledger, desk.request, desk.environment, with_pages=True)
        if broken is None:
            return _whole(at, desk, negotiated, account)
        device, needed, limit = broken
        too_much = f"with everything on {at.device}, {device} would need {human(needed)}; it has {human(limit.bytes)} ({limit.why})"
    try:
        decision = _spread(at, strategy, desk, negotiated, places)
        return evolve(decision, notes=(*([too_much] if too_much else []), *decision.notes))
    except PlanError as error:
        if not can_stay:
            raise
        try:
            return _whole(at, desk, negotiated, account)
        except ResourceLimitError as whole:
            reason = f"{whole.reason}\nwith weights on several devices: {error.reason}"
            raise ResourceLimitError(whole.code, reason, hint=whole.hint) from error


def _spread(at: Situation, strategy: str, desk: Desk, negotiated: Negotiated, places: Sequence[Device]) -> Decision:
    """Over all devices. What streams is negotiated anew, and so is what would have kept copies that do not fit."""
    placed = _placed(at, strategy, desk, negotiated, places)
    if not placed.streamed:
        try:
            return _settled(at, desk, negotiated, placed)
        except ResourceLimitError:  # because of kernels' copies
            pass
    at = evolve(at, streamed=True)
    negotiated = desk.negotiate(at)
    placed = _placed(at, strategy, desk, negotiated, places)
    return _settled(at, desk, negotiated, placed)


def _settled(at: Situation, desk: Desk, negotiated: Negotiated, placed: Placed) -> Decision:
    at = evolve(at, device=placed.main)
    return _decision(at, desk, negotiated, open_account(at, desk, negotiated, placed), placed)


def _spread_out(at: Situation, desk: Desk) -> Iterator[tuple[str, Account]]:
    """The same request with weights wherever there is room."""
    at = evolve(at, streamed=True)
    try:
        negotiated = desk.negotiate(at)
        placed = _placed(at, AUTO, desk, negotiated, tiers(desk.request, desk.environment, gpus=is_gpu(at.device)))
        yield f"device_map={AUTO!r}", open_account(evolve(at, device=placed.main), desk, negotiated, placed)
    except ModelrigError:
        return


def _decision(
    at: Situation, desk: Desk, negotiated: Negotiated, account: Account, placed: Placed | None, offers: Offers = ()
) -> Decision:
    ledger, notes = require_fit(account, at.context, at.batch, desk.request, desk.environment, iter(offers))
    return Decision(
        situation=at,
        negotiated=negotiated,
        device_map={"": at.device} if placed is None else placed.device_map,
        ledger=ledger,
        companions=desk.companions(at, negotiated),
        notes=(*negotiated.notes, *_streaming_notes(placed), *notes),
    )


def _streaming_notes(placed: Placed | None) -> Iterator[str]:
    if placed is not None and placed.streamed:
        sizes = {name: placed.totals[name] - (placed.looked_up if name == DISK else 0) for name in placed.streamed}
        parts = " and ".join(f"{human(size)} from {name}" for name, size in sizes.items())
        total = human(sum(placed.totals.values()))
        if any(sizes.values()):
            yield f"of {total} of weights, {parts} are brought to {placed.main} in each step, the next block while one computes"
    if placed is not None and placed.looked_up:
        yield f"embeddings of {human(placed.looked_up)} stay on disk; the rows that are needed are looked up there"


# ------------------------------------------------------------------------------------------------ places


def _placed(at: Situation, strategy: str, desk: Desk, negotiated: Negotiated, places: Sequence[Device]) -> Placed:
    """The weights by a strategy, each device keeping a reserve for what it does beside holding them."""
    facts = desk.checkpoint.facts
    account = open_account(at, desk, negotiated)
    # On several GPUs each keeps the cache of its own layers.
    several = sum(is_gpu(device.name) for device in places) > 1 and len(facts.layers) == len(facts.blocks)
    beside: dict[str, int] = {}
    if several:
        of_layer = {spec: account.cache_places(at.device, at.context, at.batch, (spec,)) for spec in set(facts.cached_layers)}
        size = {spec: places.get(at.device, 0) for spec, places in of_layer.items()}
        beside = {block: size.get(spec, 0) for block, spec in zip(facts.blocks, facts.layers, strict=True)}
    reserve = {
        device.name: account.reserve(device.name, at.context, at.batch, with_cache=not (several and is_gpu(device.name)))
        for device in places
    }
    devices = [evolve(device, reserve=reserve[device.name]) for device in places]
    return spread(_weights(at, desk, negotiated), devices, strategy=strategy, blocks=facts.blocks, beside=beside)


def _weights(at: Situation, desk: Desk, negotiated: Negotiated) -> list[Weight]:
    facts = desk.checkpoint.facts
    sizes = {one.parameter.name: one.size + one.beside for one in desk.weighed(at, negotiated)}
    # A GPU cannot look into a mapped file.
    lookups = {one.parameter.name for one in desk.weighed(at, negotiated) if one.is_view and one.parameter.role == LOOKED_UP}
    lookups = lookups.difference(facts.ties.values()) if at.device == CPU else set()
    return [Weight(name, sizes[facts.ties.get(name, name)], _tie(facts, name), name in lookups) for name in sizes]


def _tie(facts: ModelFacts, name: str) -> str | None:
    """The group of parameters that share one storage, by the name of the one that has it."""
    return facts.ties.get(name, name) if facts.ties else None


# ------------------------------------------------------------------------------------------------ bytes


def open_account(at: Situation, desk: Desk, negotiated: Negotiated, placed: Placed | None = None) -> Account:
    """What the ledger is drawn up from; without `placed` everything is on the device that runs.

    Raises:
        PluginError: PL-CONTRACT when a planner cannot say its bytes.
    """
    quantizer, cache = negotiated.choices["quantizers"], negotiated.choices.get("caches")
    try:
        parts = add_up(desk.weighed(at, negotiated), at.device, None if placed is None else placed.where)
        account = Account(
            device=at.device,
            dtype=at.dtype,
            facts=desk.checkpoint.facts,
            weights=parts.pop(at.device),
            cache=None if cache is None else cache.registered.planner(),
            cache_options=None if cache is None else cache.options,
            elsewhere=parts,
            slots=0 if placed is None else placed.slots,
            layers={} if placed is None else _layers(placed, desk.checkpoint.facts),
            copies=_copies(negotiated),
            beside=tuple(_lines_beside(desk.companions(at, negotiated))),
        )
        account.cache_places(at.device, at.context, at.batch, account.facts.cached_layers)
    except (ModelrigError, MemoryError):
        raise
    except Exception as error:
        text = f"{quantizer.id}{'' if cache is None else f' or {cache.id}'} failed to count its bytes: {cause(error)}"
        raise PluginError("PL-CONTRACT", text) from error
    return account


def _copies(negotiated: Negotiated) -> int:
    decoder = negotiated.choices.get("decoders")
    copies_of = None if decoder is None else getattr(decoder.registered.planner(), "copies", None)
    return 0 if decoder is None or copies_of is None else int(copies_of(decoder.options))


def _lines_beside(companions: Mapping[str, RigPlan]) -> Iterator[Line]:
    for role, plan in companions.items():
        for line in plan.ledger:
            yield evolve(line, model=role)


def _layers(placed: Placed, facts: ModelFacts) -> dict[str, tuple[AttentionSpec, ...]]:
    """GPU → the layers it runs and caches, where several run; nothing where one device runs all."""
    running = [device for device in placed.totals if runs(device, placed.main)]
    if len(running) < 2 or len(facts.layers) != len(facts.blocks):
        return {}
    at: dict[str, list[AttentionSpec]] = {}
    for block, spec in zip(facts.blocks, facts.layers, strict=True):
        device = placed.device_of(block)
        if spec.causal:
            at.setdefault(device if device in running else placed.main, []).append(spec)
    return {device: tuple(layers) for device, layers in at.items()}


def _cheaper(at: Situation, desk: Desk) -> Iterator[tuple[str, Account]]:
    """The same request in dtypes that might take less: as stored, then in 16 bits."""
    stored = {entry.dtype for entry in desk.checkpoint.catalog.entries.values()}
    for dtype in sorted(FLOATING, key=lambda name: (name not in stored, FLOATING.index(name))):
        if dtype == at.dtype or not (dtype in stored or dtype == "bfloat16"):
            continue
        other = evolve(at, dtype=dtype)
        try:
            yield f"dtype={dtype!r}", open_account(other, desk, desk.negotiate(other))
        except ModelrigError:
            continue
