"""`modelrig doctor`."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import pytest

from distributions import cache_plugin, run_python, write_distribution


@pytest.fixture
def doctor(tmp_path):
    return lambda *arguments, **environment: run_python(
        "-m", "modelrig.cli", "doctor", *arguments, path=[tmp_path], cwd=tmp_path, **environment
    )


def test_a_sound_installation_exits_with_zero(doctor):
    done = doctor()
    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.startswith(f"Python {platform.python_version()}, modelrig ")


def test_a_broken_plugin_exits_with_four_and_is_named(doctor, tmp_path):
    write_distribution(tmp_path, "acme", {"acme_modelrig.py": "import nowhere_at_all"})
    done = doctor()
    assert 4 == done.returncode
    assert "error: acme/acme: broken: it cannot be imported: ModuleNotFoundError" in done.stdout
    assert "    modelrig plugins show acme/acme\n" in done.stdout


@pytest.mark.parametrize("source", ["", "MODELRIG_API = '3.0'"])
def test_an_incompatible_plugin_exits_with_four(doctor, tmp_path, source):
    write_distribution(tmp_path, "acme", {"acme_modelrig.py": source})
    assert 4 == doctor().returncode


def test_a_missing_package_is_no_failure(doctor, tmp_path):
    write_distribution(tmp_path, "acme", {"acme_modelrig.py": cache_plugin("ring", more="requires=('surely-not-installed',)")})
    done = doctor()
    assert 0 == done.returncode
    assert "    pip install surely-not-installed\n" in done.stdout


def test_the_json_has_versions_variables_and_findings(doctor):
    done = doctor("--json", HF_HOME="/somewhere", MODELRIG_DISABLE="caches:static", PATH_LIKE="no")
    found = json.loads(done.stdout)
    assert ["python", "versions", "variables", "findings"] == list(found)
    assert metadata.version("torch") == found["versions"]["torch"]
    assert {"HF_HOME": "/somewhere", "MODELRIG_DISABLE": "caches:static"}.items() <= found["variables"].items()
    assert "PATH_LIKE" not in found["variables"]
    assert {
        "level": "note",
        "check": "component",
        "about": "caches:static",
        "text": "disabled: disabled by MODELRIG_DISABLE",
        "fix": None,
    } in found["findings"]


def test_secrets_are_not_shown(doctor):
    done = doctor(HF_TOKEN="hf_secret", HUGGING_FACE_HUB_TOKEN="hf_other")
    assert "hf_" not in done.stdout
    assert "HF_TOKEN=(set, not shown)\n" in done.stdout


def test_torch_is_not_imported(doctor, tmp_path):
    done = run_python("-X", "importtime", "-m", "modelrig.cli", "doctor", cwd=tmp_path)
    assert [] == [line for line in done.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]
