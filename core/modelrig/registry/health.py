"""What may be wrong with an installation: each check is a function that yields findings, and touches no network."""

from __future__ import annotations

import contextlib
import json
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from attrs import asdict, frozen

from modelrig.hookspecs import ENTRY_POINT_GROUP

from .discovery import canonical, distribution_name, distributions
from .ledger import OUR_DISTRIBUTION, Registry

SLOW_SECONDS = 0.1
#: states that make `modelrig doctor` exit with a plugin failure; the others are somebody's wish or a package away
FAILURES = ("broken", "incompatible", "conflict")


@frozen
class Finding:
    """One thing that is not as it should be. `level` is `error` (a plugin failed), `warning` or `note`."""

    level: str
    check: str
    about: str
    text: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine_installation(registry: Registry) -> list[Finding]:
    """All findings, errors first."""
    found = [*_plugins(registry), *_slow(registry), *_duplicates(), *_required_modelrig(registry), *_stale_entry_points()]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _plugins(registry: Registry) -> Iterator[Finding]:
    for row in registry.rows:
        if row.state in FAILURES:
            fix = f"modelrig plugins show {row.id}" if row.traceback else None
            yield Finding("error", "plugin", row.id, f"{row.state}: {row.reason}", fix)
        elif row.state == "disabled":
            yield Finding("note", "plugin", row.id, row.reason or "disabled")
        elif row.reason and row.state == "active":
            yield Finding("note", "plugin", row.id, row.reason)
        for entry in row.provides:
            if entry.reason is not None and (entry.state, row.state) != ("disabled", "disabled"):
                text, _, install = entry.reason.partition("; run: ")
                yield Finding("note", "component", f"{row.plugin}:{entry.name}", f"{entry.state}: {text}", install or None)


def _slow(registry: Registry) -> Iterator[Finding]:
    for row in registry.rows:
        if row.seconds > SLOW_SECONDS:
            text = f"took {row.seconds * 1000:.0f} ms to register; everybody's listing waits for it"
            yield Finding("warning", "slow", row.id, text, "let the module of the entry point import less")


def _duplicates() -> Iterator[Finding]:
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for distribution in metadata.distributions():
        place = Path(str(getattr(distribution, "_path", distribution.locate_file("")))).resolve()
        folders[canonical(distribution_name(distribution))].add(str(place))
    for name, places in sorted(folders.items()):
        if len(places) > 1:
            text = "is installed more than once, and only the first on the path counts: " + ", ".join(sorted(places))
            yield Finding("warning", "duplicate", name, text, f"pip uninstall {name}, until it is gone, and install it again")


def _required_modelrig(registry: Registry) -> Iterator[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement

    ours = next((row.version for row in registry.rows if row.distribution == OUR_DISTRIBUTION), None)
    outside = {row.distribution for row in registry.rows if row.distribution not in (None, OUR_DISTRIBUTION)}
    for name in sorted(map(str, outside)):
        with contextlib.suppress(metadata.PackageNotFoundError, InvalidRequirement):
            for requirement in map(Requirement, metadata.requires(name) or []):
                applies = canonical(requirement.name) == OUR_DISTRIBUTION and (
                    not requirement.marker or requirement.marker.evaluate()
                )
                if applies and ours is not None and not requirement.specifier.contains(ours, prereleases=True):
                    text = f"asks for {requirement}, but modelrig {ours} is installed"
                    fix = f"{shlex.join(['pip', 'install', str(requirement)])}, or install another version of {name}"
                    yield Finding("warning", "version", name, text, fix)


def _stale_entry_points() -> Iterator[Finding]:
    """An editable installation keeps the entry points it had when it was installed."""
    for distribution in distributions():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            source = json.loads(distribution.read_text("direct_url.json") or "{}")
            if not source.get("dir_info", {}).get("editable"):
                continue
            folder = Path(unquote(urlsplit(source["url"]).path))
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            written = project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {})
            installed = {point.name: point.value for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP}
            if written != installed:
                names = sorted(name for name in {*written, *installed} if written.get(name) != installed.get(name))
                text = f"its pyproject.toml and what is installed disagree about {', '.join(names)}"
                yield Finding(
                    "warning",
                    "stale",
                    distribution_name(distribution),
                    text,
                    shlex.join(["pip", "install", "--editable", str(folder)]),
                )
