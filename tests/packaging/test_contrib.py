"""The distributions in contrib/: built, installed beside ours in a clean environment, and used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from environments import ROOT, CleanEnvironment, build_wheel

pytest.importorskip("llguidance", reason="part of the developers' environment (pip install -e '.[dev]')")
pytestmark = pytest.mark.packaging

CONSTRAINED = ("run", "tiny", "def add(a, b):", "--constraint", r"regex= # [a-z]{3,9}\.", "--json")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment(tmp_path_factory.mktemp("clean") / "env", [build_wheel(ROOT, tmp_path_factory.mktemp("wheels"))])


def test_a_constraint_is_served_once_llguidance_is_installed(environment: CleanEnvironment, tmp_path: Path) -> None:
    plan = environment.json("plan", "tiny")
    before = environment.run(*CONSTRAINED)
    assert 2 == before.returncode
    assert "installed: no component of this kind" in before.stderr
    environment.install(build_wheel(ROOT / "contrib/modelrig-llguidance", tmp_path))
    row = environment.row("modelrig-llguidance")
    assert ("active", [("constraints", "llguidance")]) == (
        row["state"],
        [(part["kind"], part["name"]) for part in row["provides"]],
    )
    done = environment.run(*CONSTRAINED)
    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)
    assert re.fullmatch(r" # [a-z]{3,9}\.", told["text"])
    assert "stop" == told["finish_reason"]
    assert plan["hash"] == environment.json("plan", "tiny")["hash"]


def test_registering_imports_neither_torch_nor_llguidance(environment: CleanEnvironment, tmp_path: Path) -> None:
    environment.install(build_wheel(ROOT / "contrib/modelrig-llguidance", tmp_path))
    code = "import sys, modelrig; modelrig.plugins(); print([name for name in ('torch', 'llguidance') if name in sys.modules])"
    done = environment.start("-c", code)
    assert "[]\n" == done.stdout
