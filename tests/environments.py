"""Wheels, and clean environments to install them into."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def build_wheel(project: Path, out: Path) -> Path:
    """Build `project` with this environment's hatchling: no network, no isolation."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return max(out.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime_ns)


class CleanEnvironment:
    """A virtual environment with our dependencies but without this checkout, and wheels installed into it."""

    def __init__(self, folder: Path, wheels: list[Path]) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin/python"
        self.packages = Path(
            subprocess.run(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
        self._link_dependencies()
        for wheel in wheels:
            self.install(wheel)

    def _link_dependencies(self) -> None:
        """Every installed package but ours, by link: the tests have no network to install them from."""
        installed = {str(one.locate_file("")) for one in metadata.distributions()}
        for source in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages(), *installed}:
            for entry in Path(source).iterdir():
                ours = "modelrig" in entry.name
                startup = entry.suffix == ".pth" or entry.name in ("_virtualenv.py", "__pycache__")
                target = self.packages / entry.name
                if not ours and not startup and not target.exists():
                    target.symlink_to(entry)

    def install(self, wheel: Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-deps", "--no-index"]
        done = subprocess.run([*command, "--force-reinstall", str(wheel)], capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr

    def run(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """`modelrig` with these arguments."""
        return self.start("-m", "modelrig.cli", *arguments, cwd=cwd, **environment)

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Its Python, with none of our variables."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MODELRIG_"))}
        return subprocess.run(
            [str(self.python), "-W", "error", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or self.folder,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
        )

    def json(self, *arguments: str, **environment: str) -> Any:
        done = self.run(*arguments, "--json", **environment)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def row(self, distribution: str, **environment: str) -> dict[str, Any]:
        """The row of that distribution's one plugin in the ledger."""
        rows = [row for row in self.json("plugins", **environment) if row["distribution"] == distribution]
        assert 1 == len(rows)
        return rows[0]
