"""The ledger of plugins, and the components they provide: what there is, in which state, and why."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from attrs import evolve, field, frozen

from modelrig.components import KINDS, Component
from modelrig.errors import PluginError, RequestError, nearest, quoted

#: The distribution whose components come first and to which `MODELRIG_PLUGINS` does not apply.
OUR_DISTRIBUTION = "modelrig"
STATES = ("active", "disabled", "unavailable", "incompatible", "broken", "conflict")


class Provided(NamedTuple):
    """One component as its plugin's row shows it. `reason` may also be a note on an active component."""

    kind: str
    name: str
    state: str
    reason: str | None


@frozen(kw_only=True)
class PluginRow:
    """One plugin, in whatever state.

    Attributes:
        id: `distribution/entry-point-name`, unique; `local/name` for a plugin that was registered by a call.
        plugin: the entry point's name.
        distribution, version: where it came from; None for a plugin that was registered by a call.
        api: the `MODELRIG_API` it states, as far as that is known.
        state: one of `STATES`.
        reason: why it is in that state, or a note on an active one.
        provides: its components. Empty unless the plugin got as far as naming them.
        seconds: what its import and hooks took.
        code: the error code of asking for one of its components, if it is not active.
        traceback: of what the plugin raised.
    """

    id: str
    plugin: str
    distribution: str | None
    version: str | None = None
    api: str | None = None
    state: str = "active"
    reason: str | None = None
    provides: tuple[Provided, ...] = ()
    seconds: float = 0.0
    code: str | None = None
    traceback: str | None = field(default=None, repr=False)

    @property
    def origin(self) -> str:
        """The distribution with its version, for people."""
        return " ".join(part for part in (self.distribution, self.version) if part) or "registered by a call"

    def error(self) -> PluginError:
        """What asking for a component of this plugin raises while it is not active."""
        text = f"plugin {self.plugin!r} ({self.origin}) is {self.state}: {self.reason}"
        hint = f"modelrig plugins show {self.id}" + (" has the traceback" if self.traceback else "")
        return PluginError(self.code or "PL-IMPORT", text, plugin=self.plugin, distribution=self.distribution, hint=hint)

    def to_json(self) -> dict[str, Any]:
        """The row for machines, as `modelrig plugins --json` prints it."""
        return {
            "id": self.id,
            "plugin": self.plugin,
            "distribution": self.distribution,
            "version": self.version,
            "api": self.api,
            "state": self.state,
            "reason": self.reason,
            "provides": [entry._asdict() for entry in self.provides],
            "seconds": round(self.seconds, 4),
        }


@frozen(eq=False, kw_only=True)
class Registered:
    """A component as it stands in the registry. `planner()` and `implementation()` import on first use."""

    descriptor: Component
    plugin: str
    distribution: str | None
    state: str = "active"
    reason: str | None = None
    code: str | None = None
    _loaded: dict[str, Any] = field(factory=dict, init=False, repr=False)

    @property
    def kind(self) -> str:
        return self.descriptor.kind

    @property
    def name(self) -> str:
        return self.descriptor.name

    @property
    def id(self) -> str:
        return f"{self.plugin}:{self.descriptor.name}"

    @property
    def is_ours(self) -> bool:
        return self.distribution == OUR_DISTRIBUTION

    def planner(self) -> Any:
        """The object `descriptor.planner` names. Raises `PluginError` (PL-IMPORT)."""
        return self._load("planner", self.descriptor.planner)

    def implementation(self) -> Any:
        """The object `descriptor.implementation` names. Raises `PluginError` (PL-IMPORT)."""
        return self._load("implementation", self.descriptor.implementation)

    def require_active(self) -> Registered:
        """This component, if it is active; else raises the `PluginError` that says why not (PL-NEED, PL-DISABLED)."""
        if self.state == "active":
            return self
        raise PluginError(
            self.code or "PL-IMPORT",
            f"component {self.id!r} of kind {self.kind} is {self.state}: {self.reason}",
            plugin=self.id,
            distribution=self.distribution,
        )

    def _load(self, face: str, where: str) -> Any:
        if where not in self._loaded:
            module, _, attribute = where.partition(":")
            try:
                found: Any = importlib.import_module(module)
                for part in attribute.split("."):
                    found = getattr(found, part)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # sys.exit and the panics of Rust extensions too
                origin = f"distribution {self.distribution}" if self.distribution else "registered by a call"
                raise PluginError(
                    "PL-IMPORT",
                    f"the {face} of component {self.id!r} ({origin}) cannot be imported from {where!r}: {cause(error)}",
                    plugin=self.id,
                    distribution=self.distribution,
                ) from error
            self._loaded[where] = found
        return self._loaded[where]


