"""Find the plugins that are installed, and examine each on its own.

pluggy has a loader for entry points, but it stops at the first broken package, so the loop is here. Whatever a plugin does wrong
ends as the state and the reason of its row; only a wrong name in `MODELRIG_PLUGINS`, `MODELRIG_DISABLE` or `disable` is an error,
as the user meant something by it.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from attrs import evolve, frozen

from modelrig.components import Component
from modelrig.errors import RequestError, nearest, quoted
from modelrig.hookspecs import ENTRY_POINT_GROUP

from .checks import RejectedError, check_api, collect, unmet
from .guard import TorchGuard, forget
from .ledger import OUR_DISTRIBUTION, PluginRow, Registered, cause

Found = tuple[PluginRow, tuple[Registered, ...]]

ALLOW_VARIABLE = "MODELRIG_PLUGINS"
DISABLE_VARIABLE = "MODELRIG_DISABLE"


# ------------------------------------------------------------------------------------------------ what is installed


def canonical(name: str) -> str:
    """A distribution's name as it compares: lower case, runs of `-_.` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution_name(distribution: metadata.Distribution) -> str:
    """The name in the metadata; the folder's where there is none."""
    with contextlib.suppress(Exception):
        if distribution.metadata["Name"]:
            return str(distribution.metadata["Name"])
    return folder_name(distribution)


def folder_name(distribution: metadata.Distribution) -> str:
    """The name in `name-version.dist-info`, which costs no parsing."""
    return Path(str(getattr(distribution, "_path", ""))).name.partition("-")[0].removesuffix(".dist").removesuffix(".egg")


def distributions() -> list[metadata.Distribution]:
    """Every distribution Python would use: of several with one name, the first on the path."""
    places = {place: number for number, place in reversed(list(enumerate(sys.path)))}

    def order(distribution: metadata.Distribution) -> tuple[int, str]:
        return places.get(str(distribution.locate_file("")), len(places)), str(getattr(distribution, "_path", ""))

    first: dict[str, metadata.Distribution] = {}
    for distribution in sorted(metadata.distributions(), key=order):
        first.setdefault(canonical(folder_name(distribution) or distribution_name(distribution)), distribution)
    return list(first.values())


@frozen
class Candidate:
    """A plugin that is installed, before anything of it is imported."""

    row: PluginRow
    load: Callable[[], object]
    package: str  # top-level package of its module

    @property
    def names(self) -> tuple[str, str]:
        return self.row.plugin, self.row.id


def candidates(all_distributions: Iterable[metadata.Distribution] | None = None) -> list[Candidate]:
    """The entry points of the group `modelrig.plugins`, our own distribution first, then by distribution and name."""
    found: dict[str, Candidate] = {}
    for distribution in distributions() if all_distributions is None else all_distributions:
        name = distribution_name(distribution)
        try:
            text = distribution.read_text("entry_points.txt")
            if text is None or ENTRY_POINT_GROUP not in text:
                continue  # most of them, and parsing would cost more than all the rest
            points = sorted(
                (point.name, point.value, point) for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP
            )
        except Exception as error:
            row = PluginRow(id=f"{name}/entry_points.txt", plugin=name, distribution=name, state="broken", code="PL-IMPORT")
            row = evolve(row, reason=f"its entry_points.txt cannot be read: {cause(error)}", traceback=traceback.format_exc())
            found[row.id] = Candidate(row, _nothing, "")
            continue
        for plugin, value, point in points:
            row = PluginRow(id=f"{name}/{plugin}", plugin=plugin, distribution=_ours_or(name), version=_version(distribution))
            if row.id in found:  # the same name twice in one entry_points.txt
                row = evolve(row, id=f"{name}/{plugin}={value}")
            found[row.id] = Candidate(row, point.load, value.partition(":")[0].strip().partition(".")[0])
    return sorted(
        found.values(),
        key=lambda one: (one.row.distribution != OUR_DISTRIBUTION, canonical(one.row.distribution or ""), one.row.id),
    )


def _ours_or(name: str) -> str:
    return OUR_DISTRIBUTION if canonical(name) == OUR_DISTRIBUTION else name


def _version(distribution: metadata.Distribution) -> str | None:
    with contextlib.suppress(Exception):
        return distribution.version
    return None


def _nothing() -> object:
    raise AssertionError("a candidate whose row is broken is never loaded")


# ------------------------------------------------------------------------------------------------ what the user switched off


