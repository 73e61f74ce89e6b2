"""`modelrig inspect`: what a checkpoint holds, from its configs and tensor headers."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import click

from modelrig.cli.output import print_json, print_table, printable

#: code and locus of what keeps a checkpoint from being planned, not from being looked at: nobody here knows its architecture
UNKNOWN = {("CF-MISSING", None), ("CF-MISSING", "model_type"), ("CF-ARCH", "model_type"), ("CR-CODE", "auto_map")}
SHOWN_KEYS, SHOWN_CHARACTERS = 200, 200  # of config.json
SHOWN_TENSORS, LISTED_TENSORS = 20, 10_000  # in a table, in JSON


@click.command("inspect")
@click.argument("model")
@click.option("--variant", metavar="NAME", help="which set of tensor files: fp16 for model.fp16.safetensors")
@click.option("--config", metavar="FILE", help="a TOML file instead of modelrig.toml in the working directory")
@click.option("--tensors", "all_tensors", is_flag=True, help="list every tensor")
@click.option("--verify", "verified", is_flag=True, help="compare every file with the manifest written beside it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(model: str, variant: str | None, config: str | None, all_tensors: bool, verified: bool, as_json: bool) -> int:
    """Show the files, index, tensors, dtypes, ties and config of MODEL: a path, org/name[@rev], or tiny.

    With --verify, files that are not those that were saved or downloaded are named, and the exit code is 1.
    """
    found = inspect(model, config, variant, all_tensors=all_tensors, verified=verified)
    is_damaged = verified and found["integrity"]["state"] == "damaged"
    if as_json:
        print_json(found)
    elif is_damaged:
        _print_integrity(found["integrity"])
    else:
        _print(found, all_tensors)
    return 1 if is_damaged else 0


def _print(found: dict[str, Any], all_tensors: bool) -> None:
    click.echo(printable(f"{found['model']}  {found['root']}" + (f" at {found['revision']}" if found["revision"] else "")))
    counts = (
        f"{found['tensors']:,} tensors, {found['elements']:,} elements, {found['bytes']:,} bytes in {len(found['files'])} files"
    )
    click.echo(printable(f"{found['format']}, {counts}" + (f", index {found['index']}" if found["index"] else "")))
    click.echo()
    print_table(("file", "bytes", "tensors"), [(file["name"], f"{file['bytes']:,}", file["tensors"]) for file in found["files"]])
    click.echo()
    rows = [(row["dtype"], f"{row['tensors']:,}", f"{row['elements']:,}", f"{row['bytes']:,}") for row in found["dtypes"]]
    print_table(("dtype", "tensors", "elements", "bytes"), rows)
    click.echo()
    entries = found["entries"] if all_tensors else found["entries"][:SHOWN_TENSORS]
    rows = [(one["name"], one["dtype"], "×".join(map(str, one["shape"])) or "scalar", one["file"]) for one in entries]
    print_table(("tensor", "dtype", "shape", "file"), rows)
    if len(entries) < found["tensors"]:
        click.echo(f"and {found['tensors'] - len(entries):,} more; --tensors lists all")
    for group in found["ties"]:
        click.echo(printable(f"tied: {' = '.join(group)}"))
    click.echo()
    print_table(("config.json", ""), list(found["config"].items()))
    for note in found["notes"]:
        click.echo(printable(f"note: {note}"))
    if found["integrity"] is not None:
        _print_integrity(found["integrity"])


def _print_integrity(integrity: dict[str, Any]) -> None:
    said = {
        "verified": f"verified: all {len(integrity['checked'])} files are as they were written",
        "unverified": "unverified: nothing here says what the files should be",
        "damaged": "damaged:",
    }
    click.echo(said[integrity["state"]])
    for problem in integrity["problems"]:
        click.echo(printable(f"  [{problem['code']}] {problem['file'] or 'the folder'}: {problem['text']}"))


def inspect(
    model: str, config: str | None = None, variant: str | None = None, *, all_tensors: bool = False, verified: bool = False
) -> dict[str, Any]:
    """The checkpoint as plain data. No architecture has to know it; one that does adds what it read from the config."""
    from modelrig.errors import CheckpointError, ModelrigError
    from modelrig.planning.identify import (
        CONFIG,
        catalog,
        check_reference,
        config_notes,
        describe,
        possible_folder,
        read_config,
        resolve,
    )
    from modelrig.planning.request import read_request
    from modelrig.registry import current

    reference = check_reference(model)
    request = read_request({} if variant is None else {"variant": variant}, config, checkpoint=possible_folder(reference))
    registry = current(disable=request.disable)
    _, snapshot = resolve(reference, registry, request.variant)
    integrity = _integrity(snapshot.root) if verified else None
    if integrity is not None and integrity["state"] == "damaged":  # nothing else it says can be relied upon
        return {"model": reference, "root": str(snapshot.root), "integrity": integrity}
    _, found = catalog(snapshot, registry)
    notes, raw = list(found.notes), {}
    ties = [list(group) for group in found.ties]
    try:
        raw = read_config(snapshot)
        architecture, facts = describe(raw, snapshot.root / CONFIG, found, registry)
    except ModelrigError as error:
        if isinstance(error, CheckpointError) and (error.code, error.locus) not in UNKNOWN:
            raise
        notes.append(str(error))
        known = None
    else:
        notes += [*config_notes(raw, architecture.registered.name), *facts.notes]
        ties += [[original, alias] for alias, original in facts.ties.items() if alias not in found.entries]
        known = {
            "component": architecture.registered.name,
            "parameters": sum(prod(one.shape) for one in facts.parameters if one.stored_as is not None),
            "blocks": len(facts.blocks),
            "context_length": facts.context_length,
        }
    settings = {key: value for key, value in raw.items() if isinstance(value, str | int | float | bool)}
    if len(settings) > SHOWN_KEYS:
        notes.append(f"{CONFIG} has {len(settings) - SHOWN_KEYS:,} more keys than are shown")
    entries = found.entries.values()
    per_file = Counter(entry.file for entry in entries)
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    bytes_: Counter[str] = Counter()
    further = {name for group in found.ties for name in group[1:]}  # names of what is stored once
    for entry in entries:
        tensors[entry.dtype] += 1
        if entry.name in further:
            continue
        elements[entry.dtype] += prod(entry.shape)
        bytes_[entry.dtype] += entry.nbytes
    listed = list(entries) if all_tensors else list(entries)[:LISTED_TENSORS]
    if len(listed) < len(entries):
        notes.append(f"{len(entries) - len(listed):,} more tensors are not listed; --tensors lists all")
    return {
        "model": reference,
        "root": str(snapshot.root),
        "source": snapshot.source,
        "revision": snapshot.revision,
        "complete": snapshot.complete,
        "format": found.format,
        "index": found.index,
        "files": [{"name": file.name, "bytes": file.size, "tensors": per_file[number]} for number, file in enumerate(found.files)],
        "tensors": len(found.entries),
        "elements": sum(elements.values()),
        "bytes": found.total_bytes,
        "dtypes": [
            {"dtype": dtype, "tensors": count, "elements": elements[dtype], "bytes": bytes_[dtype]}
            for dtype, count in tensors.most_common()
        ],
        "entries": [
            {
                "name": _short(entry.name),
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "file": found.files[entry.file].name,
                "offset": entry.offset,
                "bytes": entry.nbytes,
            }
            for entry in listed
        ],
        "ties": [[_short(name) for name in group] for group in ties],
        "config": {_short(key): _short(settings[key]) for key in list(settings)[:SHOWN_KEYS]},
        "architecture": known,
        "metadata": dict(found.metadata),
        "notes": notes,
        "integrity": integrity,
    }


def _integrity(root: Path) -> dict[str, Any]:
    from modelrig.checkpoint.saving.verify import verify
    from modelrig.loading.progress import progress_bar

    with progress_bar("verifying") as report:
        found = verify(root, report)
    return {
        "state": found.state,
        "checked": list(found.checked),
        "problems": [{"code": one.code, "file": one.file, "text": one.text} for one in found.problems],
        "save_id": found.save_id,
    }


def _short(value: Any) -> Any:
    return value[:SHOWN_CHARACTERS] + "…" if isinstance(value, str) and len(value) > SHOWN_CHARACTERS else value
