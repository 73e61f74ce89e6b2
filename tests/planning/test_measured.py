"""Measurements of kernels: kept for each machine, merged, read strictly; what is wrong with the file is said, with its path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from modelrig.errors import SaveError
from modelrig.planning.environment import read_environment
from modelrig.planning.measured import NotMeasuredError, keep_measured, kernels_file, machine_of, read_measured

TIMES = {"8 x 4 float32": {1: {"linear": 2e-6, "mv": 1e-6}, 16: {"linear": 3e-6}}}


def test_the_file_lies_in_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Path("/cache/modelrig/kernels.json") == kernels_file({"XDG_CACHE_HOME": "/cache"})
    for ignored in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert Path("/home/someone/.cache/modelrig/kernels.json") == kernels_file(ignored)


def test_a_machine_is_its_cpu_flags_torch_and_threads() -> None:
    here = read_environment({})
    changes: list[dict[str, Any]] = [{"cpu": "Another"}, {"cpu_flags": frozenset({"x"})}, {"torch": "1"}, {"threads": 99}]
    assert 5 == len({machine_of(one) for one in (here, *(evolve(here, **change) for change in changes))})
    assert machine_of(here) == machine_of(evolve(here, memory=evolve(here.memory, available_bytes=1)))
    assert 7 == read_environment({"OMP_NUM_THREADS": "7"}).threads
    for none in ("", "0", "two", "-1", "99999999", "²"):
        assert here.cores == read_environment({"OMP_NUM_THREADS": none}).threads


def test_what_was_kept_is_read_again_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "a" / "kernels.json"
    assert path == keep_measured("here", "p:one", TIMES, path)
    assert read_measured("here", "p:one", path) == TIMES
    keep_measured("here", "p:two", {"1 x 1": {1: {"k": 1.0}}}, path)
    keep_measured("there", "p:one", {"1 x 1": {1: {"k": 2.0}}}, path)
    keep_measured("here", "p:one", {"8 x 4 float32": {1: {"mv": 9.0}}, "2 x 2": {1: {"mv": 1.0}}}, path)
    expected = {"8 x 4 float32": {1: {"mv": 9.0}, 16: {"linear": 3e-6}}, "2 x 2": {1: {"mv": 1.0}}}
    assert read_measured("here", "p:one", path) == expected
    assert read_measured("here", "p:two", path) == {"1 x 1": {1: {"k": 1.0}}}
    assert read_measured("there", "p:one", path) == {"1 x 1": {1: {"k": 2.0}}}
    assert ["kernels.json"] == [one.name for one in path.parent.iterdir()]


def document(section: Any) -> str:
    return json.dumps({"version": 1, "machines": {"here": {"p:one": section}}})


HOSTILE = {
    "nothing": ("", "not JSON"),
    "no JSON": ("{", "not JSON"),
    "no text": ("\udcff", "not UTF-8"),
    "a list": ("[]", "a JSON object is needed"),
    "no version": ("{}", "its version is None"),
    "a later version": ('{"version": 2, "machines": {}}', "its version is 2"),
    "no machines": ('{"version": 1}', "an object is needed"),
    "machines in a list": ('{"version": 1, "machines": []}', "an object is needed"),
    "another machine": ('{"version": 1, "machines": {"there": {}}}', "nothing of this machine"),
    "another component": ('{"version": 1, "machines": {"here": {}}}', "nothing of p:one"),
    "a machine that is a number": ('{"version": 1, "machines": {"here": 3}}', "an object is needed"),
    "a section that is a text": (document("x"), "an object is needed"),
    "rows in a list": (document({"8 x 4": [1]}), "an object is needed"),
    "kernels in a list": (document({"8 x 4": {"1": [1]}}), "an object is needed"),
    "no rows": (document({"8 x 4": {"0": {"mv": 1.0}}}), "no number of rows"),
    "negative rows": (document({"8 x 4": {"-1": {"mv": 1.0}}}), "no number of rows"),
    "named rows": (document({"8 x 4": {"many": {"mv": 1.0}}}), "no number of rows"),
    "endless rows": (document({"8 x 4": {"9" * 5000: {"mv": 1.0}}}), "no number of rows"),
    "no time": (document({"8 x 4": {"1": {"mv": "fast"}}}), "is no time"),
    "a true time": (document({"8 x 4": {"1": {"mv": True}}}), "is no time"),
    "time running back": (document({"8 x 4": {"1": {"mv": -1.0}}}), "is no time"),
    "no number": (document({"8 x 4": {"1": {"mv": float("nan")}}}), "not JSON"),
    "an endless time": ('{"version": 1, "machines": {"here": {"p:one": {"8 x 4": {"1": {"mv": 1e999}}}}}}', "not JSON"),
    "twice": ('{"version": 1, "version": 1, "machines": {}}', "duplicate key"),
    "deep": ('{"version": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
    "large": (" " * (9 << 20), "at most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_cannot_be_used_is_told_with_its_path_and_replaced_by_the_next_measurement(tmp_path: Path, name: str) -> None:
    text, told = HOSTILE[name]
    path = tmp_path / "kernels.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(NotMeasuredError) as caught:
        read_measured("here", "p:one", path)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    keep_measured("here", "p:one", TIMES, path)
    assert read_measured("here", "p:one", path) == TIMES


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name, told in (("pipe", "a named pipe"), (".", "a folder"), ("link", "does not exist|points to")):
        with pytest.raises(NotMeasuredError, match=told):
            read_measured("here", "p:one", tmp_path / name)
    with pytest.raises(NotMeasuredError, match="nothing was measured yet"):
        read_measured("here", "p:one", tmp_path / "missing")


def test_where_nothing_can_be_written_the_error_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"SV-IO.*cannot be written"):
        keep_measured("here", "p:one", TIMES, tmp_path / "file" / "kernels.json")
    (tmp_path / "folder" / "kernels.json").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"SV-IO.*cannot be written"):
        keep_measured("here", "p:one", TIMES, tmp_path / "folder" / "kernels.json")
    assert ["kernels.json"] == [one.name for one in (tmp_path / "folder").iterdir()]