@frozen
class Switches:
    """What may be imported. `allowed` is None when everything may; `disabled` maps each name to who disabled it."""

    allowed: frozenset[str] | None
    disabled: Mapping[str, str]

    @classmethod
    def read(cls, environment: Mapping[str, str], disable: Sequence[str] = ()) -> Switches:
        if isinstance(disable, str) or not all(isinstance(name, str) for name in disable):
            raise RequestError(
                "RQ-VALUE", f"it must be a list of plugin names or component ids, not {quoted(disable)}", locus="disable"
            )
        allowed = _listed(environment[ALLOW_VARIABLE]) if ALLOW_VARIABLE in environment else None
        disabled = dict.fromkeys(disable, "disable in the configuration")
        disabled |= dict.fromkeys(_listed(environment.get(DISABLE_VARIABLE, "")), DISABLE_VARIABLE)
        return cls(None if allowed is None else frozenset(allowed), disabled)

    def check_plugins(self, installed: Sequence[Candidate]) -> None:
        """Raises `RequestError` (RQ-UNKNOWN) for a name no installed plugin has. Nothing has been imported yet."""
        known = [name for candidate in installed for name in candidate.names]
        for name in sorted(self.allowed or ()):
            if name not in known:
                raise _unknown(name, ALLOW_VARIABLE, known)
        for name, who in self.disabled.items():
            if name not in known and name.partition(":")[0] not in known:
                raise _unknown(name, who, known)

    def check_components(self, found: Sequence[Found]) -> None:
        """Raises `RequestError` (RQ-UNKNOWN) for a component id its plugin does not provide."""
        for name, who in self.disabled.items():
            plugin, colon, _ = name.partition(":")
            ids = [component.id for row, components in found for component in components if row.plugin == plugin]
            if colon and name not in ids and any(row.plugin == plugin and row.state == "active" for row, _ in found):
                raise _unknown(name, who, ids)

    def refusal(self, candidate: Candidate) -> str | None:
        """Why this plugin is not to be imported, or None."""
        who = next((self.disabled[name] for name in candidate.names if name in self.disabled), None)
        if who:
            return f"disabled by {who}"
        outside = candidate.row.distribution != OUR_DISTRIBUTION
        if outside and self.allowed is not None and self.allowed.isdisjoint(candidate.names):
            return f"not listed in {ALLOW_VARIABLE}"
        return None


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _unknown(name: str, who: str, known: Iterable[str]) -> RequestError:
    known = sorted(set(known))
    text = f"{quoted(name)} is no installed plugin or component{nearest(name, known)}; known: {', '.join(known)}"
    return RequestError("RQ-UNKNOWN", text, locus=who)


# ------------------------------------------------------------------------------------------------ the loop


def discover(environment: Mapping[str, str], disable: Sequence[str] = ()) -> list[Found]:
    """Every installed plugin with its components. Raises `RequestError` (RQ-UNKNOWN) for a switched name that is not installed."""
    switches, installed = Switches.read(environment, disable), candidates()
    switches.check_plugins(installed)
    found: list[Found] = []
    holders: dict[str, PluginRow] = {}
    for candidate in installed:
        row = candidate.row
        refusal = switches.refusal(candidate)
        if row.state != "active":
            found.append((row, ()))
        elif refusal is not None:
            found.append((evolve(row, state="disabled", code="PL-DISABLED", reason=refusal), ()))
        elif row.plugin in holders:
            text = f"{holders[row.plugin].id} uses the plugin name {row.plugin!r} already, so {row.id} was not imported"
            found.append((evolve(row, state="conflict", code="PL-CONFLICT", reason=text), ()))
        else:
            holders[row.plugin] = row
            found.append(examine(row, candidate.load, package=candidate.package, disabled=switches.disabled))
    switches.check_components(found)
    return found


def examine(row: PluginRow, load: Callable[[], object], *, package: str = "", disabled: Mapping[str, str] | None = None) -> Found:
    """Import one plugin, ask it what it registers, and check that. Never raises for what the plugin does."""
    before, started = set(sys.modules), time.perf_counter()
    descriptors: list[Component] = []
    # stdout may be carrying JSON, so what a plugin prints goes to stderr
    with contextlib.redirect_stdout(sys.stderr), TorchGuard() as guard:
        try:
            plugin = load()
            row = evolve(row, api=_stated(plugin))
            _, note = check_api(plugin)
            descriptors = collect(plugin)
            row = evolve(row, reason=note)
        except RejectedError as rejected:
            shown = traceback.format_exc() if rejected.__cause__ else None
            row = evolve(row, state=rejected.state, code=rejected.code, reason=rejected.reason, traceback=shown)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit and the panics of Rust extensions too
            row = evolve(row, state="broken", code="PL-IMPORT", traceback=traceback.format_exc())
            row = evolve(row, reason=f"it cannot be imported: {cause(error)}")
    if guard.tripped:
        forget(package, before)
        descriptors = []
        row = evolve(row, state="broken", code="PL-HOOK", reason="imports torch while registering")
    components = tuple(_registered(descriptor, row, disabled or {}) for descriptor in descriptors)
    return evolve(_summed(row, components), seconds=time.perf_counter() - started), components


def _stated(plugin: object) -> str | None:
    stated = getattr(plugin, "MODELRIG_API", None)
    return stated if stated is None or isinstance(stated, str) else quoted(stated)


def _registered(descriptor: Component, row: PluginRow, disabled: Mapping[str, str]) -> Registered:
    who = disabled.get(f"{row.plugin}:{descriptor.name}")
    need = unmet(descriptor)
    state, code, reason = (
        ("disabled", "PL-DISABLED", f"disabled by {who}")
        if who
        else ("unavailable", "PL-NEED", need)
        if need
        else ("active", None, None)
    )
    return Registered(
        descriptor=descriptor, plugin=row.plugin, distribution=row.distribution, state=state, code=code, reason=reason
    )


def _summed(row: PluginRow, components: Sequence[Registered]) -> PluginRow:
    """A plugin none of whose components can serve has their state."""
    states = {component.state for component in components}
    if states in ({"unavailable"}, {"disabled"}):
        reason = "; ".join(dict.fromkeys(component.reason or "" for component in components))
        return evolve(row, state=states.pop(), code=components[0].code, reason=reason)
    return row
