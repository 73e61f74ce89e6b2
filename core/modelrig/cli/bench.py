"""`modelrig bench`: how fast a model is in several settings, next to the bandwidth of this machine; `--tune` measures kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from attrs import asdict, define

from modelrig.cli.options import settings_options
from modelrig.cli.output import print_json, print_table, printable
from modelrig.components import SLOTS
from modelrig.errors import ModelrigError, PlanError, PluginError, RequestError, quoted

if TYPE_CHECKING:
    from modelrig.generation.bench import Figures
    from modelrig.model import Plan
    from modelrig.planning.environment import Environment

Request = dict[str, Any]
FIXED = "fixed_address"  # what caches offer whose keys and values stay where they are, as compiled steps need it
SHOWN = ("attention", "cache", "decoder", "compiler")
PLANNED = ("device", "dtype", "context", "batch", "hash")
PER_SECOND = "tokens/s"


@define(kw_only=True)
class Row:
    """One setting: measured, or the error that refused it, or that it failed with."""

    asked: Request  # what this setting was given that others were not
    plan: Plan | None = None
    error: ModelrigError | None = None
    figures: Figures | None = None

    @property
    def state(self) -> str:
        return "ok" if self.figures is not None else "refused" if isinstance(self.error, PlanError | PluginError) else "failed"

    @property
    def label(self) -> str:
        """What tells this setting from the others, as it was chosen."""
        chosen: Request = {} if self.plan is None else {slot: self.plan.choices[SLOTS[slot]].component for slot in SHOWN}
        if self.plan is not None:
            chosen |= {"quantizer": self.plan.choices["quantizers"].component, "dtype": self.plan.dtype}
        keys = self.asked or ([*SHOWN, "dtype"] if chosen else [])
        return " ".join(f"{key}={_text(chosen.get(key, self.asked.get(key)))}" for key in keys) or "as asked for"

    def to_json(self) -> dict[str, Any]:
        planned: Request = {}
        if self.plan is not None:
            choices = {slot: self.plan.choices[kind].component for slot, kind in SLOTS.items()}
            planned = {"choices": choices, **{key: getattr(self.plan, key) for key in PLANNED}}
        told = {} if self.error is None else {"reason": {"code": self.error.code, "text": self.error.reason}}
        measured = {} if self.figures is None else self.figures.to_json()
        return {"setting": self.label, "asked": self.asked, "state": self.state, **planned, **told, **measured}


@click.command("bench")
@click.argument("model")
@settings_options
@click.option("--prompt-tokens", type=click.IntRange(1), help="tokens of the prompt; 512, or what the context has room for")
@click.option("--new-tokens", type=click.IntRange(2), help="tokens to decode after it; 64, or what the context has room for")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="measure so often, and take medians")
@click.option("--tune", is_flag=True, help="measure kernels for the model's weights instead, and keep what was found")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--quiet", is_flag=True, help="say nothing on the way")
def command(
    model: str,
    requests: list[tuple[Request, Request]],
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeat: int,
    tune: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure MODEL: a path, org/name[@rev], or tiny. How fast are prompts and new tokens, and what does this machine allow?

    An option of the request that is given several times is measured with each value, and all of them with each other:
    --cache dynamic --cache static --dtype float32 --dtype bfloat16 are four settings. Without any, the plan's own choice is
    measured, and beside it a cache of a fixed size. Prompts are random tokens.

    Decoding reads every weight once for each token, so its bound is the measured bandwidth of memory over the bytes read.

    With --tune kernels are measured, once for this machine, for quantizers whose options ask for measured ones.
    """
    say = (lambda _: None) if quiet else (lambda text: click.echo(printable(text), err=True))
    if tune:
        _tune(model, requests, as_json, say)
        return 0
    rows: list[Row] = []
    document: dict[str, Any] = {"model": model}
    try:
        rows.extend(_measured(_planned(model, requests), (prompt_tokens, new_tokens, repeat), document, say))
    except KeyboardInterrupt:
        if not as_json:
            _print(document, rows)
        raise
    if as_json:
        print_json({**document, "settings": [row.to_json() for row in rows]})
    else:
        _print(document, rows)
    states = {row.state for row in rows}
    if "failed" in states:
        return 1
    return 0 if "ok" in states else next(row.error.exit_code for row in rows if row.error is not None)


# ------------------------------------------------------------------------------------------------ settings


def _measured(rows: list[Row], sizes: tuple[int | None, int | None, int], document: Request, say: Any) -> Iterator[Row]:
    """Every setting, one after the other; `document` is told about the machine when the first is to be measured."""
    from modelrig.generation.bench import lengths, measure, read_bandwidth

    bandwidths: dict[str, float] = {}
    prompt, new, repeat = sizes
    for row in rows:
        if row.plan is None:
            yield row
            continue
        try:
            if row.plan.device not in bandwidths:
                say(f"measuring how fast {row.plan.device} reads memory")
                bandwidths[row.plan.device] = read_bandwidth(row.plan.environment, row.plan.device)
                _describe(document, row.plan.environment, bandwidths, repeat)
            say(f"measuring {row.label}")
            with row.plan.load() as loaded:
                row.figures = measure(loaded, *lengths(row.plan, prompt, new), repeat, bandwidths[row.plan.device])
        except ModelrigError as error:
            row.error = error
        yield row