def cause(error: BaseException) -> str:
    """`error` in one line, whatever its `__str__` does."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    text = text if len(text) <= 500 else text[:500] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Registry:
    """Every plugin with its state, and every component. Immutable: a refresh or a registration makes another one.

    Attributes:
        rows: the ledger, our own distribution first, then by id.
    """

    def __init__(self, found: Iterable[tuple[PluginRow, Sequence[Registered]]] = ()) -> None:
        found = list(found)
        self._components: dict[str, list[Registered]] = {kind: [] for kind in KINDS}
        for _, components in found:
            for component in components:
                self._components[component.kind].append(component)
        clashes = self._clashes()
        rows = [evolve(row, provides=tuple(_provided(component, clashes) for component in components)) for row, components in found]
        self.rows: tuple[PluginRow, ...] = tuple(sorted(rows, key=lambda row: (row.distribution != OUR_DISTRIBUTION, row.id)))

    def _clashes(self) -> dict[tuple[str, str], list[str]]:
        """(kind, short name) → ids, where several plugins registered it. Disabling one ends the clash."""
        ids: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for kind, components in self._components.items():
            for component in components:
                if component.state != "disabled":
                    ids[kind, component.name].append(component.id)
        return {key: sorted(same) for key, same in ids.items() if len(same) > 1}

    def components(self, kind: str, prefer: Sequence[str] = ()) -> tuple[Registered, ...]:
        """All components of a kind, whatever their state, in the order in which `auto` considers them.

        The order is: those in `prefer` (short names or ids), our own, others, experimental ones; then by rank, then by id. So a
        package that is installed later changes no order among ours, and never comes before them.
        """
        wished = {name: place for place, name in reversed(list(enumerate(prefer)))}

        def order(component: Registered) -> tuple[int, int, bool, int, str]:
            place = min(wished.get(component.name, len(prefer)), wished.get(component.id, len(prefer)))
            tier = 2 if component.descriptor.experimental else 0 if component.is_ours else 1
            return place, tier, not component.is_ours, component.descriptor.rank, component.id

        return tuple(sorted(self._of(kind), key=order))

    def find(self, kind: str, name: str) -> Registered:
        """The component of `kind` called `name`: a short name while that is unique, or a full id `plugin:name`.

        Raises:
            RequestError: nothing is called so (RQ-NAME), or several things are (RQ-AMBIGUOUS).
            PluginError: it, or the plugin the id names, is not active (PL-NEED, PL-DISABLED, PL-IMPORT, ...).
        """
        if not isinstance(name, str):
            raise RequestError("RQ-VALUE", f"a component of kind {kind} is chosen by its name, not by {quoted(name)}", locus=kind)
        same = [component for component in self._of(kind) if name in (component.name, component.id)]
        same = [component for component in same if component.state != "disabled"] or same
        if len(same) > 1:
            ids = ", ".join(sorted(component.id for component in same))
            raise RequestError(
                "RQ-AMBIGUOUS", f"{name!r} is registered by several plugins: {ids}", locus=kind, hint="use the full id"
            )
        if same:
            return same[0].require_active()
        plugin, colon, _ = name.partition(":")
        named = [row for row in self.rows if colon and row.plugin == plugin]
        if named and all(row.state != "active" and not row.provides for row in named):
            raise self.find_row(plugin).error()
        raise self._unknown(kind, name)

    def find_row(self, name: str) -> PluginRow:
        """The row with that id, or the plugin of that name. Raises `PluginError` (PL-UNKNOWN)."""
        rows = [row for row in self.rows if name == row.id] or [row for row in self.rows if name == row.plugin]
        if rows:
            return min(rows, key=lambda row: row.state == "conflict")
        known = [known for row in self.rows for known in (row.plugin, row.id)]
        raise PluginError("PL-UNKNOWN", f"no plugin is called {quoted(name)}{nearest(name, known)}", plugin=name)

    def _of(self, kind: str) -> list[Registered]:
        if kind not in self._components:
            raise RequestError(
                "RQ-VALUE", f"{quoted(kind)} is no kind of component{nearest(str(kind), KINDS)}; kinds are {', '.join(KINDS)}"
            )
        return self._components[kind]

    def _unknown(self, kind: str, name: str) -> RequestError:
        there = self.components(kind)
        known = [component.id if ":" in name else component.name for component in there]
        parts = [f"no component of kind {kind} is called {quoted(name)}{nearest(name, known)}"]
        parts.append("installed: " + (", ".join(dict.fromkeys(map(_labelled, there))) or "none"))
        elsewhere = sorted({other for other, all_ in self._components.items() for c in all_ if name in (c.name, c.id)})
        if elsewhere:
            parts.append(f"there is one of kind {', '.join(elsewhere)}")
        # A plugin that never said what it provides might hold the name.
        dark = [row for row in self.rows if row.state != "active" and not row.provides]
        parts += [f"it may be in plugin {row.id!r}, which is {row.state}: {row.reason}" for row in dark]
        if not self.rows:
            parts.append("no plugin is installed at all, not even our own: is modelrig installed (pip install -e .)?")
        return RequestError("RQ-NAME", "; ".join(parts), locus=kind, hint="modelrig plugins lists what is installed")


def _labelled(component: Registered) -> str:
    return component.name if component.state == "active" else f"{component.name} ({component.state}: {component.reason})"


def _provided(component: Registered, clashes: Mapping[tuple[str, str], Sequence[str]]) -> Provided:
    same = clashes.get((component.kind, component.name))
    clash = f"the short name is ambiguous, use the full id: {', '.join(same)}" if same and component.state != "disabled" else None
    reason = "; ".join(part for part in (component.reason, clash) if part) or None
    return Provided(component.kind, component.name, component.state, reason)
