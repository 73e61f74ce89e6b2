"""Every state a plugin can be in, and that none of them harms another plugin."""

from __future__ import annotations

import json
import random
import sys
from importlib import metadata
from pathlib import Path

import pytest

from distributions import cache_plugin, run_python, write_distribution
from modelrig.components import KINDS, PLANNED
from modelrig.errors import PluginError, RequestError
from modelrig.registry import Registry
from modelrig.registry.discovery import candidates, discover, distributions

GOOD = {"acme_modelrig.py": cache_plugin("ring")}


def row(registry: Registry, name: str):
    return registry.find_row(name)


def test_an_installed_plugin_is_active_and_its_row_has_everything(install, discovered):
    install("acme", GOOD, version="2.5")
    found = row(discovered(), "acme")
    expected = {
        "id": "acme/acme",
        "plugin": "acme",
        "distribution": "acme",
        "version": "2.5",
        "api": "1.0",
        "state": "active",
        "reason": None,
        "provides": [{"kind": "caches", "name": "ring", "state": "active", "reason": None}],
        "seconds": found.to_json()["seconds"],
    }
    assert expected == found.to_json()
    assert 0 < found.seconds < 5


def test_an_entry_point_may_name_an_object_of_a_module(install, discovered):
    source = "class Plugin:\n    MODELRIG_API = '1.0'\nplugin = Plugin()\n"
    install("acme", {"acme_modelrig.py": source}, entry_points={"acme": "acme_modelrig:plugin"})
    assert "active" == row(discovered(), "acme").state


BAD = {
    "import_error": (
        "import nowhere_at_all",
        "broken",
        "it cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'",
    ),
    "syntax_error": ("def (", "broken", "it cannot be imported: SyntaxError: invalid syntax"),
    "exits": ("import sys; sys.exit(3)", "broken", "it cannot be imported: SystemExit: 3"),
    "panics": ("class Panic(BaseException): ...\nraise Panic('in Rust')", "broken", "it cannot be imported: Panic: in Rust"),
    "no_api": ("", "incompatible", 'it does not state MODELRIG_API (this is API 1.0: MODELRIG_API = "1.0")'),
    "other_api": ("MODELRIG_API = '2.1'", "incompatible", "it was made for plugin API 2.1; this modelrig has 1.0"),
    "odd_api": ("MODELRIG_API = 1.0", "incompatible", 'MODELRIG_API is 1.0; it must be a string such as "1.0"'),
    "torch": ("import torch\nMODELRIG_API = '1.0'", "broken", "imports torch while registering"),
    "hook_raises": (
        cache_plugin().replace("return []", "raise ValueError('no such luck')"),
        "broken",
        "modelrig_caches raised ValueError: no such luck",
    ),
    "mistyped_hook": (
        cache_plugin().replace("modelrig_caches", "modelrig_cache"),
        "broken",
        "there is no hook 'modelrig_cache'; did you mean 'modelrig_caches'?",
    ),
    "hook_exits": (cache_plugin().replace("return []", "raise SystemExit(1)"), "broken", "modelrig_caches raised SystemExit: 1"),
    "wrong_type": (
        cache_plugin().replace("return []", "return [1]"),
        "broken",
        "modelrig_caches returned int, not CacheImplementation",
    ),
}


def test_each_bad_package_is_told_apart_and_leaves_the_good_ones_alone(tmp_path):
    for name, (source, _, _) in BAD.items():
        write_distribution(tmp_path, name, {f"{name}_module.py": source})
    write_distribution(tmp_path, "acme", GOOD)
    done = run_python("-m", "modelrig.cli", "plugins", "--json", path=[tmp_path], cwd=tmp_path)
    rows = {entry["plugin"]: entry for entry in json.loads(done.stdout)}
    expected = {name: (state, reason) for name, (_, state, reason) in BAD.items()}
    seen = {name: (rows[name]["state"], rows[name]["reason"].removesuffix(f" ({name}_module.py, line 1)")) for name in BAD}
    assert expected == seen
    assert ("", 0) == (done.stderr, done.returncode)
    assert "active" == rows["acme"]["state"]
    ours = [entry for entry in rows.values() if entry["distribution"] == "modelrig"]
    assert {"active"} == {entry["state"] for entry in ours} and len(PLANNED) == len(ours)


def test_what_a_plugin_raised_is_kept_with_its_traceback(install, discovered):
    install("acme", {"acme_modelrig.py": "import nowhere_at_all"})
    assert 'acme_modelrig.py", line 1' in row(discovered(), "acme").traceback


