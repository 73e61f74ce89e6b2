"""A real third-party distribution: built, installed beside ours in a clean environment, used, and broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from environments import ROOT, CleanEnvironment, build_wheel

THIRD_PARTY = ROOT / "examples/plugins/modelrig-tiled-attention"
PLUGIN = "modelrig_tiled_attention"

pytestmark = pytest.mark.packaging


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


def row_of(environment: CleanEnvironment, **variables: str) -> dict[str, Any]:
    return environment.row("modelrig-tiled-attention", **variables)


def generates(environment: CleanEnvironment, *arguments: str) -> dict[str, Any]:
    """What `modelrig run` prints; in float32, where another kernel gives the same tokens."""
    done = environment.run("run", "tiny", "def add(a, b):", "--max-new-tokens", "12", "--dtype", "float32", "--json", *arguments)
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_environment_is_clean(environment: CleanEnvironment) -> None:
    code = "import modelrig, modelrig_plugins; print(modelrig.__file__, modelrig_plugins.__file__)"
    done = environment.start("-c", code)
    assert 0 == done.returncode, done.stderr
    assert str(ROOT) not in done.stdout


def test_it_is_listed(environment: CleanEnvironment) -> None:
    row = row_of(environment)
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
    assert "disabled" == row_of(environment, MODELRIG_PLUGINS="")["state"]
    assert "disabled" == row_of(environment, MODELRIG_DISABLE="tiled-attention")["state"]
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
    row = row_of(environment)
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
    assert "active" == row_of(environment)["state"]
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
