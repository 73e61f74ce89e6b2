"""`modelrig convert`: a checkpoint in another format, dtype, or number of files."""

from __future__ import annotations

from typing import Any

import click

from modelrig.cli.output import print_json, printable


@click.command("convert")
@click.argument("source")
@click.argument("target")
@click.option("--format", "format_", default="safetensors", show_default=True, metavar="NAME", help="safetensors or pytorch_bin")
@click.option("--dtype", metavar="DTYPE", help="what floating tensors become; by default they stay what they are")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="bytes of tensors in one file, such as 200MB"
)
@click.option("--variant", metavar="MARK", help="a mark for the names of the files written, such as fp16")
@click.option("--from-variant", metavar="MARK", help="read the files with this mark")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(
    source: str,
    target: str,
    format_: str,
    dtype: str | None,
    max_shard_size: str,
    variant: str | None,
    from_variant: str | None,
    as_json: bool,
) -> None:
    """Write the checkpoint SOURCE (a path, org/name[@rev], or tiny) to the folder TARGET, which may be the same.

    All or nothing: until it is complete, TARGET holds what it held before. Memory stays small whatever the model's size.
    """
    from modelrig.saving.convert import convert

    report = convert(
        source,
        target,
        format=format_,
        dtype=dtype,
        max_shard_size=int(max_shard_size) if max_shard_size.isdigit() else max_shard_size,
        variant=variant,
        from_variant=from_variant,
        progress=True,
    )
    found: dict[str, Any] = {
        "path": str(report.path),
        "files": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in report.files],
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "durability": report.durability,
        "notes": list(report.notes),
    }
    if as_json:
        print_json(found)
        return
    for file in found["files"]:
        click.echo(printable(file["name"]))
    summary = (
        f"{found['path']}: {found['bytes']:,} bytes in {len(found['files'])} files, {found['seconds']:.2f} s, {found['durability']}"
    )
    click.echo(printable(summary), err=True)
    for note in found["notes"]:
        click.echo(printable(f"note: {note}"), err=True)
