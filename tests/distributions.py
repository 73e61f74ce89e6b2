"""Distributions as pip would leave them: metadata and modules in a folder that stands on the path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

CACHE = """
    CacheImplementation(
        name={name!r},
        summary="a cache for tests",
        planner={planner!r},
        implementation="{module}_parts:Cache",
        capabilities=CacheCapabilities(devices={{"cpu"}}, dtypes={{"float32"}}, layers={{"full"}}),
        {more}
    )
"""


def cache_plugin(
    *names: str, module: str = "acme_modelrig", planner: str = "acme_parts:Planner", more: str = "", api: str = '"1.0"'
) -> str:
    """The source of a plugin module that registers caches."""
    items = "".join(
        textwrap.dedent(CACHE).strip().format(name=name, module=module, planner=planner, more=more) + "," for name in names
    )
    return (
        "from modelrig.components import CacheCapabilities, CacheImplementation\n"
        "from modelrig.hookspecs import hookimpl\n"
        f"MODELRIG_API = {api}\n"
        "@hookimpl\n"
        "def modelrig_caches():\n"
        f"    return [{items}]\n"
    )


def write_distribution(
    folder: Path,
    name: str,
    modules: Mapping[str, str],
    *,
    version: str = "1.0",
    entry_points: Mapping[str, str] | str | None = None,
    requires: Iterable[str] = (),
    direct_url: str | None = None,
) -> Path:
    """Install a distribution into `folder`.

    Args:
        modules: file name → source.
        entry_points: plugin name → module, or the whole text of entry_points.txt; by default the first module under `name`.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    if entry_points is None:
        entry_points = {name: next(iter(modules)).removesuffix(".py")}
    if not isinstance(entry_points, str):
        entry_points = "[modelrig.plugins]\n" + "".join(f"{plugin} = {value}\n" for plugin, value in entry_points.items())
    (info / "entry_points.txt").write_text(entry_points)
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url)
    for file, source in modules.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(textwrap.dedent(source))
    return folder


def run_python(
    *arguments: str, path: Iterable[Path] = (), cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh Python with folders on its path and none of our variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MODELRIG_")}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=clean)
