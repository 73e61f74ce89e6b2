"""What makes a plugin or descriptor wrong, and that the message says how to put it right."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import attrs
import pytest

from modelrig.components import (
    Architecture,
    CacheCapabilities,
    CacheImplementation,
    Decoder,
    DecoderCapabilities,
    Format,
)
from modelrig.hookspecs import hookimpl
from modelrig.registry.checks import MAX_COMPONENTS, RejectedError, check_api, check_descriptor, collect, unmet

FORMAT = Format(name="npz", summary="NumPy archives", planner="my_npz.npz:Planner", implementation="my_npz.npz:Reader")


def returning(value):
    """A plugin whose `modelrig_formats` returns `value`."""

    class Plugin:
        @hookimpl
        def modelrig_formats(self):
            return value

    return Plugin()


def refusal(plugin) -> RejectedError:
    with pytest.raises(RejectedError) as caught:
        collect(plugin)
    return caught.value


# ------------------------------------------------------------------------------------------------ API


@pytest.mark.parametrize("stated", ["1.0", "1.1", "1.999"])
def test_any_minor_version_of_our_major_is_accepted(stated):
    assert stated == check_api(SimpleNamespace(MODELRIG_API=stated))[0]


@pytest.mark.parametrize("stated", ["2.0", "0.9", "1", "1.0.0", "one", "", "1.x", "１.０", "9" * 5000, 1.0, (1, 0), None, object()])
def test_any_other_api_version_is_incompatible(stated):
    with pytest.raises(RejectedError) as caught:
        check_api(SimpleNamespace(MODELRIG_API=stated))
    assert ("incompatible", "PL-API") == (caught.value.state, caught.value.code)


# ------------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize(
    "kind_of_iterable",
    [list, tuple, iter, lambda items: (item for item in items), lambda items: dict.fromkeys(range(1), items[0]).values()],
)
def test_a_hook_may_return_any_iterable(kind_of_iterable):
    assert [FORMAT] == collect(returning(kind_of_iterable([FORMAT])))


def test_a_hook_may_be_a_generator():
    class Plugin:
        @hookimpl
        def modelrig_formats(self):
            yield FORMAT

    assert [FORMAT] == collect(Plugin())


def test_a_plugin_without_hooks_provides_nothing():
    assert [] == collect(SimpleNamespace())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "modelrig_formats returned None; it must return its descriptors (is a return missing?)"),
        (FORMAT, "modelrig_formats returned Format; it must return an iterable of descriptors"),
        ("npz", "modelrig_formats returned str; it must return an iterable of descriptors"),
        ({"npz": FORMAT}, "modelrig_formats returned dict; it must return an iterable of descriptors"),
    ],
)
def test_what_is_no_iterable_of_descriptors_is_refused(value, reason):
    rejected = refusal(returning(value))
    assert ("broken", "PL-HOOK", reason) == (rejected.state, rejected.code, rejected.reason)


def test_a_hook_that_raises_halfway_through_is_refused():
    def items():
        yield FORMAT
        raise OSError("disk gone")

    assert "modelrig_formats raised OSError: disk gone" == refusal(returning(items())).reason


def test_a_generator_that_never_ends_is_refused():
    def items():
        while True:
            yield FORMAT

    assert f"modelrig_formats returns more than {MAX_COMPONENTS} components" == refusal(returning(items())).reason


def test_a_hook_with_an_argument_the_specification_lacks_is_refused():
    class Plugin:
        @hookimpl
        def modelrig_formats(self, torch_version): ...

    rejected = refusal(Plugin())
    assert "PL-SPEC" == rejected.code
    assert "wrong hook signature" in rejected.reason and "torch_version" in rejected.reason


def test_every_wrong_hook_of_a_plugin_is_told():
    class Plugin:
        @hookimpl
        def modelrig_atention(self): ...

        @hookimpl
        def modelrig_cachess(self): ...

        def modelrig_formats(self): ...

    reason = refusal(Plugin()).reason
    assert "there is no hook 'modelrig_atention'; did you mean 'modelrig_attention'?" in reason
    assert "there is no hook 'modelrig_cachess'; did you mean 'modelrig_caches'?" in reason
    assert "modelrig_formats lacks the decorator @hookimpl" in reason


def test_an_optional_hook_of_a_later_version_is_let_be():
    class Plugin:
        @hookimpl(optionalhook=True)
        def modelrig_of_the_future(self): ...

        @hookimpl
        def modelrig_formats(self):
            return [FORMAT]

    assert [FORMAT] == collect(Plugin())


def test_a_wrapper_around_a_collecting_hook_is_refused():
    class Plugin:
        @hookimpl(wrapper=True)
        def modelrig_formats(self):
            return (yield)

    assert "modelrig_formats is declared as a wrapper, but it collects" == refusal(Plugin()).reason


def test_two_components_of_one_name_in_one_plugin_are_refused():
    assert "modelrig_formats returns two components called 'npz'" == refusal(returning([FORMAT, FORMAT])).reason


def test_one_name_in_two_kinds_is_fine():
    class Plugin:
        @hookimpl
        def modelrig_formats(self):
            return [FORMAT]

        @hookimpl
        def modelrig_decoders(self):
            return [Decoder(name="npz", summary="s", planner="a:B", implementation="a:B", capabilities=DecoderCapabilities())]

    assert ["formats", "decoders"] == [component.kind for component in collect(Plugin())]


# ------------------------------------------------------------------------------------------------ descriptors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("name", name) for name in ("", "Npz", "n-pz", "_npz", "a b", "a:b", "é", "npz\n", None, 3)],
        *[("summary", summary) for summary in ("", "   ", None)],
        *[
            ("planner", planner)
            for planner in ("", "module", "module:", ":Attr", "a b:C", "a..b:C", "a.b:C:D", ".a:B", "1a:B", None)
        ],
        ("implementation", "module"),
        *[("requires", requires) for requires in ("numpy", ["numpy"], ("not a requirement!",), (None,), ("numpy >=",))],
        *[("install", install) for install in ("", 3)],
        *[("offers", offers) for offers in ({1}, {""})],
        *[("needs", needs) for needs in ({"cache": {"rewind"}}, {"caches": {3}})],
        *[("rank", rank) for rank in (True, 1.5, None, "first")],
        ("experimental", "no"),
        ("plans_with_torch", 1),
    ],
)
def test_a_wrong_field_is_named_with_what_it_is_and_should_be(field, value):
    problems = check_descriptor("modelrig_formats", attrs.evolve(FORMAT, **{field: value}))
    assert 1 == len(problems), problems
    assert (
        problems[0].startswith("modelrig_formats, component ") and f": {field} is " in problems[0] and "; it must " in problems[0]
    )


def test_a_right_descriptor_has_no_problems():
    good = attrs.evolve(
        FORMAT,
        requires=("numpy>=1.26; python_version > '3'", "some-package[extra]"),
        needs={"caches": {"rewind"}},
        offers={"anything:at_all"},
        planner="a.b_c.d:E.f",
        rank=-3,
    )
    assert [] == check_descriptor("modelrig_formats", good)


def test_all_problems_of_a_plugin_are_told_at_once():
    reason = refusal(returning([attrs.evolve(FORMAT, name="A", planner=""), None, FORMAT])).reason
    assert ["name", "planner", "None"] == [word for word in ("name", "planner", "None") if word in reason]
    assert 2 == reason.count("; modelrig_formats")


def test_very_many_problems_are_counted():
    assert refusal(returning([None] * 500)).reason.endswith("; and 480 more")


def test_capabilities_must_be_those_of_the_kind():
    cache = CacheImplementation(name="a", summary="s", planner="a:B", implementation="a:B", capabilities=DecoderCapabilities())
    assert "capabilities is DecoderCapabilities(" in check_descriptor("modelrig_caches", cache)[0]


def test_an_architecture_must_name_a_model_type():
    empty = Architecture(name="a", summary="s", planner="a:B", implementation="a:B", model_types=())
    assert (
        "model_types is frozenset(); it must name at least one model_type" in check_descriptor("modelrig_architectures", empty)[0]
    )


def test_a_descriptor_of_another_kind_is_refused():
    assert ["modelrig_caches returned Format, not CacheImplementation"] == check_descriptor("modelrig_caches", FORMAT)


@pytest.mark.parametrize(
    "give", [lambda: attrs.evolve(FORMAT, offers="rewind"), lambda: attrs.evolve(FORMAT, needs={"caches": "rewind"})]
)
def test_a_string_where_a_set_of_names_belongs_is_not_taken_letter_by_letter(give):
    with pytest.raises(TypeError, match="a set of names is needed, not the string 'rewind'"):
        give()


def test_capabilities_do_not_take_a_string_for_a_set_either():
    with pytest.raises(TypeError, match="'cpu'"):
        CacheCapabilities(devices="cpu", dtypes={"float32"}, layers={"full"})


# ------------------------------------------------------------------------------------------------ requirements


@pytest.mark.parametrize(
    ("requires", "expected"),
    [
        ((), None),
        (("attrs>=20",), None),
        (("ATTRS",), None),
        (("surely-not-installed; python_version < '3'",), None),
        (("surely-not-installed",), "it needs surely-not-installed (not installed); run: pip install surely-not-installed"),
        (
            ("attrs", "surely-not-installed[fast]>=2,<3", "other-absent; python_version > '3'"),
            "it needs surely-not-installed[fast]<3,>=2 (not installed) and other-absent (not installed); "
            "run: pip install 'surely-not-installed[fast]<3,>=2' other-absent",
        ),
        (
            ("attrs>9000",),
            f"it needs attrs>9000 (installed is {metadata.version('attrs')}); run: pip install 'attrs>9000'",
        ),
    ],
)
def test_unmet_requirements_come_with_the_command(requires, expected):
    assert expected == unmet(attrs.evolve(FORMAT, requires=requires))


def test_the_components_own_command_is_shown():
    component = attrs.evolve(FORMAT, requires=("surely-not-installed",), install="pip install 'modelrig[fast]'")
    assert unmet(component).endswith("; run: pip install 'modelrig[fast]'")


@pytest.mark.parametrize(("version", "is_met"), [("3.0.dev1", True), ("not-a-version", False), ("1.0", False), (None, False)])
def test_odd_installed_versions_are_judged(monkeypatch, version, is_met):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert is_met == (unmet(attrs.evolve(FORMAT, requires=("anything>=2",))) is None)
