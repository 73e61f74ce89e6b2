"""`modelrig plugins` lists what is installed; `modelrig plugins show NAME` tells everything about one plugin or component."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import click

from modelrig.cli.output import print_json, print_table, printable
from modelrig.components import KINDS
from modelrig.errors import RequestError, nearest, quoted
from modelrig.planning.request import read_request
from modelrig.registry import PluginRow, Registered, Registry, current

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def configured_registry() -> Registry:
    """The registry as `modelrig.toml` in the working directory and the environment switch it."""
    return current(disable=read_request({}).disable)


@click.group("plugins", invoke_without_command=True)
@json_option
@click.option("--kind", type=click.Choice(KINDS), help="Only this kind, and plugins of which nobody knows what they provide.")
@click.pass_context
def command(context: click.Context, as_json: bool, kind: str | None) -> None:
    """List what is installed, in which state, and why."""
    if context.invoked_subcommand is not None:
        return
    rows = [row for row in (_of_kind(row, kind) for row in configured_registry().rows) if row is not None]
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        print_table(("plugin", "from", "state", "provides", "why"), [_line(row) for row in rows])


def _of_kind(row: PluginRow, kind: str | None) -> PluginRow | None:
    """The row with what it provides of `kind`; None if it has to do with other kinds only."""
    if kind is None:
        return row
    provides = tuple(entry for entry in row.provides if entry.kind == kind)
    is_dark = not row.provides and row.state != "active"
    return attrs.evolve(row, provides=provides) if provides or is_dark else None


def _line(row: PluginRow) -> tuple[str, ...]:
    provides = [entry.name if entry.state == row.state else f"{entry.name} ({entry.state})" for entry in row.provides]
    inner = [f"{entry.name}: {entry.reason}" for entry in row.provides if entry.reason and row.state == "active"]
    return row.plugin, row.origin, row.state, ", ".join(provides), "; ".join(filter(None, [row.reason, *inner]))


@command.command("show")
@click.argument("name")
@json_option
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Tell everything about the plugin or component NAME.

    NAME is a plugin's name or row id, or a component's name or full id.
    """
    registry = configured_registry()
    everything = [component for kind in KINDS for component in registry.components(kind)]
    rows = [row for row in registry.rows if name in (row.plugin, row.id)]
    named = [component for component in everything if name in (component.name, component.id)]
    if not rows and not named:
        known = {known for row in registry.rows for known in (row.plugin, row.id)}
        known |= {known for component in everything for known in (component.name, component.id)}
        text = f"no plugin or component is called {quoted(name)}{nearest(name, sorted(known))}"
        raise RequestError("RQ-NAME", text, hint="modelrig plugins lists what is installed")
    homes = [row for row in registry.rows if row not in rows and any(row.plugin == one.plugin and row.provides for one in named)]
    inside = [one for one in everything if any(one.plugin == row.plugin and row.provides for row in rows) and one not in named]
    plugins = [row.to_json() | {"traceback": row.traceback} for row in rows + homes]
    components = [describe(component) for component in named + inside]
    if as_json or (context.parent is not None and context.parent.params.get("as_json")):
        print_json({"plugins": plugins, "components": components})
        return
    for component in components:
        _print_fields(f"component {component['id']}", component)
    for plugin in plugins:
        plugin["provides"] = [f"{entry['name']} ({entry['kind']}, {entry['state']})" for entry in plugin["provides"]]
        _print_fields(f"plugin {plugin['id']}", plugin)


def describe(component: Registered) -> dict[str, Any]:
    """Everything a component states, and its state, as plain data."""
    stated = attrs.asdict(component.descriptor, value_serializer=_plain)
    stated["needs"] = {kind: sorted(tokens) for kind, tokens in component.descriptor.needs.items()}
    state = {key: getattr(component, key) for key in ("id", "kind", "plugin", "distribution", "state", "reason")}
    return state | stated


def _plain(_: object, __: object, value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def _print_fields(title: str, fields: Mapping[str, Any]) -> None:
    click.echo(printable(title))
    for key, value in fields.items():
        if value not in (None, [], (), {}) and key != "id":
            lines = _text(value).splitlines() or [""]
            click.echo(f"  {key:<16} {printable(lines[0])}")
            for line in lines[1:]:
                click.echo(f"  {'':<16} {printable(line)}")
    click.echo()


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_text(inner)}" for key, inner in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
