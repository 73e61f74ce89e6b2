"""`modelrig run`: plan, load, generate. The completion goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
from operator import methodcaller
from typing import Any

import attrs
import click

from modelrig.cli.generation import figures, generation_options, print_pieces, read_input, require_served
from modelrig.cli.options import request_options
from modelrig.cli.output import for_stdout, printable


@click.command("run")
@click.argument("model")
@click.argument("prompt")
@request_options
@generation_options
@click.option("--json", "as_json", is_flag=True, help="print one object {text, tokens, finish_reason, stats, plan}")
@click.option("--quiet", is_flag=True, help="print nothing but the completion")
def command(model: str, prompt: str, request: dict[str, Any], generation: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Continue PROMPT with MODEL: a path, org/name[@rev], or tiny.

    A PROMPT of - is read from standard input. Without a temperature the most likely token is taken every time.
    """
    import modelrig
    from modelrig.planning.tokenizer_files import require_text

    if prompt == "-":
        prompt = read_input(methodcaller("read"))
    plan = modelrig.plan(model, **request)
    plan.require_generation()  # before its weights are read
    require_text(plan.snapshot)
    require_served(plan, generation)
    with plan.load(progress=not quiet) as loaded:
        if as_json:
            click.echo(json.dumps({**_document(loaded.generate(prompt, **generation)), "plan": plan.to_json()}))
            return
        if not quiet:
            click.echo(printable(plan.summary()), err=True)
        run = loaded.start(prompt, **generation)
        finished = print_pieces(run) if len(run.rows) == 1 else _print_all(run)
        if not quiet:
            for result in run.results():
                click.echo(figures(result), err=True)
    if not finished:
        raise KeyboardInterrupt


def _document(answer: Any) -> dict[str, Any]:
    """One generation as an object; several as {"sequences": [...]}"""
    if isinstance(answer, list):
        return {"sequences": [_document(result) for result in answer]}
    return {**attrs.asdict(answer), "tokens": list(answer.tokens)}


def _print_all(run: Any) -> bool:
    """Several sequences, one after the other, a line between them; False if Ctrl-C ended it."""
    finished = True
    try:
        for _ in run:
            pass
    except KeyboardInterrupt:
        finished = False
    click.echo("\n---\n".join(for_stdout(result.text) for result in run.results()))
    return finished
