"""Write the generated pages of docs/reference: `make docs`. A test fails when a page is not what this would write."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import attrs
import click
from click.testing import CliRunner

from modelrig import errors, hookspecs
from modelrig.cli import main as program
from modelrig.components import DESCRIPTORS, KINDS
from modelrig.generation.options import GenerateOptions
from modelrig.registry import Registry, current

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py (make docs); changes here are lost. -->\n"


def errors_page() -> str:
    tree = inspect.getdoc(errors).split("\n\nCodes are")[0].partition("\n\n")[2]
    rows = "\n".join(f"| `{code}` | {meaning} |" for code, meaning in errors.CODES.items())
    return (
        f"# Errors\n\n{NOTE}\nEvery error raised on purpose is a class of `modelrig.errors` with a stable code.\n\n"
        f"```text\n{inspect.cleandoc(tree)}\n```\n\n| code | meaning |\n| --- | --- |\n{rows}\n"
    )


def hooks_page() -> str:
    parts = [f"# Hooks\n\n{NOTE}\n{inspect.getdoc(hookspecs)}\n"]
    for kind in KINDS:
        hook = getattr(hookspecs, f"modelrig_{kind}")
        text, _, example = inspect.getdoc(hook).partition("Example:\n")
        signature = str(inspect.signature(hook)).replace("'", "")
        parts.append(f"## `modelrig_{kind}{signature}`\n\n{text.strip()}\n\n```python\n{inspect.cleandoc(example)}\n```\n")
    return "\n".join(parts)


def components_page() -> str:
    parts = [f"# Components\n\n{NOTE}\nWhat ships with Modelrig; `modelrig plugins` lists what is installed on your machine.\n"]
    registry: Registry = current()
    for kind in KINDS:
        rows = [
            f"| `{one.name}` | {one.summary} | {_tokens(one.offers)} | {_needs(one.needs)} |"
            for one in (found.descriptor for found in registry.components(kind) if found.is_ours)
        ]
        described = inspect.getdoc(DESCRIPTORS[kind]).splitlines()[0]
        parts.append(
            f"## {kind}\n\n{described}\n\n| name | what | offers | needs |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def _tokens(tokens: frozenset[str]) -> str:
    return ", ".join(f"`{token}`" for token in sorted(tokens))


def _needs(needs: dict[str, frozenset[str]]) -> str:
    return "; ".join(f"of {kind}: {_tokens(tokens)}" for kind, tokens in needs.items())


def generation_page() -> str:
    rows = "\n".join(
        f"| `{field.name}` | {field.default!r} | {field.metadata['accepts']} | {field.metadata['help']} |"
        for field in attrs.fields(GenerateOptions)
    )
    return (
        f"# Options of generate\n\n{NOTE}\n`model.generate`, `model.stream`, `session.generate` and `session.send` take them by "
        "name; the command line with dashes (`--max-new-tokens`).\n\n"
        f"| option | default | accepts | meaning |\n| --- | --- | --- | --- |\n{rows}\n"
    )


def cli_page() -> str:
    runner = CliRunner()
    parts = [f"# Command line\n\n{NOTE}\n"]
    group = program.group if hasattr(program, "group") else _group()
    context = click.Context(group, info_name="modelrig")
    for name in ["", *group.list_commands(context)]:
        shown = runner.invoke(group, [*name.split(), "--help"], prog_name="modelrig", terminal_width=100, max_content_width=100)
        parts.append(f"## modelrig{' ' + name if name else ''}\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(parts)


def _group() -> click.Group:
    from modelrig import cli

    return next(value for value in vars(cli).values() if isinstance(value, click.Group))


PAGES: dict[str, Callable[[], str]] = {
    "errors.md": errors_page,
    "hooks.md": hooks_page,
    "components.md": components_page,
    "generation.md": generation_page,
    "cli.md": cli_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
