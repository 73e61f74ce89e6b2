"""A real third-party distribution: built, installed beside ours in a clean environment, used, and broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
THIRD_PARTY = ROOT / "examples/plugins/modelrig-tiled-attention"
PLUGIN = "modelrig_tiled_attention"

pytestmark = pytest.mark.packaging


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
        for source in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages()}:
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
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MODELRIG_"))}
        return subprocess.run(
            [str(self.python), "-W", "error", "-m", "modelrig.cli", *arguments],
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

    def row(self, **environment: str) -> dict[str, Any]:
        """The third-party plugin's row in the ledger."""
        rows = [row for row in self.json("plugins", **environment) if row["distribution"] == "modelrig-tiled-attention"]
        assert 1 == len(rows)
        return rows[0]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    out = tmp_path_factory.mktemp("wheels")
    return CleanEnvironment(tmp_path_factory.mktemp("clean") / "env", [build_wheel(ROOT, out), build_wheel(THIRD_PARTY, out)])


@pytest.fixture
def reworked(environment: CleanEnvironment, tmp_path: Path) -> Callable[..., CleanEnvironment]:
    """`reworked(file, before, after)`: the third-party distribution, changed, built and installed again."""

    def rework(file: str, before: str, after: str) -> CleanEnvironment:
        project = tmp_path / "project"
        shutil.copytree(THIRD_PARTY, project, ignore=shutil.ignore_patterns("__pycache__"))
        source = project / PLUGIN / file
        text = source.read_text()
        assert before in text
        source.write_text(text.replace(before, after, 1))
        environment.install(build_wheel(project, tmp_path / "wheels"))
        return environment

    return rework


@pytest.fixture(autouse=True)
def restored(environment: CleanEnvironment, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """After a test that broke it, the real distribution again."""
    yield
    if "reworked" in request.fixturenames:
        environment.install(build_wheel(THIRD_PARTY, tmp_path_factory.mktemp("again")))


def generates(environment: CleanEnvironment, *arguments: str) -> dict[str, Any]:
    """What `modelrig run` prints; in float32, where another kernel gives the same tokens."""
    done = environment.run("run", "tiny", "def add(a, b):", "--max-new-tokens", "12", "--dtype", "float32", "--json", *arguments)
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_clean(environment: CleanEnvironment) -> None:
    code = "import modelrig, modelrig_plugins; print(modelrig.__file__, modelrig_plugins.__file__)"
    done = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, check=True, cwd=environment.folder)
    assert str(ROOT) not in done.stdout


def test_it_is_listed(environment: CleanEnvironment) -> None:
    row = environment.row()
    assert ("active", None) == (row["state"], row["reason"] or None)
    assert [("attention", "tiled", "active")] == [(part["kind"], part["name"], part["state"]) for part in row["provides"]]
    assert "tiled" in environment.run("plugins").stdout
    assert 0 == environment.run("plugins", "show", "tiled").returncode


def test_it_is_selected_by_a_config_file_and_generates_the_same_tokens(environment: CleanEnvironment, tmp_path: Path) -> None:
    expected = generates(environment)["tokens"]
    (tmp_path / "rig.toml").write_text('[attention]\nname = "tiled"\nblock_size = 16\n')
    actual = generates(environment, "--config", str(tmp_path / "rig.toml"))
    assert expected == actual["tokens"]
    assert "tiled" == actual["plan"]["choices"]["attention"]["component"]


def test_its_options_are_checked_before_anything_is_loaded(environment: CleanEnvironment) -> None:
    done = environment.run("plan", "tiny", "--attention", "tiled", "--set", "attention.block_size=3")
    assert 3 == done.returncode
    assert "block_size is 3" in done.stderr
    done = environment.run("plan", "tiny", "--attention", "tiled", "--set", "attention.blok_size=32")
    assert 2 == done.returncode
    assert "block_size" in done.stderr


def test_auto_does_not_change_when_it_is_installed(environment: CleanEnvironment) -> None:
    without, beside = (environment.json("plan", "tiny", **variables) for variables in ({"MODELRIG_PLUGINS": ""}, {}))
    assert without["choices"] == beside["choices"]
    assert without["hash"] == beside["hash"]


def test_the_allow_list_and_disabling_keep_it_out(environment: CleanEnvironment) -> None:
    assert "disabled" == environment.row(MODELRIG_PLUGINS="")["state"]
    assert "disabled" == environment.row(MODELRIG_DISABLE="tiled-attention")["state"]
    done = environment.run("plan", "tiny", "--attention", "tiled", MODELRIG_DISABLE="tiled-attention")
    assert done.returncode in (2, 4)
    assert "disabled" in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "state", "reason"),
    [
        ('MODELRIG_API = "1.0"', 'MODELRIG_API = "1.0"\nimport no_such_module', "broken", "no_such_module"),
        ('MODELRIG_API = "1.0"', 'MODELRIG_API = "2.0"', "incompatible", "2.0"),
        ('MODELRIG_API = "1.0"', "", "incompatible", "MODELRIG_API"),
        ('MODELRIG_API = "1.0"', 'MODELRIG_API = "1.0"\nimport torch', "broken", "imports torch while registering"),
        ("def modelrig_attention", "def modelrig_attentions", "broken", "modelrig_attention"),
        ("    return [", "    raise SystemExit(3)\n    return [", "broken", "SystemExit"),
    ],
    ids=["import error", "another API version", "no API version", "torch imported while registering", "mistyped hook", "exits"],
)
def test_a_broken_plugin_is_a_row_and_everything_else_runs(
    reworked: Callable[..., CleanEnvironment], before: str, after: str, state: str, reason: str
) -> None:
    environment = reworked("__init__.py", before, after)
    row = environment.row()
    assert state == row["state"]
    assert reason in row["reason"]
    assert 12 == len(generates(environment)["tokens"])
    doctor = environment.run("doctor")
    assert 4 == doctor.returncode
    assert "tiled-attention" in doctor.stdout
    asked = environment.run("run", "tiny", "x", "--attention", "tiled")
    assert asked.returncode in (2, 4)
    assert "tiled" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_a_duplicate_name_makes_only_the_short_name_an_error(reworked: Callable[..., CleanEnvironment]) -> None:
    environment = reworked("__init__.py", 'name="tiled"', 'name="sdpa"')
    assert "active" == environment.row()["state"]
    expected = generates(environment)["tokens"]  # auto is not disturbed
    short = environment.run("plan", "tiny", "--attention", "sdpa")
    assert 2 == short.returncode
    assert "attention:sdpa" in short.stderr
    assert "tiled-attention:sdpa" in short.stderr
    for full in ("attention:sdpa", "tiled-attention:sdpa"):
        assert expected == generates(environment, "--attention", full)["tokens"]


def test_an_implementation_that_cannot_be_imported_fails_only_who_asked(reworked: Callable[..., CleanEnvironment]) -> None:
    environment = reworked("tiled_module.py", "import torch", "import torch, no_such_module")
    assert 12 == len(generates(environment)["tokens"])
    asked = environment.run("run", "tiny", "x", "--attention", "tiled")
    assert 4 == asked.returncode
    assert "no_such_module" in asked.stderr
