"""`modelrig doctor` looks for what is wrong with this installation."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib import metadata

import click

from modelrig.cli.output import print_json, printable
from modelrig.cli.plugins import configured_registry, json_option
from modelrig.registry.health import examine_installation

PLUGIN_FAILED = 4
PACKAGES = ("modelrig", "torch", "safetensors", "tokenizers", "huggingface_hub", "transformers", "numpy")
VARIABLES = re.compile(r"(MODELRIG|HF|HUGGING_FACE|HUGGINGFACE)_")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


@click.command("doctor")
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Look for what is wrong with this installation.

    Exits with 4 if a plugin failed, else with 0.
    """
    findings = examine_installation(configured_registry())
    versions = {name: _version(name) for name in PACKAGES}
    variables = {name: _shown(name, value) for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    if as_json:
        found = [finding.to_json() for finding in findings]
        print_json({"python": platform.python_version(), "versions": versions, "variables": variables, "findings": found})
    else:
        there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        click.echo(f"Python {platform.python_version()}, {there}")
        for name, value in variables.items():
            click.echo(f"{name}={printable(value)}")
        for finding in findings:
            click.echo(printable(f"{finding.level}: {finding.about}: {finding.text}"))
            if finding.fix:
                click.echo(printable(f"    {finding.fix}"))
        if not any(finding.level != "note" for finding in findings):
            click.echo("nothing is wrong")
    if any(finding.level == "error" for finding in findings):
        context.exit(PLUGIN_FAILED)


def _version(package: str) -> str | None:
    """From the metadata: asking torch itself would import it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _shown(name: str, value: str) -> str:
    """Reports are pasted into issues: a secret is only said to be set."""
    return "(set, not shown)" if SECRET.search(name) and value else value
