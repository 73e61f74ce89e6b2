"""One registry per process, and what calls register on top of it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

import modelrig
from distributions import cache_plugin, run_python
from modelrig.components import Format
from modelrig.errors import PluginError, RequestError
from modelrig.hookspecs import hookimpl
from modelrig.registry import current, plugins, process, register, temporary, unregister


class Plugin:
    MODELRIG_API = "1.0"

    def __init__(self, *names: str, requires: tuple[str, ...] = ()) -> None:
        self.names, self.requires = names, requires

    @hookimpl
    def modelrig_formats(self):
        return [Format(name=name, summary="s", planner="a:B", implementation="a:B", requires=self.requires) for name in self.names]


@pytest.fixture(autouse=True)
def forget_what_tests_discover():
    yield
    assert {} == process._called
    process._discovered.clear()
    process._composed.clear()


def test_plugins_are_discovered_once(install):
    first = current()
    install("acme", {"acme_modelrig.py": cache_plugin("ring")})
    assert first is current()
    assert "acme" in [row.plugin for row in current(refresh=True).rows]


def test_the_switches_in_force_are_those_of_the_call(monkeypatch):
    plain = current()
    assert "disabled" == current(disable=["caches"]).find_row("caches").state
    monkeypatch.setenv("MODELRIG_DISABLE", "formats")
    assert "disabled" == current().find_row("formats").state
    monkeypatch.delenv("MODELRIG_DISABLE")
    assert plain is current()


def test_a_wrong_switch_is_an_error_every_time(monkeypatch):
    monkeypatch.setenv("MODELRIG_PLUGINS", "nowhere")
    for _ in range(2):
        with pytest.raises(RequestError):
            current()


def test_many_threads_get_one_registry():
    process._discovered.clear()
    process._composed.clear()
    start, seen = threading.Barrier(8), []

    def ask():
        start.wait()
        seen.append(current())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (8, 1) == (len(seen), len(set(map(id, seen))))


def test_a_plugin_that_uses_the_registry_while_registering_is_broken(install):
    install("acme", {"acme_modelrig.py": "import modelrig\nmodelrig.plugins()"})
    row = current(refresh=True).find_row("acme")
    assert "broken" == row.state
    assert "a plugin used the registry while it was registering" in row.reason


def test_an_object_can_be_registered_and_taken_back():
    row = modelrig.register(Plugin("npz"))
    assert ("local/local", "local", None, "active") == (row.id, row.plugin, row.distribution, row.state)
    assert "local:npz" == current().find("formats", "npz").id
    assert row in plugins()
    unregister()
    assert "local" not in [row.plugin for row in current().rows]


def test_registering_the_same_object_again_changes_nothing():
    plugin = Plugin("npz")
    with temporary(plugin, "mine") as registry:
        assert "local/mine" == register(plugin, "mine").id
        assert registry is current()


def test_what_is_registered_stays_after_a_refresh():
    with temporary(Plugin("npz"), "mine"):
        assert "mine:npz" == current(refresh=True).find("formats", "npz").id


def test_a_temporary_plugin_goes_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), temporary(Plugin("npz"), "mine"):
        raise ZeroDivisionError
    assert "mine" not in [row.plugin for row in current().rows]


def test_a_registered_plugin_may_lack_a_package():
    with temporary(Plugin("npz", requires=("surely-not-installed",))) as registry:
        assert "unavailable" == registry.find_row("local").state


@pytest.mark.parametrize(
    ("plugin", "name", "code"),
    [
        (SimpleNamespace(), None, "PL-API"),
        (SimpleNamespace(MODELRIG_API="7.0"), None, "PL-API"),
        (Plugin("Not A Name"), None, "PL-SPEC"),
        (Plugin("npz"), "caches", "PL-CONFLICT"),
        (Plugin("npz"), "a:b", "PL-SPEC"),
        (Plugin("npz"), "", "PL-SPEC"),
        (Plugin("npz"), 3, "PL-SPEC"),
    ],
)
def test_what_fails_a_check_is_not_registered(plugin, name, code):
    before = plugins()
    with pytest.raises(PluginError) as caught:
        register(plugin, name)
    assert code == caught.value.code
    assert before == plugins()


def test_a_hook_that_imports_torch_cannot_be_registered():
    class Heavy(Plugin):
        @hookimpl
        def modelrig_formats(self):
            import torch

            return [torch]

    with pytest.raises(PluginError, match="imports torch while registering"):
        register(Heavy())


def test_a_second_plugin_needs_a_name_of_its_own():
    with temporary(Plugin("npz")), pytest.raises(PluginError, match="'local' is taken") as caught:
        register(Plugin("npy"))
    assert "PL-CONFLICT" == caught.value.code


def test_taking_back_what_was_never_registered_is_an_error():
    with temporary(Plugin("npz"), "mine"), pytest.raises(PluginError, match="did you mean 'mine'") as caught:
        unregister("mime")
    assert "PL-UNKNOWN" == caught.value.code


@pytest.mark.parametrize(
    ("code", "milliseconds"),
    [("import modelrig", 30), ("import modelrig.cli; modelrig.cli.main(['plugins', '--json'])", 300)],
)
def test_starting_is_fast_and_imports_no_torch(code, milliseconds):
    program = f"import sys, time\nstart = time.process_time()\n{code}\nspent = time.process_time() - start\n"
    program += "print(spent * 1000, 'torch' in sys.modules, file=sys.stderr)"
    seen = [run_python("-c", program).stderr.split() for _ in range(5)]
    assert {"False"} == {has_torch for _, has_torch in seen}
    assert min(float(spent) for spent, _ in seen) <= milliseconds
