"""The command line: `modelrig COMMAND ...`. Each command is one file here, imported when it is invoked.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 failed while running, 2 usage, 3 no feasible plan, 4 a plugin
failed, 130 interrupted. A traceback is shown only with `--debug`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from modelrig.errors import ModelrigError, nearest

INTERRUPTED = 130

#: command → its line in `modelrig --help`; the command itself is `modelrig.cli.<command>.command`
COMMANDS = {
    "plan": "Decide how a model would run, and explain it without reading a weight.",
    "inspect": "Show what a checkpoint holds.",
    "run": "Load a model and complete a prompt.",
    "chat": "Talk with a model.",
    "bench": "Measure how fast a model is, next to what this machine allows.",
    "convert": "Write a checkpoint in another format, dtype, or number of files.",
    "plugins": "List what is installed, in which state, and why.",
    "doctor": "Look for what is wrong with this installation.",
}


def _remember_debug(context: click.Context, _: click.Parameter, debug: bool) -> None:
    if debug and context.obj is not None:
        context.obj["debug"] = True


def _debug_option(*, hidden: bool) -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=hidden,
        envvar="MODELRIG_DEBUG",
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )


class LazyGroup(click.Group):
    """Lists its commands from a table; imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"modelrig.cli.{cmd_name}").command
        if not any("--debug" in parameter.opts for parameter in command.params):
            command.params.append(_debug_option(hidden=True))  # so that it may also stand after the command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from modelrig import __version__

        click.echo(f"modelrig {__version__}")
        context.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[
        _debug_option(hidden=False),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and exit.",
        ),
    ],
)
def group() -> None:
    """Load language models and generate with them out of exchangeable parts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: the command line without the program's name; that of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a character the terminal lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    state: dict[str, Any] = {"debug": False}
    try:
        code = _run(arguments, state)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes stdout at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code


def _run(arguments: Sequence[str] | None, state: dict[str, Any]) -> int:
    try:
        outcome = group.main(
            args=None if arguments is None else list(arguments), prog_name="modelrig", standalone_mode=False, obj=state
        )
        return outcome if isinstance(outcome, int) else 0
    except (KeyboardInterrupt, click.Abort) as error:
        _traceback(state)
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)
        click.echo("interrupted" if interrupted else "aborted", err=True)
        return INTERRUPTED if interrupted else 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModelrigError as error:
        from modelrig.cli.output import printable

        _traceback(state)
        click.echo(f"Error: {printable(error)}", err=True)
        return error.exit_code
    except (BrokenPipeError, SystemExit):
        raise
    except BaseException as error:  # the panics of Rust extensions too
        _traceback(state)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        text = text if len(text) <= 300 else text[:300] + "…"
        click.echo(f"Error: unexpected error {text}; run again with --debug to see where, and please report it", err=True)
        return 1


def _traceback(state: dict[str, Any]) -> None:
    if state["debug"]:
        import traceback

        click.echo(traceback.format_exc(), err=True, nl=False)