def _planned(model: str, requests: list[tuple[Request, Request]]) -> list[Row]:
    """A row for each request; where nothing was to be compared, another one with a cache of a fixed size."""
    import modelrig

    rows = []
    for asked, request in requests:
        row = Row(asked=asked)
        try:
            row.plan = modelrig.plan(model, **request)
        except (PlanError, PluginError) as error:
            row.error = error
        if row.plan is not None:
            row.plan.require_generation()
        other = _other_cache(row.plan, request) if len(requests) == 1 and row.plan is not None else None
        if other is not None:
            row.asked = {"cache": None}
        rows.append(row)
        if other is not None:
            rows.append(Row(asked={"cache": other}, plan=modelrig.plan(model, **request, cache=other)))
    return rows


def _other_cache(plan: Plan, request: Request) -> str | None:
    """The first cache of a fixed size that fits too, unless the plan's own is one or the request says which."""
    if "cache" in request or FIXED in plan.choices["caches"].registered.descriptor.offers:
        return None
    from modelrig.registry import current

    fixed = {one.name for one in current().components("caches") if FIXED in one.descriptor.offers}
    fits = [row.component for row in plan.refused if row.kind == "caches" and [one.code for one in row.reasons] == ["auto.order"]]
    return next((name for name in fits if name in fixed), None)


# ------------------------------------------------------------------------------------------------ output


def _describe(document: Request, environment: Environment, bandwidths: Mapping[str, float], repeat: int) -> None:
    import torch

    document["machine"] = {
        "cpu": environment.cpu,
        "cores": environment.cores,
        "threads": torch.get_num_threads(),
        "torch": environment.torch,
        "memory": asdict(environment.memory),
        "gpus": [gpu.name for gpu in environment.gpus],
    }
    document["bytes_per_second"] = dict(bandwidths)
    document["repeat"] = repeat


def _print(document: Mapping[str, Any], rows: list[Row]) -> None:
    if "machine" in document:
        machine = document["machine"]
        read = ", ".join(f"{device} reads {rate / 1e9:.1f} GB/s" for device, rate in document["bytes_per_second"].items())
        click.echo(printable(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; {read}\n"))
    done = [(row, row.figures) for row in rows if row.figures is not None]
    columns = ("setting", f"prompt {PER_SECOND}", f"decode {PER_SECOND}", f"bound {PER_SECOND}", "share", "kernels")
    if done:
        print_table(columns, [_cells(row, figures) for row, figures in done])
        for prompt, new in sorted({(one.prefill.tokens, one.decode.tokens) for _, one in done}):
            runs = max(len(one.decode.runs) for _, one in done)
            click.echo(f"\nmedians of {runs} runs: prompts of {prompt:,} tokens, {new:,} new ones after the first")
    for row in rows:
        if row.error is not None:
            click.echo(printable(f"{row.label}: {row.state}: {row.error.reason} [{row.error.code}]"))


def _cells(row: Row, figures: Figures) -> tuple[str, ...]:
    speeds = (figures.prefill.tokens_per_second, figures.decode.tokens_per_second, figures.bound_tokens_per_second)
    kernels = ", ".join(f"{count} {name}" for name, count in figures.kernels.items())
    return (row.label, *(f"{speed:,.1f}" for speed in speeds), f"{figures.share:.0%}", kernels)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ------------------------------------------------------------------------------------------------ kernels


def _tune(model: str, requests: list[tuple[Request, Request]], as_json: bool, say: Any) -> None:
    import modelrig
    from modelrig.planning.measured import keep_measured, machine_of
    from modelrig.planning.needs import multiplied_shapes

    documents: dict[tuple[str, str], dict[str, Any]] = {}
    for _, request in requests:
        plan = modelrig.plan(model, **request)
        choice = plan.choices["quantizers"]
        if (choice.id, plan.dtype) in documents:
            continue
        tune = getattr(choice.registered.implementation(), "tune", None)
        if tune is None or plan.device != "cpu":
            why = f"quantizer {quoted(choice.component)} has no kernels to measure" if tune is None else f"{plan.device} is no CPU"
            raise RequestError("RQ-VALUE", f"nothing can be tuned: {why}", locus="--tune")
        machine = machine_of(plan.environment)
        measured = tune(multiplied_shapes(plan.facts), plan.dtype, say)
        path = keep_measured(machine, choice.id, measured)
        where = {"machine": machine, "component": choice.id, "dtype": plan.dtype, "file": str(path)}
        documents[choice.id, plan.dtype] = {"model": model, **where, "measured": measured}
    if as_json:
        print_json({"tuned": list(documents.values())})
        return
    for document in documents.values():
        print_table(("weight", "rows", "microseconds, the fastest first"), list(_timings(document["measured"])))
        click.echo(printable(f"\nkept in {document['file']} for {document['machine']}"))


def _timings(measured: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[tuple[str, int, str]]:
    for weight, rows in measured.items():
        for count, kernels in rows.items():
            ordered = sorted(kernels.items(), key=lambda one: one[1])
            yield weight, count, ", ".join(f"{name} {seconds * 1e6:,.1f}" for name, seconds in ordered)
