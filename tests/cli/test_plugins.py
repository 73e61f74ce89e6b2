"""`modelrig plugins` and `modelrig plugins show`."""

from __future__ import annotations

import json

import pytest

from distributions import cache_plugin, run_python, write_distribution
from modelrig.cli import main
from modelrig.cli.output import print_table, printable
from modelrig.components import PLANNED

KEYS = ["id", "plugin", "distribution", "version", "api", "state", "reason", "provides", "seconds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    write_distribution(folder, "acme", {"acme_modelrig.py": cache_plugin("ring", more="requires=('surely-not-installed>=2',)")})
    write_distribution(folder, "bad", {"bad_modelrig.py": "raise ValueError('\\x1b[31mred')"})
    return folder


@pytest.fixture
def modelrig(folder, tmp_path):
    """`modelrig(arguments...)`: the command in a fresh process, beside two outside distributions."""
    return lambda *arguments, **environment: run_python(
        "-m", "modelrig.cli", *arguments, path=[folder], cwd=tmp_path, **environment
    )


def test_the_json_has_every_plugin_in_the_promised_shape(modelrig):
    done = modelrig("plugins", "--json")
    rows = json.loads(done.stdout)
    assert (0, "") == (done.returncode, done.stderr)
    assert [KEYS] == list(map(list, {tuple(row): None for row in rows}))
    assert [["kind", "name", "state", "reason"]] == list(
        {tuple(entry): list(entry) for row in rows for entry in row["provides"]}.values()
    )
    assert len(rows) == len({row["id"] for row in rows})
    assert {"acme": "unavailable", "bad": "broken"} == {
        row["plugin"]: row["state"] for row in rows if row["distribution"] != "modelrig"
    }


def test_the_table_has_a_line_for_each_plugin_and_says_why(modelrig):
    lines = modelrig("plugins").stdout.splitlines()
    assert len(PLANNED) + 3 == len(lines)
    (acme,) = [line for line in lines if line.startswith("acme")]
    assert acme.endswith("it needs surely-not-installed>=2 (not installed); run: pip install 'surely-not-installed>=2'")


def test_a_kind_shows_its_plugins_and_those_of_which_nobody_knows(modelrig):
    rows = json.loads(modelrig("plugins", "--json", "--kind", "caches").stdout)
    assert ["caches", "acme", "bad"] == [row["plugin"] for row in rows]
    assert {"caches"} == {entry["kind"] for row in rows for entry in row["provides"]}


def test_foreign_text_cannot_steer_the_terminal(modelrig):
    assert "\x1b" not in modelrig("plugins").stdout + modelrig("plugins", "show", "bad").stdout


@pytest.mark.parametrize("name", ["caches", "modelrig/caches", "static", "caches:static"])
def test_a_plugin_or_component_is_shown_by_any_of_its_names(capsys, name):
    assert 0 == main(["plugins", "show", name, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert ["modelrig/caches"] == [plugin["id"] for plugin in shown["plugins"]]
    assert "caches:static" in [component["id"] for component in shown["components"]]


def test_show_gives_everything_a_component_states(capsys):
    assert 0 == main(["plugins", "--json", "show", "caches:static"])
    (component,) = json.loads(capsys.readouterr().out)["components"]
    wanted = {
        "summary",
        "planner",
        "implementation",
        "requires",
        "install",
        "offers",
        "needs",
        "rank",
        "capabilities",
        "state",
        "reason",
    }
    assert set() == wanted - set(component)
    assert "cpu" in component["capabilities"]["devices"]


def test_show_is_readable_for_people(capsys):
    assert 0 == main(["plugins", "show", "static"])
    out = capsys.readouterr().out
    assert out.startswith("component caches:static\n")
    assert "\nplugin modelrig/caches\n" in out


def test_show_has_the_traceback_of_a_broken_plugin(modelrig):
    assert "bad_modelrig.py" in modelrig("plugins", "show", "bad").stdout
    assert "ValueError" in json.loads(modelrig("plugins", "show", "bad", "--json").stdout)["plugins"][0]["traceback"]


def test_show_of_an_unknown_name_suggests_the_nearest(capsys):
    assert 2 == main(["plugins", "show", "statik"])
    assert "no plugin or component is called 'statik'; did you mean 'static'?" in capsys.readouterr().err


def test_what_the_config_disables_is_shown_so(modelrig, tmp_path):
    (tmp_path / "modelrig.toml").write_text('disable = ["bad"]\n')
    rows = {row["plugin"]: row for row in json.loads(modelrig("plugins", "--json").stdout)}
    assert ("disabled", "disabled by disable in the configuration") == (rows["bad"]["state"], rows["bad"]["reason"])


def test_a_wrong_allow_list_is_an_error_of_usage(modelrig):
    done = modelrig("plugins", "--json", MODELRIG_PLUGINS="acmee")
    assert (2, "") == (done.returncode, done.stdout)
    assert "[RQ-UNKNOWN] MODELRIG_PLUGINS: 'acmee' is no installed plugin or component; did you mean 'acme'?" in done.stderr


def test_a_table_for_a_terminal_is_drawn_and_takes_no_markup(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    print_table(("name", "why"), [("a", "[red]b[/red]")])
    assert "[red]b[/red]" in capsys.readouterr().out


def test_an_empty_table_is_its_heading(capsys):
    print_table(("a", "b"), [])
    assert "a  b\n" == capsys.readouterr().out


def test_printable_keeps_line_breaks_and_letters_of_every_script():
    assert "é 漢\n\t\\x1b[2J\\x7f" == printable("é 漢\n\t\x1b[2J\x7f")