def test_ctrl_c_while_a_plugin_is_imported_stops_everything(install, discovered):
    install("acme", {"acme_modelrig.py": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        discovered()
    assert "guarded" not in __import__.__name__


def test_an_error_whose_message_cannot_be_shown_still_gives_a_row(install, discovered):
    install("acme", {"acme_modelrig.py": "class E(Exception):\n    def __str__(self): raise ValueError\nraise E"})
    assert "it cannot be imported: E: (its message cannot be shown)" == row(discovered(), "acme").reason


def test_what_a_plugin_prints_goes_to_stderr(install, discovered, capsys):
    install("acme", {"acme_modelrig.py": "print('hello')\n" + cache_plugin("ring")})
    discovered()
    assert ("", "hello\n") == tuple(capsys.readouterr())


def test_a_plugin_made_for_a_newer_minor_version_is_used_with_a_note(install, discovered):
    install("acme", {"acme_modelrig.py": cache_plugin("ring", api='"1.7"')})
    found = row(discovered(), "acme")
    assert ("active", "made for API 1.7, newer than 1.0") == (found.state, found.reason)


def test_of_two_distributions_with_one_plugin_name_the_first_keeps_it(install, discovered):
    install("acme-b", {"b_modelrig.py": cache_plugin("b")}, entry_points={"shared": "b_modelrig"})
    install("acme-a", {"a_modelrig.py": cache_plugin("a")}, entry_points={"shared": "a_modelrig"})
    registry = discovered()
    assert "active" == row(registry, "acme-a/shared").state
    second = row(registry, "acme-b/shared")
    text = "acme-a/shared uses the plugin name 'shared' already, so acme-b/shared was not imported"
    assert ("conflict", text, ()) == (second.state, second.reason, second.provides)
    assert "b_modelrig" not in sys.modules


def test_an_outside_distribution_cannot_take_the_name_of_a_plugin_of_ours(install, discovered):
    install("aaa", GOOD, entry_points={"caches": "acme_modelrig"})
    registry = discovered()
    assert ("active", "conflict") == (row(registry, "modelrig/caches").state, row(registry, "aaa/caches").state)


def test_a_disabled_plugin_leaves_its_name_to_the_next(install, discovered):
    install("acme-a", {"a_modelrig.py": cache_plugin("a")}, entry_points={"shared": "a_modelrig"})
    install("acme-b", {"b_modelrig.py": cache_plugin("b")}, entry_points={"shared": "b_modelrig"})
    registry = discovered(disable=["acme-a/shared"])
    assert ("disabled", "active") == (row(registry, "acme-a/shared").state, row(registry, "acme-b/shared").state)


def test_one_name_twice_in_one_distribution_gives_two_rows(install, discovered):
    text = "[modelrig.plugins]\nacme = acme_modelrig\nacme = other_modelrig\n"
    install("acme", GOOD | {"other_modelrig.py": cache_plugin("other")}, entry_points=text)
    rows = [(found.id, found.state) for found in discovered().rows if found.distribution == "acme"]
    assert [("acme/acme", "active"), ("acme/acme=other_modelrig", "conflict")] == rows


def test_an_entry_points_file_that_cannot_be_read_is_a_row(install, discovered):
    install("acme", GOOD, entry_points="[modelrig.plugins]\nno equals sign\n")
    install("fine", {"fine_modelrig.py": cache_plugin("fine")})
    registry = discovered()
    assert "broken" == row(registry, "acme").state
    assert "its entry_points.txt cannot be read" in row(registry, "acme").reason
    assert "active" == row(registry, "fine").state


def test_a_wrong_entry_point_value_is_a_row(install, discovered):
    install("acme", GOOD, entry_points={"acme": "acme_modelrig:nothing_there", "odd": "not a module!"})
    registry = discovered()
    assert ("broken", "broken") == (row(registry, "acme").state, row(registry, "odd").state)
    assert "nothing_there" in row(registry, "acme").reason


def test_a_distribution_without_metadata_is_called_as_its_folder(install, discovered):
    folder = install("acme", GOOD)
    (folder / "acme-1.0.dist-info" / "METADATA").unlink()
    assert ("active", None) == (row(discovered(), "acme/acme").state, row(discovered(), "acme/acme").version)


def test_of_one_distribution_twice_on_the_path_the_first_counts(install, discovered, tmp_path, monkeypatch):
    install("acme", GOOD, version="2.0")
    write_distribution(tmp_path / "later", "Acme", {"stale_modelrig.py": cache_plugin("stale")}, version="1.0")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    rows = [(found.version, found.provides[0].name) for found in discovered().rows if found.plugin.lower() == "acme"]
    assert [("2.0", "ring")] == rows


# ------------------------------------------------------------------------------------------------ switches


def test_the_allow_list_decides_before_anything_is_imported(install, discovered):
    install("acme", GOOD)
    install("other", {"other_modelrig.py": "raise AssertionError('imported')"})
    registry = discovered(MODELRIG_PLUGINS="acme")
    assert "active" == row(registry, "acme").state
    assert ("disabled", "not listed in MODELRIG_PLUGINS") == (row(registry, "other").state, row(registry, "other").reason)
    assert "active" == row(registry, "modelrig/caches").state


def test_an_empty_allow_list_leaves_our_own_plugins(install, discovered):
    install("acme", {"acme_modelrig.py": "raise AssertionError('imported')"})
    states = {(found.distribution == "modelrig", found.state) for found in discovered(MODELRIG_PLUGINS="").rows}
    assert {(True, "active"), (False, "disabled")} == states


@pytest.mark.parametrize(
    ("disable", "environment", "who"),
    [(["acme"], {}, "disable in the configuration"), ([], {"MODELRIG_DISABLE": "acme"}, "MODELRIG_DISABLE")],
)
def test_a_disabled_plugin_is_not_imported_and_says_who_disabled_it(install, discovered, disable, environment, who):
    install("acme", {"acme_modelrig.py": "raise AssertionError('imported')"})
    registry = discovered(disable, **environment)
    assert ("disabled", f"disabled by {who}") == (row(registry, "acme").state, row(registry, "acme").reason)
    with pytest.raises(PluginError, match="is disabled: disabled by") as caught:
        registry.find("caches", "acme:ring")
    assert "PL-DISABLED" == caught.value.code


def test_a_component_of_ours_can_be_disabled_alone(discovered):
    registry = discovered(MODELRIG_DISABLE="caches:static")
    states = {component.name: component.state for component in registry.components("caches")}
    assert ("disabled", "active") == (states["static"], states["dynamic"])
    assert "active" == row(registry, "caches").state


def test_a_plugin_all_of_whose_components_are_disabled_is_disabled(install, discovered):
    install("acme", GOOD)
    assert "disabled" == row(discovered(["acme:ring"]), "acme").state


@pytest.mark.parametrize(
    ("disable", "environment", "locus", "text"),
    [
        ([], {"MODELRIG_PLUGINS": "acm"}, "MODELRIG_PLUGINS", "'acm' is no installed plugin or component; did you mean 'acme'?"),
        ([], {"MODELRIG_DISABLE": "acme, nope"}, "MODELRIG_DISABLE", "'nope' is no installed plugin or component"),
        (["acmee"], {}, "disable in the configuration", "did you mean 'acme'?"),
        (["nope:ring"], {}, "disable in the configuration", "'nope:ring' is no installed"),
    ],
)
def test_a_switched_name_that_is_not_installed_is_an_error_before_any_import(
    install, discovered, disable, environment, locus, text
):
    install("acme", {"acme_modelrig.py": "raise KeyboardInterrupt('imported')"})
    with pytest.raises(RequestError) as caught:
        discovered(disable, **environment)
    assert ("RQ-UNKNOWN", locus) == (caught.value.code, caught.value.locus)
    assert text in caught.value.reason


def test_a_disabled_component_its_plugin_lacks_is_an_error(install, discovered):
    install("acme", GOOD)
    with pytest.raises(RequestError, match="did you mean 'acme:ring'") as caught:
        discovered(["acme:rings"])
    assert "RQ-UNKNOWN" == caught.value.code


def test_disable_must_be_a_list(discovered):
    with pytest.raises(RequestError, match="a list of plugin names") as caught:
        discovered("acme")
    assert "RQ-VALUE" == caught.value.code


# ------------------------------------------------------------------------------------------------ determinism


def test_the_order_of_the_folder_listing_changes_nothing(install, monkeypatch):
    for name in ("acme", "beta", "gamma"):
        install(
            name,
            {f"{name}_modelrig.py": cache_plugin("ring", name)},
            entry_points={name: f"{name}_modelrig", "shared": f"{name}_modelrig"},
        )
    everything = list(metadata.distributions())

    def ledger() -> list[object]:
        registry = Registry(discover({}))
        rows = [{**found.to_json(), "seconds": 0} for found in registry.rows]
        return [rows, [[component.id for component in registry.components(kind)] for kind in KINDS]]

    expected = ledger()
    for seed in range(5):
        shuffled = random.Random(seed).sample(everything, len(everything))
        monkeypatch.setattr(metadata, "distributions", lambda shuffled=shuffled: iter(shuffled))
        assert expected == ledger()


def test_our_own_distribution_comes_first(install):
    install("aaa", GOOD)
    owners = [candidate.row.distribution for candidate in candidates()]
    assert ["modelrig"] * len(PLANNED) + ["aaa"] == owners


def test_an_entry_of_the_path_that_is_no_folder_is_passed_over(monkeypatch, tmp_path: Path):
    expected = len(distributions())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "file"), str(tmp_path / "nowhere"), *sys.path])
    assert expected == len(distributions())
