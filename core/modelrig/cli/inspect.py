"""`modelrig inspect`: what a checkpoint holds, from its configs and tensor headers."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import click

from modelrig.cli.output import print_json, print_table, printable

#: code and locus of what keeps a checkpoint from being planned, not from being looked at: nobody here knows its architecture
UNKNOWN = {("CF-MISSING", None), ("CF-MISSING", "model_type"), ("CF-ARCH", "model_type"), ("CR-CODE", "auto_map")}
SHOWN_KEYS, SHOWN_CHARACTERS = 200, 200  # of config.json


@click.command("inspect")
@click.argument("model")
@click.option("--variant", metavar="NAME", help="which set of tensor files: fp16 for model.fp16.safetensors")
@click.option("--config", metavar="FILE", help="a TOML file instead of modelrig.toml in the working directory")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(model: str, variant: str | None, config: str | None, as_json: bool) -> None:
    """Show the files, tensors, dtypes and config of MODEL: a path, org/name[@rev], or tiny."""
    found = inspect(model, config, variant)
    if as_json:
        print_json(found)
        return
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
    print_table(("config.json", ""), list(found["config"].items()))
    for note in found["notes"]:
        click.echo(printable(f"note: {note}"))


def inspect(model: str, config: str | None = None, variant: str | None = None) -> dict[str, Any]:
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
    _, found = catalog(snapshot, registry)
    notes, raw = list(found.notes), {}
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
    for entry in entries:
        tensors[entry.dtype] += 1
        elements[entry.dtype] += prod(entry.shape)
        bytes_[entry.dtype] += entry.nbytes
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
        "config": {_short(key): _short(settings[key]) for key in list(settings)[:SHOWN_KEYS]},
        "architecture": known,
        "metadata": dict(found.metadata),
        "notes": notes,
    }


def _short(value: Any) -> Any:
    return value[:SHOWN_CHARACTERS] + "…" if isinstance(value, str) and len(value) > SHOWN_CHARACTERS else value
