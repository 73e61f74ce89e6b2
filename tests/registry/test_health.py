"""What `modelrig doctor` finds."""

from __future__ import annotations

import json
import sys

from distributions import cache_plugin, write_distribution
from modelrig.registry import PluginRow, Registry
from modelrig.registry.health import SLOW_SECONDS, examine_installation

GOOD = {"acme_modelrig.py": cache_plugin("ring")}


def findings(registry: Registry, about: str) -> list[tuple[str, str, str, str | None]]:
    return [(one.level, one.check, one.text, one.fix) for one in examine_installation(registry) if one.about == about]


def test_a_sound_plugin_gives_no_finding(install, discovered):
    install("acme", GOOD, requires=["modelrig>=0.1"])
    assert [] == [one for one in examine_installation(discovered()) if "acme" in one.about]


def test_a_broken_plugin_is_an_error_and_comes_first(install, discovered):
    install("acme", {"acme_modelrig.py": "import nowhere_at_all"}, requires=["modelrig>90"])
    found = [one for one in examine_installation(discovered()) if "acme" in one.about]
    assert ["error", "warning"] == [one.level for one in found]
    assert ("plugin", "modelrig plugins show acme/acme") == (found[0].check, found[0].fix)


def test_a_missing_package_is_a_note_with_the_command(install, discovered):
    install("acme", {"acme_modelrig.py": cache_plugin("ring", "plain", more="requires=('surely-not-installed',)")})
    expected = [
        ("note", "component", "unavailable: it needs surely-not-installed (not installed)", "pip install surely-not-installed")
    ]
    assert expected == findings(discovered(), "acme:ring")


def test_a_disabled_plugin_is_a_note(install, discovered):
    install("acme", GOOD)
    assert [("note", "plugin", "disabled by MODELRIG_DISABLE", None)] == findings(discovered(MODELRIG_DISABLE="acme"), "acme/acme")


def test_an_ambiguous_short_name_is_a_note(install, discovered):
    install("acme", GOOD)
    install("beta", {"beta_modelrig.py": cache_plugin("ring")})
    text = "active: the short name is ambiguous, use the full id: acme:ring, beta:ring"
    assert [("note", "component", text, None)] == findings(discovered(), "acme:ring")


def test_a_plugin_that_registers_slowly_is_a_warning():
    row = PluginRow(id="a/a", plugin="a", distribution=None, seconds=SLOW_SECONDS * 2)
    assert [("warning", "slow", "took 200 ms to register; everybody's listing waits for it")] == [
        one[:3] for one in findings(Registry([(row, ())]), "a/a")
    ]


def test_a_distribution_made_for_another_modelrig_is_a_warning(install, discovered):
    install("acme", GOOD, requires=["modelrig>=90", "modelrig<0.0; python_version < '3'", "numpy"])
    version = discovered().find_row("caches").version
    found = findings(discovered(), "acme")
    assert [("warning", "version", f"asks for modelrig>=90, but modelrig {version} is installed")] == [one[:3] for one in found]


def test_a_distribution_installed_twice_is_a_warning(install, discovered, tmp_path, monkeypatch):
    install("acme", GOOD, version="2.0")
    write_distribution(tmp_path / "later", "Acme", {}, version="1.0", entry_points={})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later"), str(tmp_path / "later")])
    ((level, check, text, _),) = findings(discovered(), "acme")
    assert ("warning", "duplicate") == (level, check)
    assert "acme-2.0.dist-info" in text and "Acme-1.0.dist-info" in text


def test_an_editable_distribution_with_stale_entry_points_is_a_warning(install, discovered, tmp_path):
    source = tmp_path / "a source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[project]\nname="acme"\n[project.entry-points."modelrig.plugins"]\nacme="acme_modelrig"\nnew="x"\n'
    )
    link = {"dir_info": {"editable": True}, "url": source.as_uri()}
    install("acme", GOOD, direct_url=json.dumps(link))
    expected = (
        "warning",
        "stale",
        "its pyproject.toml and what is installed disagree about new",
        f"pip install --editable '{source}'",
    )
    assert [expected] == findings(discovered(), "acme")


def test_our_own_entry_points_are_as_pyproject_says(discovered):
    assert [] == [one for one in examine_installation(discovered()) if one.check == "stale"]


def test_a_link_that_is_not_what_it_should_be_is_passed_over(install, discovered):
    for number, text in enumerate(
        ["[]", "not json", '{"dir_info": {"editable": true}}', '{"dir_info": {"editable": true}, "url": "file:///nowhere"}']
    ):
        install(f"acme{number}", GOOD, direct_url=text, entry_points={f"acme{number}": "acme_modelrig"})
    assert [] == [one for one in examine_installation(discovered()) if one.check == "stale"]
