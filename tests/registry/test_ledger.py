"""Order, names, and what an error about a name says."""

from __future__ import annotations

import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributions import cache_plugin
from modelrig.components import KINDS, Format
from modelrig.errors import PluginError, RequestError
from modelrig.registry import PluginRow, Registered, Registry

FORMAT = Format(name="npz", summary="NumPy archives", planner="math:sqrt", implementation="math:floor.__name__")


def component(name="npz", plugin="acme", distribution="acme", state="active", reason=None, **fields) -> Registered:
    code = {"unavailable": "PL-NEED", "disabled": "PL-DISABLED"}.get(state)
    descriptor = attrs.evolve(FORMAT, name=name, **fields)
    return Registered(descriptor=descriptor, plugin=plugin, distribution=distribution, state=state, reason=reason, code=code)


def registry(*components: Registered, rows=()) -> Registry:
    by_plugin = {}
    for one in components:
        by_plugin.setdefault((one.plugin, one.distribution), []).append(one)
    found = [
        (PluginRow(id=f"{distribution}/{plugin}", plugin=plugin, distribution=distribution, version="1.0"), same)
        for (plugin, distribution), same in by_plugin.items()
    ]
    return Registry([*found, *((row, ()) for row in rows)])


def names(registry: Registry, prefer=()) -> list[str]:
    return [one.name for one in registry.components("formats", prefer)]


# ------------------------------------------------------------------------------------------------ order


def test_the_order_is_preferred_ours_others_experimental_rank_id():
    components = [
        component("ours_late", "formats", "modelrig", rank=60),
        component("ours_b", "formats", "modelrig", rank=10),
        component("ours_a", "formats", "modelrig", rank=10),
        component("ours_experimental", "formats", "modelrig", rank=90, experimental=True),
        component("theirs", rank=1),
        component("theirs_experimental", rank=0, experimental=True),
        component("wished", "zeta", "zeta", rank=99),
        component("wished_second", "zeta", "zeta", rank=99, experimental=True),
    ]
    expected = ["wished", "wished_second", "ours_a", "ours_b", "ours_late", "theirs", "ours_experimental", "theirs_experimental"]
    for seed in range(5):
        shuffled = random.Random(seed).sample(components, len(components))
        assert expected == names(registry(*shuffled), prefer=["wished", "zeta:wished_second"])


@given(st.lists(st.tuples(st.integers(-100, 100), st.booleans()), max_size=8), st.data())
def test_installing_a_package_changes_no_order_of_ours(theirs, data):
    ours = [component(f"ours_{n}", "formats", "modelrig", rank=data.draw(st.integers(0, 99))) for n in range(4)]
    before = names(registry(*ours))
    foreign = [component(f"theirs_{n}", rank=rank, experimental=experimental) for n, (rank, experimental) in enumerate(theirs)]
    assert before == names(registry(*foreign, *ours))[: len(ours)]


def test_components_of_every_state_are_listed():
    assert ["a", "b"] == names(registry(component("a", state="unavailable"), component("b", state="disabled")))


def test_a_kind_that_does_not_exist_is_an_error():
    with pytest.raises(RequestError, match="did you mean 'caches'") as caught:
        registry().components("cache")
    assert "RQ-VALUE" == caught.value.code


# ------------------------------------------------------------------------------------------------ names


def test_a_component_is_found_by_its_short_name_and_by_its_id():
    one = component()
    assert (one, one) == (registry(one).find("formats", "npz"), registry(one).find("formats", "acme:npz"))


def test_a_clash_makes_only_the_short_name_an_error():
    both = registry(component(), component(plugin="beta", distribution="beta"))
    with pytest.raises(RequestError, match="'npz' is registered by several plugins: acme:npz, beta:npz") as caught:
        both.find("formats", "npz")
    assert "RQ-AMBIGUOUS" == caught.value.code
    assert ["acme:npz", "beta:npz"] == [both.find("formats", name).id for name in ("acme:npz", "beta:npz")]
    notes = [row.provides[0].reason for row in both.rows]
    assert ["the short name is ambiguous, use the full id: acme:npz, beta:npz"] * 2 == notes
    assert {"active"} == {row.provides[0].state for row in both.rows}


def test_disabling_one_of_two_ends_the_clash():
    both = registry(component(state="disabled", reason="disabled by X"), component(plugin="beta", distribution="beta"))
    assert "beta:npz" == both.find("formats", "npz").id
    assert ["disabled by X", None] == [row.provides[0].reason for row in both.rows]


def test_an_unavailable_component_says_what_to_install():
    reason = "it needs x (not installed); run: pip install x"
    with pytest.raises(PluginError, match="component 'acme:npz' of kind formats is unavailable: it needs x") as caught:
        registry(component(state="unavailable", reason=reason)).find("formats", "npz")
    assert ("PL-NEED", 4, "acme") == (caught.value.code, caught.value.exit_code, caught.value.distribution)


