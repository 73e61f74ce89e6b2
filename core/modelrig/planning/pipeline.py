"""From a reference and a request to a plan: resolve → catalog → describe → negotiate → place → plan.

Only configs and tensor headers are read; torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from attrs import evolve

from modelrig.checkpoint.folder import consistently
from modelrig.checkpoint.matching import match, require_weights
from modelrig.components import FLOATING, ModelFacts, Snapshot
from modelrig.errors import PlanError
from modelrig.planning.deciding import Checkpoint, Decision, Desk, decide
from modelrig.planning.environment import Environment, read_environment
from modelrig.planning.generation_config import read_generation
from modelrig.planning.identify import (
    CONFIG,
    Identified,
    catalog,
    check_reference,
    config_notes,
    describe,
    possible_folder,
    read_config,
    resolve,
)
from modelrig.planning.measured import machine_of
from modelrig.planning.needs import PLAIN, Situation, stored_scheme
from modelrig.planning.negotiation import Choice
from modelrig.planning.places import notes_on_limits, place
from modelrig.planning.plan import RigPlan
from modelrig.planning.request import Request, read_request
from modelrig.planning.tokenizer_files import find_other_form
from modelrig.planning.values import AUTO
from modelrig.registry import Registry, current

USUAL_CONTEXT = 4096  # tokens `auto` plans for at most

P = TypeVar("P", bound=RigPlan)


def make_plan(
    reference: str | os.PathLike[str],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    environment: Environment | None = None,
    registry: Registry | None = None,
    environ: Mapping[str, str] | None = None,
    cls: type[P] = RigPlan,  # type: ignore[assignment]
    **request: Any,
) -> P:
    """Decide how `reference` would be loaded and run.

    Args:
        reference: a folder, `org/name[@rev]` or a bundled name.
        config: a TOML file or a mapping of request keys, instead of `modelrig.toml` in the working directory.
        environment: the machine to plan for; this one by default.
        registry: the components to choose from; those installed and not disabled by default.
        environ: the environment variables that count as part of the request; those of this process by default.
        cls: the class of the result.
        **request: keys of `modelrig.planning.request.Request`, and `set`.

    Raises:
        RequestError, CheckpointError, PlanError, PluginError, LoadError (the tensors do not fill the model).
    """
    text = check_reference(reference)
    # `disable` and `variant` count before any plugin is asked, so they are read before the checkpoint's folder is known.
    early = read_request(request, config, environ=environ, checkpoint=possible_folder(text))
    registry = current(disable=early.disable) if registry is None else registry
    environment = environment or read_environment()
    source, snapshot = resolve(text, registry, early.variant)
    wanted = read_request(request, config, environ=environ, checkpoint=snapshot.root)
    snapshot = evolve(snapshot, variant=wanted.variant)
    checkpoint = consistently(snapshot.root, lambda: examine(source, snapshot, registry))
    companion = partial(plan_companion, environment=environment, registry=registry, cls=cls)
    decision = settle(
        Desk(checkpoint=checkpoint, request=wanted, environment=environment, registry=registry, plan_companion=companion)
    )
    if checkpoint.scheme != PLAIN:  # first whether anything reads them, then whether they are all there
        match(checkpoint.facts, checkpoint.catalog, snapshot.root)
    at = decision.situation
    return cls(
        reference=text,
        snapshot=snapshot,
        catalog=checkpoint.catalog,
        facts=checkpoint.facts,
        environment=environment,
        request=wanted,
        choices={**_identified_choices(checkpoint), **decision.negotiated.choices},
        refused=decision.negotiated.refused,
        decoder_when_sampling=decision.negotiated.decoder_when_sampling,
        device=at.device,
        dtype=at.dtype,
        context=at.context,
        batch=at.batch,
        origins=at.origins,
        device_map=decision.device_map,
        ledger=decision.ledger,
        generation=checkpoint.generation,
        companions=decision.companions,
        notes=(*wanted.notes, *checkpoint.notes, *decision.notes, *_plugin_notes(registry)),
    )


def plan_companion(reference: str, at: Situation, *, environment: Environment, registry: Registry, cls: type[P]) -> P:
    """The plan of a further model that works beside the one `at` describes: on its device, for as many texts and no longer ones, in
    the dtype of its own; what was asked for the other does not count."""
    asked: dict[str, Any] = {"device_map": at.device, "batch": at.batch, "decoder": AUTO}
    given: dict[str, Any] = {"environment": environment, "registry": registry, "environ": {}, "cls": cls}
    plan = make_plan(reference, {}, **given, **asked)
    return plan if plan.context <= at.context else make_plan(reference, {}, **given, **asked, context=at.context)


def examine(source: Identified, snapshot: Snapshot, registry: Registry) -> Checkpoint:
    """catalog → describe: everything known of the checkpoint. Plain tensors are matched with the model they should fill."""
    config = read_config(snapshot)
    format_, found = catalog(snapshot, registry)
    architecture, facts = describe(config, snapshot.root / CONFIG, found, registry)
    scheme = stored_scheme(config, snapshot.root / CONFIG)
    if scheme == PLAIN:
        match(facts, found, snapshot.root)
        require_weights(facts, found)
    generation, other_form = read_generation(config, snapshot), find_other_form(snapshot)
    tokenizer = () if other_form is None else (other_form.note(),)
    return Checkpoint(
        snapshot=snapshot,
        catalog=found,
        facts=facts,
        scheme=scheme,
        parts={"sources": source, "formats": format_, "architectures": architecture},
        generation=generation,
        notes=(*config_notes(config, architecture.registered.name), *facts.notes, *found.notes, *tokenizer, *generation.notes),
    )


def settle(desk: Desk) -> Decision:
    """The decision for the first device to run on with which all of it works."""
    placements = place(desk.request, desk.environment)
    notes = notes_on_limits(desk.request, desk.environment)
    for placement in placements:
        situation = make_situation(desk.checkpoint, desk.request, desk.environment, placement.device, placement.why)
        try:
            decision = decide(situation, placement, desk)
        except PlanError as error:
            if placement is placements[-1]:
                raise _with_notes(error, notes) from error
            notes.append(f"{placement.device} was tried first: {error.reason}")
        else:
            return evolve(decision, notes=(*notes, *decision.notes))
    raise AssertionError("there is always a device to try")


def _with_notes(error: PlanError, notes: list[str]) -> PlanError:
    """The same error, with what was tried before."""
    reason = "\n".join([error.reason, *notes])
    where = {"path": error.path, "locus": error.locus, "hint": error.hint}
    return type(error)(error.code, reason, refused=error.refused, **where)


def make_situation(checkpoint: Checkpoint, request: Request, environment: Environment, device: str, why_device: str) -> Situation:
    """dtype, context and batch settled. More context than the config was made for is planned, and said, unless it lacks positions.

    Raises:
        PlanError: PN-CONTEXT for a context longer than the positions that the model has.
    """
    dtype, why_dtype = _dtype(checkpoint, request)
    context, why_context = _context(checkpoint.facts, request)
    return Situation(
        facts=checkpoint.facts,
        scheme=checkpoint.scheme,
        device=device,
        dtype=dtype,
        context=context,
        batch=request.batch,
        cpu_flags=environment.cpu_flags,
        gpus=environment.gpus,
        driver=environment.driver,
        lacks_cpp=environment.lacks_cpp,
        is_here=environment.is_here,
        machine=machine_of(environment),
        origins={"device": why_device, "dtype": why_dtype, "context": why_context, "batch": request.origin("batch")},
    )


def _dtype(checkpoint: Checkpoint, request: Request) -> tuple[str, str]:
    if request.dtype != AUTO:
        return request.dtype, request.origin("dtype")
    if checkpoint.facts.dtype is not None:
        return checkpoint.facts.dtype, f"auto: {CONFIG}"
    for entry in checkpoint.catalog.entries.values():
        if entry.dtype in FLOATING:
            return entry.dtype, f"auto: as {entry.name} is stored"
    return "float32", "auto: nothing is stored in a dtype a model computes in"


def _context(facts: ModelFacts, request: Request) -> tuple[int, str]:
    if isinstance(request.context, str):
        context = min(facts.context_length, USUAL_CONTEXT, facts.position_limit or USUAL_CONTEXT)
        return context, f"auto: the smaller of the model's {facts.context_length:,} and {USUAL_CONTEXT:,}"
    why, limit = request.origin("context"), facts.position_limit
    if limit is not None and request.context > limit:
        reason = f"{request.context:,} tokens by {why}, but the model has positions for {limit:,}: no sequence can be longer"
        raise PlanError("PN-CONTEXT", reason, locus="context", hint=f"context={limit} is the most")
    if request.context > facts.context_length:
        why += f", which is beyond the {facts.context_length:,} the config was made for"
    return request.context, why


def _identified_choices(checkpoint: Checkpoint) -> dict[str, Choice]:
    return {
        kind: Choice(
            component=part.registered.name,
            id=part.registered.id,
            name=part.registered.name,
            why=part.why,
            registered=part.registered,
        )
        for kind, part in checkpoint.parts.items()
    }


def _plugin_notes(registry: Registry) -> Iterator[str]:
    """Plugins that could not take part at all: nobody knows what they would have offered."""
    for row in registry.rows:
        if row.state not in ("active", "disabled") and not row.provides:
            yield f"plugin {row.id} is {row.state}: {row.reason}"
