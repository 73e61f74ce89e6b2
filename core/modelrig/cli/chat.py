"""`modelrig chat`: a conversation in the terminal, through the model's chat template, its cache kept between turns."""

from __future__ import annotations

import sys
from operator import methodcaller
from typing import Any

import click

from modelrig.cli.generation import figures, generation_options, print_pieces, read_input, require_served
from modelrig.cli.options import request_options
from modelrig.cli.output import printable
from modelrig.errors import GenerateError


@click.command("chat")
@click.argument("model")
@request_options
@generation_options
@click.option("--system", help="a system message to begin with")
@click.option("--quiet", is_flag=True, help="print no figures after an answer")
def command(model: str, request: dict[str, Any], generation: dict[str, Any], system: str | None, quiet: bool) -> None:
    """Talk with MODEL: a path, org/name[@rev], or tiny.

    One line is one message; from a pipe too. /reset forgets the conversation, /exit or Ctrl-D ends it. Ctrl-C stops an answer and
    keeps what there is of it; at an empty prompt it ends the conversation.
    """
    import modelrig
    from modelrig.planning.tokenizer_files import require_text

    plan = modelrig.plan(model, **request)
    plan.require_generation()  # before its weights are read
    require_text(plan.snapshot)
    require_served(plan, generation)
    with plan.load(progress=not quiet) as loaded:
        session = loaded.session()
        start = [{"role": "system", "content": system}] if system else []
        session.messages = list(start)
        if not quiet:
            click.echo(printable(plan.summary()), err=True)
        while True:
            message = _ask()
            if message is None or message.strip() == "/exit":
                return
            if message.strip() == "/reset":
                session.reset()
                session.messages = list(start)
            elif message.strip():
                _answer(session, message, generation, quiet)


def _ask() -> str | None:
    """The next message, or None at the end."""
    try:
        if sys.stdin is not None and sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = read_input(methodcaller("readline"))
    except KeyboardInterrupt:
        click.echo(err=True)
        return None
    return line.rstrip("\n") if line else None


def _answer(session: Any, message: str, generation: dict[str, Any], quiet: bool) -> None:
    try:
        print_pieces(session.stream_send(message, **generation))
    except GenerateError as error:
        if error.code != "GN-CONTEXT":
            raise
        click.echo(f"{error}\nThe conversation is longer than the context: /reset begins a new one.", err=True)
        return
    if not quiet and session.answer is not None:
        click.echo(figures(session.answer), err=True)