BROKEN = PluginRow(
    id="beta/beta",
    plugin="beta",
    distribution="beta",
    version="2.0",
    state="broken",
    reason="no luck",
    code="PL-HOOK",
    traceback="…",
)


def test_a_full_id_of_a_broken_plugin_says_what_is_wrong_with_it():
    with pytest.raises(PluginError, match=r"plugin 'beta' \(beta 2.0\) is broken: no luck") as caught:
        registry(rows=[BROKEN]).find("formats", "beta:npz")
    assert ("PL-HOOK", "modelrig plugins show beta/beta has the traceback") == (caught.value.code, caught.value.hint)


def test_a_short_name_is_not_answered_with_a_full_id_that_looks_alike():
    with pytest.raises(RequestError, match="no component of kind formats is called 'acme_np'; installed: npz"):
        registry(component()).find("formats", "acme_np")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "npy",
            ["no component of kind formats is called 'npy'; did you mean 'npz'?", "installed: gone (unavailable: it needs y), npz"],
        ),
        ("zzz", ["it may be in plugin 'beta/beta', which is broken: no luck"]),
        ("zzz", ["it may be in plugin 'off/off', which is disabled: disabled by MODELRIG_DISABLE"]),
        ("acme:npy", ["did you mean 'acme:npz'?"]),
        ("nowhere:npz", ["no component of kind formats is called 'nowhere:npz'; did you mean"]),
        ("x" * 10_000, ["…'"]),
        ("\x1b[2J", [r"'\x1b[2J'"]),
    ],
)
def test_an_unknown_name_is_answered_from_the_ledger(name, texts):
    off = PluginRow(
        id="off/off", plugin="off", distribution="off", state="disabled", reason="disabled by MODELRIG_DISABLE", code="PL-DISABLED"
    )
    with pytest.raises(RequestError) as caught:
        registry(component(), component("gone", state="unavailable", reason="it needs y"), rows=[BROKEN, off]).find("formats", name)
    assert "RQ-NAME" == caught.value.code
    assert [] == [text for text in texts if text not in caught.value.reason]
    assert len(caught.value.reason) < 1500


def test_a_name_of_another_kind_is_pointed_to():
    with pytest.raises(RequestError, match="there is one of kind formats"):
        registry(component()).find("caches", "npz")


def test_with_nothing_installed_the_error_asks_whether_modelrig_is():
    with pytest.raises(RequestError, match="is modelrig installed"):
        registry().find("caches", "static")


@pytest.mark.parametrize("name", [None, 3, ["npz"]])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(RequestError) as caught:
        registry(component()).find("formats", name)
    assert "RQ-VALUE" == caught.value.code


def test_a_row_is_found_by_id_and_by_name_and_a_holder_before_a_conflict():
    rows = [
        PluginRow(id="a/same", plugin="same", distribution="a", state="conflict", reason="taken", code="PL-CONFLICT"),
        PluginRow(id="b/same", plugin="same", distribution="b"),
    ]
    both = registry(rows=rows)
    assert ("a/same", "b/same") == (both.find_row("a/same").id, both.find_row("same").id)
    with pytest.raises(PluginError, match="did you mean 'same'") as caught:
        both.find_row("sam")
    assert "PL-UNKNOWN" == caught.value.code


# ------------------------------------------------------------------------------------------------ import strings


def test_planner_and_implementation_are_imported_when_asked_for(install, discovered):
    parts = "class Planner: ...\nclass Cache: ..."
    install("acme", {"acme_modelrig.py": cache_plugin("ring", module="acme"), "acme_parts.py": "print('parts')\n" + parts})
    found = discovered().find("caches", "ring")
    assert ("Planner", "Cache") == (found.planner().__name__, found.implementation().__name__)
    assert found.planner() is found.planner()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise OSError('no library')", "OSError: no library"),
        ("import sys; sys.exit(1)", "SystemExit: 1"),
        ("class Panic(BaseException): ...\nraise Panic('in Rust')", "Panic: in Rust"),
        ("", "AttributeError: module 'acme_parts' has no attribute 'Planner'"),
        (None, "ModuleNotFoundError: No module named 'acme_parts'"),
    ],
)
def test_an_import_that_fails_names_component_distribution_and_cause(install, discovered, source, text):
    install("acme", {"acme_modelrig.py": cache_plugin("ring")} | ({} if source is None else {"acme_parts.py": source}))
    with pytest.raises(PluginError) as caught:
        discovered().find("caches", "ring").planner()
    expected = f"the planner of component 'acme:ring' (distribution acme) cannot be imported from 'acme_parts:Planner': {text}"
    assert ("PL-IMPORT", expected) == (caught.value.code, caught.value.reason)
    assert caught.value.__cause__ is not None


def test_is_ours_is_decided_by_the_distribution_alone():
    assert (True, False) == (component(plugin="x", distribution="modelrig").is_ours, component(plugin="modelrig").is_ours)


def test_every_kind_can_be_asked_for_when_empty():
    assert [()] * len(KINDS) == [registry().components(kind) for kind in KINDS]
