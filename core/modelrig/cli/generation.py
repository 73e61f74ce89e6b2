"""What `run` and `chat` share: flags made from the options of generate, and printing a stream."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import attrs
import click

from modelrig.cli.output import for_stdout
from modelrig.errors import GenerateError, quoted
from modelrig.generation.grammars import find
from modelrig.generation.options import GenerateOptions, Grammar
from modelrig.registry import current

if TYPE_CHECKING:
    from modelrig.generation.loop import Generation, Piece
    from modelrig.planning.plan import RigPlan

F = TypeVar("F", bound=Callable[..., Any])

#: options that may be given several times, and how one value is written
REPEATED = {"stop": "TEXT", "stop_ids": "ID", "logit_bias": "ID=BIAS", "seed": "SEED", "constraint": "LANGUAGE=TEXT"}
#: what the flag says where the keyword's help does not say it
HELP = {
    "constraint": "let only text come that this allows: regex=[0-9]+, or json_schema=@FILE for a text in a file; name=COMPONENT "
    "besides says which component serves it",
}
LARGEST_FILE = 4 << 20
WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "num_return_sequences", "pad_to_multiple_of", "stop_ids", "seed")


def generation_options(command: F) -> F:
    """Give `command` one flag for each field of `GenerateOptions`, passed on as the keyword `generation`."""

    @functools.wraps(command)
    def wrapped(**flags: Any) -> Any:
        given = {name: flags.pop(name) for name in names}
        return command(generation=_given(given), **flags)

    fields = attrs.fields(GenerateOptions)
    names = [field.name for field in fields]
    for field in reversed(fields):
        wrapped = _flag(field.name, field.default, HELP.get(field.name, field.metadata["help"]))(wrapped)
    return wrapped  # type: ignore[return-value]


def _flag(name: str, default: Any, text: str) -> Callable[[Any], Any]:
    flag = "--" + name.replace("_", "-")
    if default is False:
        return click.option(flag, name, is_flag=True, help=text)
    kind = click.INT if name in WHOLE else click.STRING if name in REPEATED else click.FLOAT
    return click.option(flag, name, type=kind, multiple=name in REPEATED, metavar=REPEATED.get(name), help=text)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as `generate` takes them."""
    # By identity: 0 equals False, and is for `generate` to accept or refuse.
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != ()}
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if "constraint" in given:
        given["constraint"] = _pairs(given["constraint"])
    if len(given.get("seed", ())) == 1:
        given["seed"] = given["seed"][0]
    GenerateOptions.make(**given)  # before anything is planned or loaded
    return given


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise GenerateError("GN-ARGS", f"{text!r} is not ID=BIAS, such as 42=-5.0", locus="logit_bias") from None


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    """Keys and texts of KEY=TEXT; those of KEY=@FILE from the file."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in pairs:
            raise GenerateError("GN-ARGS", f"{quoted(text)} is not LANGUAGE=TEXT, once a language", locus="constraint")
        pairs[key] = _read(value[1:]) if value.startswith("@") else value
    return pairs


def _read(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise GenerateError("GN-ARGS", f"{quoted(name)} has more than {LARGEST_FILE:,} bytes", locus="constraint")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError, and so is a null byte in a name
        reason = getattr(error, "strerror", None) or str(error)
        raise GenerateError("GN-ARGS", f"the file {quoted(name)} cannot be read: {reason}", locus="constraint") from error


def require_served(plan: RigPlan, generation: Mapping[str, Any]) -> None:
    """Raise what a call with these options would, if nothing serves its constraint."""
    constraint = GenerateOptions.make(**generation).constraint
    if isinstance(constraint, Grammar):
        find(constraint, current(disable=plan.request.disable), plan.request.prefer)


def figures(result: Generation) -> str:
    """One line about a generation, for people."""
    stats = result.stats
    drafts = f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted · " if stats.drafted_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s · {stats.new_tokens} new tokens in "
        f"{stats.decode_seconds:.2f} s ({stats.tokens_per_second:.1f} tokens/s) · {drafts}peak memory "
        f"{stats.peak_memory_bytes / 2**20:,.0f} MiB · finished: {result.finish_reason}"
    )


def print_pieces(pieces: Iterable[Piece]) -> bool:
    """Print a stream of one row as it comes; False if Ctrl-C ended it. The stream is closed then."""
    stream, finished = iter(pieces), True
    try:
        for piece in stream:
            click.echo(for_stdout(piece.text), nl=False)
    except KeyboardInterrupt:
        finished = False
    finally:
        if isinstance(stream, Generator):
            stream.close()  # now, rather than when the garbage collector finds it
    click.echo()
    return finished


def read_input(read: Callable[[TextIO], str]) -> str:
    """What `read` takes from standard input; nothing if that was closed.

    Raises:
        GenerateError: GN-INPUT for bytes that are not text.
    """
    if sys.stdin is None:
        return ""
    try:
        return read(sys.stdin)
    except UnicodeDecodeError as error:
        raise GenerateError("GN-INPUT", f"standard input is not {error.encoding} text: {error.reason}") from error
