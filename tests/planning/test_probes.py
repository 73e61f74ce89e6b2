"""Probes: a child process answers once per versions and machine; crashes, hangs and damaged files are no answers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

import rigs
from modelrig.components import Reason
from modelrig.hookspecs import hookimpl
from modelrig.planning import probes
from modelrig.planning.kept import kept_folder
from modelrig.planning.pipeline import make_plan
from modelrig.planning.probes import Finding, Probe
from modelrig.registry import temporary
from rigs import machine

CHILD = """
import json, os, sys, time
from modelrig.planning import probes
given = probes.arguments()
with open(given["log"], "a") as log:
    log.write("ran\\n")
print("x" * given.get("noise", 0), file=sys.stderr)
if "sleep" in given:
    time.sleep(given["sleep"])
if "signal" in given:
    os.kill(os.getpid(), given["signal"])
if "fork" in given and os.fork() == 0:
    time.sleep(60)
if "status" in given:
    sys.exit(given["status"])
probes.answer({"given": given["say"], "torch": "torch" in sys.modules})
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module to probe, and a cache of its own; returns where the child writes that it ran."""
    (tmp_path / "made_up_probe.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probes, "_known", {})
    return tmp_path / "log"


def probe(log: Path, **given: object) -> Probe:
    return Probe(module="made_up_probe", arguments={"log": str(log), "say": 1, **given}, packages=("attrs", "no-such-thing"))


def runs(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_an_answer_is_kept_in_this_process_and_on_disk(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"given": 1, "torch": False}
    assert [expected] * 2 == [probes.find(probe(child)).found for _ in range(2)]
    monkeypatch.setattr(probes, "_known", {})
    assert (expected, 1) == (probes.find(probe(child)).found, runs(child))
    (kept,) = (kept_folder() / "probes").iterdir()
    assert {"key", "found"} == set(json.loads(kept.read_text()))


def test_the_answer_depends_on_arguments_versions_and_machine(child: Path) -> None:
    asked = [probe(child), probe(child, say=2), Probe(module="made_up_probe", arguments=probe(child).arguments, machine=("H100",))]
    assert [1, 2, 1] == [(probes.find(one).found or {})["given"] for one in asked]
    assert 3 == runs(child)
    assert {"python", "attrs", "no-such-thing"} == set(asked[0].versions)
    assert asked[0].versions["no-such-thing"] is None


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b'{"key": "other", "found": {}}', b"\xff\xfe", b"x" * 100_000, b"[" * 50_000]
)
def test_a_damaged_file_is_asked_anew(child: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    probes.find(probe(child))
    (kept,) = (kept_folder() / "probes").iterdir()
    kept.write_bytes(damage)
    monkeypatch.setattr(probes, "_known", {})
    assert 1 == (probes.find(probe(child)).found or {})["given"]
    assert 2 == runs(child)
    assert "found" in json.loads(kept.read_text())


def test_where_nothing_can_be_written_nothing_is_kept(child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    assert 1 == (probes.find(probe(child)).found or {})["given"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [({"signal": 11}, "signal 11"), ({"status": 3, "noise": 5}, "status 3, saying 'xxxxx'"), ({"say": 1, "status": 0}, "status 0")],
)
def test_a_crash_is_a_problem_and_is_not_kept(child: Path, given: dict[str, int], problem: str) -> None:
    finding = probes.find(probe(child, **given))
    assert finding.found is None
    assert problem in (finding.problem or "")
    assert not (kept_folder() / "probes").exists()


def test_a_child_that_hangs_is_ended(child: Path) -> None:
    started = time.monotonic()
    finding = probes.run(probe(child, sleep=60), timeout_seconds=2.0)
    assert "no answer within 2 s" in (finding.problem or "")
    assert time.monotonic() - started < 30


def test_a_child_of_the_child_that_keeps_the_output_open_does_not_hang_us(child: Path) -> None:
    started = time.monotonic()
    assert probes.run(probe(child, fork=1), timeout_seconds=3.0).problem is not None
    assert time.monotonic() - started < 30


def test_however_much_a_child_writes_the_answer_is_found(child: Path) -> None:
    assert {"given": 1, "torch": False} == probes.run(probe(child, noise=3_000_000)).found


def test_a_module_that_is_not_there_is_a_problem(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No module named" in (probes.run(Probe(module="no_such_module_here")).problem or "")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "could not be started" in (probes.run(probe(child)).problem or "")


# ------------------------------------------------------------------------------------------------ when planners may ask


class Curious:
    """A planner that asks whenever it may."""

    @staticmethod
    def check(need: object, options: object) -> list[Reason]:
        found = need.probe(Probe(module="any"))  # type: ignore[attr-defined]
        return [Reason("attention.probe", "it crashed")] if found is not None and found.found is None else []

    @staticmethod
    def notes(need: object, options: object) -> list[str]:
        return ["tried" if need.probe(Probe(module="any")) else "unverified"]  # type: ignore[attr-defined]


class Plugin:
    MODELRIG_API = "1.0"

    @hookimpl
    def modelrig_attention(self) -> list[object]:
        masks = {"causal", "padding"}
        given = {"planner": f"{__name__}:Curious", "masks": masks, "grouped_heads": True}
        return [rigs.attention("curious", rank=1, **given), rigs.attention("curious_on_gpu", devices={"cuda"}, **given)]


@pytest.mark.parametrize(
    ("wish", "is_here", "asked"),
    [
        (["curious", "sdpa"], True, 1),
        ("curious", True, 1),
        ("auto", True, 0),
        (["curious"], False, 0),
        (["curious_on_gpu", "sdpa"], True, 0),
    ],
)
def test_only_what_was_asked_for_by_name_and_may_run_here_is_tried_out(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, wish: object, is_here: bool, asked: int
) -> None:
    calls: list[Probe] = []
    monkeypatch.setattr("modelrig.planning.candidates.find", lambda probe: (calls.append(probe), Finding({}))[1])
    with temporary(Plugin(), "local"):
        plan = make_plan(llama_folder, attention=wish, environment=machine(is_here=is_here))
    assert (asked > 0) == bool(calls)
    chosen = plan.choices["attention"].component
    if chosen == "curious":
        assert f"attention curious: {'tried' if is_here else 'unverified'}" in plan.notes
        assert f"attention curious: {'tried' if is_here else 'unverified'}" in plan.explain()


def test_what_a_trial_says_is_a_reason(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelrig.planning.candidates.find", lambda probe: Finding(None, "crashed"))
    with temporary(Plugin(), "local"):
        plan = make_plan(llama_folder, attention=["curious", "sdpa"], environment=machine(is_here=True))
    assert "sdpa" == plan.choices["attention"].component
    assert ["attention.probe"] == [one.code for row in plan.refused if row.component == "curious" for one in row.reasons]
