"""What the reference is: source, format and architecture are identified, not negotiated. Exactly one claims the input.

resolve → catalog → describe. Only configs and headers are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from modelrig.checkpoint.catalog import file_names, list_tensor_files
from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.layout import FileNames, is_one_of_several
from modelrig.checkpoint.paths import inside
from modelrig.checkpoint.strict_json import load_json
from modelrig.components import Architecture, Catalog, Format, ModelFacts, Snapshot
from modelrig.errors import CodeRefused, ConfigError, ModelrigError, PluginError, RequestError, SourceError, nearest, quoted
from modelrig.registry import Registered, Registry
from modelrig.registry.ledger import cause

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
NEIGHBOURS = 1000  # entries of a folder that are considered for "did you mean"


@frozen
class Identified:
    """A component that claims the input, and what it says it recognises."""

    registered: Registered
    why: str


# ------------------------------------------------------------------------------------------------ resolve


def resolve(reference: str, registry: Registry, variant: str | None = None) -> tuple[Identified, Snapshot]:
    """The source that recognises `reference`, and where the checkpoint lies. A source that fetches is told the variant.

    Raises:
        SourceError: SR-UNKNOWN, SR-CLAIMS, or what the source raises.
    """
    claims, silent = _claims("sources", reference, registry)
    if not claims:
        guess = nearest(reference, [*_offered(registry), *_neighbours(reference)])
        tried = "; ".join(
            f"{one.name}: {one.descriptor.summary}" for one in registry.components("sources") if one.state == "active"
        )
        raise SourceError(
            "SR-UNKNOWN",
            f"{quoted(reference)} is no existing path, and no source recognises it{guess}{_said(silent)}",
            hint=f"sources take {tried}" if tried else "no source is installed; modelrig plugins lists what is",
        )
    chosen = _only(claims, f"the reference {quoted(reference)}")
    if variant is not None and hasattr(chosen.registered.planner(), "resolve_variant"):
        snapshot = _ask(chosen.registered, "resolve_variant", reference, variant)
    else:
        snapshot = _ask(chosen.registered, "resolve", reference)
    return chosen, evolve(snapshot, variant=variant)


def _offered(registry: Registry) -> list[str]:
    """References that sources with a closed list of models know."""
    found: list[str] = []
    for one in registry.components("sources"):
        with contextlib.suppress(Exception):  # only a help to whoever misspelt
            found += [str(name) for name in getattr(one.planner(), "names", list)() if one.state == "active"]
    return found


def _neighbours(reference: str) -> list[str]:
    """Names that exist beside the path `reference` would be."""
    try:
        parent, _, _ = reference.rpartition("/")
        with os.scandir(parent or ".") as found:
            names = [entry.name for entry, _ in zip(found, range(NEIGHBOURS), strict=False) if entry.is_dir()]
    except (OSError, ValueError):
        return []
    return [f"{parent}/{name}" if parent else name for name in names]


# ------------------------------------------------------------------------------------------------ catalog


def catalog(snapshot: Snapshot, registry: Registry, *, prefer_yielding: bool = False) -> tuple[Identified, Catalog]:
    """The format that reads the folder, and every tensor it holds.

    Of several formats that claim it, those that yield to another are left out, and noted; with `prefer_yielding`, those that
    another yields to.

    Raises:
        SourceError: SR-FORMAT, naming the tensor files that are there; SR-CLAIMS.
    """
    claims, silent = _claims("formats", snapshot, registry)
    if not claims:
        names = list_tensor_files(snapshot)
        numbered = sorted(name for name in names if is_one_of_several(name))
        if numbered and not any(".index." in name for name in file_names(snapshot)):
            what = f"{quoted(numbered[0])} is one of several files, and the index that lists them is missing"
            raise SourceError("SR-FORMAT", what, path=snapshot.root, hint="an interrupted download or copy? fetch it again")
        _refuse_variant(snapshot, registry)
        there = ", ".join(quoted(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        known = ", ".join(one.name for one in registry.components("formats") if one.state == "active") or "none"
        what = (
            f"no installed format reads what is there ({there}); installed: {known}"
            if names
            else "the folder holds no tensor files"
        )
        raise SourceError("SR-FORMAT", what + _said(silent), path=snapshot.root)
    staying = _settled(claims, prefer_yielding)
    chosen = _only(staying, f"the folder {snapshot.root}")
    found: Catalog = _ask(chosen.registered, "catalog", snapshot)
    notes = [
        f"{claim.why} is not used: {claim.registered.name} yields to {chosen.registered.name}"
        if not prefer_yielding
        else f"{claim.why} is not used: {chosen.registered.name} was asked for"
        for claim in claims
        if claim is not chosen
    ]
    return chosen, evolve(found, notes=(*found.notes, *notes)) if notes else found


def _settled(claims: list[Identified], prefer_yielding: bool) -> list[Identified]:
    """Those that do not yield to another of them, or those that none of them yields to; all, where that leaves none."""

    def yields(one: Identified, other: Identified) -> bool:
        descriptor = one.registered.descriptor
        return isinstance(descriptor, Format) and other.registered.name in descriptor.yields_to

    staying = [
        one
        for one in claims
        if not any(other is not one and (yields(other, one) if prefer_yielding else yields(one, other)) for other in claims)
    ]
    return staying or claims


def _refuse_variant(snapshot: Snapshot, registry: Registry) -> None:
    """Raise SR-FORMAT where tensor files are there, but only of other variants than the one asked for."""
    names = file_names(snapshot)
    named = [getattr(one.planner(), "files", None) for one in registry.components("formats") if one.state == "active"]
    files = [one for one in named if isinstance(one, FileNames)]
    there = sorted({mark for one in files for mark in one.variants(names)})
    if snapshot.variant is not None:
        has_plain = any(one.first(names) for one in files)
        beside = ", and files without a mark" if has_plain else ""
        what = f"no tensor files of the variant {snapshot.variant!r}; variants there: {', '.join(there) or 'none'}{beside}"
        hint = f"ask for another{nearest(snapshot.variant, there)}" if there else "ask for no variant" if has_plain else None
        raise SourceError("SR-FORMAT", what, path=snapshot.root, hint=hint)
    if there:
        what = f"all tensor files there are of a variant: {', '.join(there)}"
        hint = f"ask for one: variant={there[0]!r}, on the command line --variant {there[0]}"
        raise SourceError("SR-FORMAT", what, path=snapshot.root, hint=hint)


# ------------------------------------------------------------------------------------------------ describe


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """config.json of the checkpoint. Raises `ConfigError` and `FileError`."""
    return load_json(inside(snapshot, CONFIG), error=ConfigError, prefix="CF")


def identify_architecture(config: Mapping[str, Any], path: Path, registry: Registry) -> Identified:
    """The component that implements the config's `model_type`.

    Raises:
        ConfigError: CF-MISSING, CF-TYPE, CF-ARCH (with the nearest known).
        CodeRefused: nobody implements it, and the checkpoint would have its own code run.
    """
    with ConfigReader(config, path) as read:
        model_type = read.string("model_type")
    serving: list[Registered] = []
    others: list[Registered] = []
    known: set[str] = set()
    for one in registry.components("architectures"):
        assert isinstance(one.descriptor, Architecture)
        known |= one.descriptor.model_types
        if model_type in one.descriptor.model_types:
            (serving if one.state == "active" else others).append(one)
    if serving:
        return _only([Identified(one, f"model_type {model_type!r} in {CONFIG}") for one in serving], f"model_type {model_type!r}")
    if config.get("auto_map"):
        raise CodeRefused(
            "CR-CODE",
            f"model_type {quoted(model_type)} is not among {_listed(known)}, and the checkpoint asks for its own code to be run",
            path=path,
            locus="auto_map",
            hint="code of a checkpoint is never run; a plugin can add the architecture",
        )
    silent = {one.id: _why_silent(one) for one in others}
    raise ConfigError(
        "CF-ARCH",
        f"no installed architecture implements {quoted(model_type)}; known are {_listed(known)}"
        + nearest(model_type, known)
        + _said(silent),
        path=path,
        locus="model_type",
    )


def describe(config: Mapping[str, Any], path: Path, catalog: Catalog, registry: Registry) -> tuple[Identified, ModelFacts]:
    """The architecture, and what its planner knows of this checkpoint."""
    chosen = identify_architecture(config, path, registry)
    facts: ModelFacts = _ask(chosen.registered, "describe", config, catalog, path)
    return chosen, facts


def config_notes(config: Mapping[str, Any], architecture: str) -> list[str]:
    """What is odd in config.json without being wrong."""
    notes = []
    if config.get("auto_map"):
        notes.append(f"{CONFIG} names code of its own (auto_map); it is not run, {architecture} is used")
    classes = config.get("architectures")
    # the language model of a family that sees and hears too is named like the whole
    family = str(config["model_type"]).replace("_", "").replace("-", "").lower().removesuffix("text")
    if isinstance(classes, list):
        strange = [name for name in classes if isinstance(name, str) and not name.replace("_", "").lower().startswith(family)]
        if strange:
            said = f"model_type {quoted(config['model_type'])} but architectures {quoted(strange[0])}"
            notes.append(f"{CONFIG} says {said}; model_type decides")
    return notes


# ------------------------------------------------------------------------------------------------ claims


def _claims(kind: str, subject: Any, registry: Registry) -> tuple[list[Identified], dict[str, str]]:
    """Those that claim `subject`, and why the others that could not even be asked were silent."""
    claims, silent = [], {}
    for one in registry.components(kind):
        if one.state != "active":
            silent[one.id] = _why_silent(one)
            continue
        try:
            why = one.planner().claims(subject)
        except MemoryError:
            raise
        except ModelrigError as error:
            silent[one.id] = str(error)
        except Exception as error:  # one that fails must not keep the others from recognising it
            silent[one.id] = f"failed: {cause(error)}"
        else:
            if why is not None:
                claims.append(Identified(one, str(why)))
    for row in registry.rows:
        if row.state not in ("active", "disabled") and not row.provides:
            silent[row.id] = f"{row.state}: {row.reason}"
    return claims, silent


def _only(claims: list[Identified], what: str) -> Identified:
    if len(claims) == 1:
        return claims[0]
    listed = "; ".join(f"{claim.registered.id} ({claim.why})" for claim in claims)
    raise SourceError(
        "SR-CLAIMS", f"{what} is claimed by {len(claims)} components: {listed}", hint='disable all but one: disable = ["plugin"]'
    )


def _ask(registered: Registered, method: str, *arguments: Any) -> Any:
    """Call the planner; whatever it raises beside our errors becomes a `PluginError` (PL-CONTRACT)."""
    planner = registered.planner()
    try:
        return getattr(planner, method)(*arguments)
    except (ModelrigError, MemoryError):
        raise
    except Exception as error:
        raise PluginError(
            "PL-CONTRACT",
            f"{registered.id} failed to {method}: {cause(error)}",
            plugin=registered.id,
            distribution=registered.distribution,
        ) from error


def _why_silent(one: Registered) -> str:
    install = f" ({one.descriptor.install})" if one.descriptor.install else ""
    return f"{one.state}: {one.reason}{install}"


def _said(silent: Mapping[str, str]) -> str:
    return "".join(f"; {name} could not be asked, {why}" for name, why in silent.items())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def check_reference(reference: Any) -> str:
    """`reference` as a string. Raises `RequestError` (RQ-VALUE)."""
    if not isinstance(reference, str | os.PathLike):
        raise RequestError("RQ-VALUE", f"{quoted(reference)}; a path, org/name[@rev] or a bundled name is accepted", locus="model")
    text = os.fspath(reference)
    if not isinstance(text, str) or not text or "\0" in text:
        raise RequestError("RQ-VALUE", f"{quoted(text)}; a path, org/name[@rev] or a bundled name is accepted", locus="model")
    return text


def possible_folder(reference: str) -> Path:
    """The folder `reference` is if it is a path at all: known before any source is asked."""
    return Path(os.path.expanduser(reference))  # noqa: PTH111 - Path.expanduser raises where there is no such user
