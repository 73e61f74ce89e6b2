"""What several commands print: tables, and text that came from elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click


def printable(text: object) -> str:
    """`text` without characters that would steer the terminal; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


def for_stdout(text: str) -> str:
    """What a model wrote: as it is into a pipe or file, `printable` on a terminal, which a checkpoint's tokens must not steer."""
    return printable(text) if sys.stdout.isatty() else text


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that fits the terminal; into a pipe or file, aligned columns that are never cut."""
    texts = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
        for row in texts:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for row in [list(columns), *texts]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(" ".join(cell.splitlines()) if "\n" in cell else cell for cell in cells).rstrip())
