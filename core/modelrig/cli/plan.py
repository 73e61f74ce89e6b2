"""`modelrig plan`: what would be done, and why, without torch and without reading a weight."""

from __future__ import annotations

from typing import Any

import click

from modelrig.cli.options import request_options
from modelrig.cli.output import print_json, printable


@click.command("plan")
@click.argument("model")
@request_options
@click.option("--json", "as_json", is_flag=True, help="print the plan as one JSON object")
def command(model: str, request: dict[str, Any], as_json: bool) -> None:
    """Decide how MODEL would run: a path, org/name[@rev], or tiny.

    Prints the parts that were chosen with the deciding reason, every other part with all reasons against it, and the bytes.
    """
    from modelrig.planning.pipeline import make_plan

    plan = make_plan(model, **request)
    if as_json:
        print_json(plan.to_json())
    else:
        click.echo(printable(plan.explain()))
