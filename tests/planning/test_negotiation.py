from __future__ import annotations

import time
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rigs
from modelrig.components import Component
from modelrig.errors import PlanError, PluginError, RequestError
from modelrig.planning.negotiation import Negotiated, negotiate
from modelrig.planning.request import read_request
from modelrig.registry import Registry
from rigs import registry, situation, spec

SOFTCAP = situation(spec(softcap=30.0))


def choose(installed: Registry, at: Any = None, **request: Any) -> Negotiated:
    return negotiate(at or situation(), {}, read_request(request, {}, environ={}), installed)


def names(result: Negotiated) -> dict[str, str]:
    return {kind: choice.component for kind, choice in result.choices.items()}


def codes(result: Negotiated, component: str) -> list[str]:
    return [reason.code for row in result.refused for reason in row.reasons if row.component == component]


# ------------------------------------------------------------------------------------------------ auto


def test_auto_takes_the_lowest_rank_that_fits_and_says_why() -> None:
    result = choose(registry())
    expected = {"quantizers": "none", "attention": "fast", "caches": "growing", "decoders": "greedy", "compilers": "none"}
    assert expected == names(result)
    assert "auto: before slow by rank 10 < 90" == result.choices["attention"].why
    assert ["auto.order"] == codes(result, "slow")


def test_auto_goes_on_to_the_next_when_the_first_does_not_fit() -> None:
    result = choose(registry(), SOFTCAP)
    assert "slow" == result.choices["attention"].component
    assert ["attention.softcap"] == codes(result, "fast")


def test_auto_never_takes_something_from_outside_while_ours_fits() -> None:
    result = choose(registry(outside={"acme": [rigs.attention("theirs", rank=-5)]}))
    assert "fast" == result.choices["attention"].component
    assert ["auto.outside"] == codes(result, "theirs")


def test_auto_never_takes_something_that_needs_an_optional_package_while_another_fits() -> None:
    result = choose(registry(*rigs.house(), rigs.attention("flash", rank=-5, requires=("flash-attn",))))
    assert "fast" == result.choices["attention"].component
    assert ["auto.optional"] == codes(result, "flash")


def test_auto_takes_them_when_nothing_else_fits() -> None:
    sinks = rigs.attention("theirs", sinks=True)
    ours = [part for part in rigs.house() if part.name != "slow"]
    result = choose(registry(*ours, outside={"acme": [sinks]}), situation(spec(sinks=True)))
    assert "theirs" == result.choices["attention"].component
    assert "nothing of our own" in result.choices["attention"].why


def test_auto_never_makes_a_model_lossier_even_when_nothing_else_fits() -> None:
    parts = [part for part in rigs.house() if part.kind != "quantizers"]
    with pytest.raises(PlanError) as caught:
        choose(registry(*parts, rigs.quantizer("int8")))
    assert "PN-NONE" == caught.value.code
    assert ["auto.lossy"] == [reason.code for reason in caught.value.refused["quantizers"]["int8"]]


def test_auto_takes_no_cache_that_loses_something_even_when_nothing_else_fits() -> None:
    parts = [*(part for part in rigs.house() if part.kind != "caches"), rigs.cache("packed", lossy=True)]
    with pytest.raises(PlanError) as caught:
        choose(registry(*parts))
    assert ["auto.lossy"] == [reason.code for reason in caught.value.refused["caches"]["packed"]]
    assert "packed" == choose(registry(*parts), cache="packed").choices["caches"].component


def test_auto_reads_a_quantized_checkpoint_with_the_part_that_reads_its_scheme() -> None:
    result = choose(registry(*rigs.house(), rigs.quantizer("awq", reads={"awq"})), situation(scheme="awq"))
    assert "awq" == result.choices["quantizers"].component
    assert ["quantizer.scheme"] == codes(result, "none")


def test_a_preferred_part_comes_first_wherever_it_is_from() -> None:
    outside = {"acme": [rigs.attention("theirs")]}
    assert "theirs" == choose(registry(outside=outside), prefer=["theirs"]).choices["attention"].component
    assert "theirs" == choose(registry(outside=outside), prefer=["acme:theirs"]).choices["attention"].component
    with pytest.raises(RequestError, match="prefer"):
        choose(registry(), prefer=["thiers"])


def test_a_planner_that_is_not_considered_is_not_imported() -> None:
    absent = rigs.attention("theirs", planner="no_such_module:Planner")
    assert ["auto.outside"] == codes(choose(registry(outside={"acme": [absent]})), "theirs")


# ------------------------------------------------------------------------------------------------ wishes


def test_a_pin_is_taken_although_others_come_first() -> None:
    result = choose(registry(), attention="slow")
    assert ("slow", "asked for by argument") == (result.choices["attention"].component, result.choices["attention"].why)
    assert ["request.pinned"] == codes(result, "fast")


def test_a_pin_that_cannot_serve_is_an_error_with_all_reasons_and_the_nearest_way_out() -> None:
    broken = rigs.attention("wrong", devices={"cuda"}, dtypes={"float16"})
    with pytest.raises(PlanError) as caught:
        choose(registry(*rigs.house(), broken), attention="wrong")
    assert ("PN-REFUSED", 3) == (caught.value.code, caught.value.exit_code)
    reasons = [reason.code for reason in caught.value.refused["attention"]["wrong"]]
    assert ["attention.device", "attention.dtype"] == reasons
    assert "attention='fast'" in str(caught.value.hint)


def test_an_ordered_wish_takes_the_first_that_fits_and_shows_what_was_before_it() -> None:
    result = choose(registry(), SOFTCAP, attention=["missing", "fast", "slow"])
    assert "slow" == result.choices["attention"].component
    assert ["request.unknown"] == codes(result, "missing")
    assert ["attention.softcap"] == codes(result, "fast")


def test_an_ordered_wish_keeps_its_order_against_the_ranks() -> None:
    assert "slow" == choose(registry(), attention=["slow", "fast"]).choices["attention"].component


def test_an_ordered_wish_of_which_nothing_fits_is_an_error_unless_auto_ends_it() -> None:
    with pytest.raises(PlanError, match="missing") as caught:
        choose(registry(), SOFTCAP, attention=["missing", "fast"])
    assert "PN-REFUSED" == caught.value.code
    assert "slow" == choose(registry(), SOFTCAP, attention=["missing", "fast", "auto"]).choices["attention"].component


def test_a_wish_for_one_kind_decides_before_auto_decides_another() -> None:
    """The wished cache only fits beside the slower kernel, and the wish's order counts for more than a rank."""
    parts = [
        rigs.quantizer(),
        rigs.attention("fast", rank=10),
        rigs.attention("slow", rank=90, offers={"special"}),
        rigs.cache("wished", needs={"attention": {"special"}}),
        rigs.cache("second"),
        rigs.decoder(),
        rigs.compiler(),
    ]
    result = choose(registry(*parts), cache=["wished", "second"])
    assert ("wished", "slow") == (result.choices["caches"].component, result.choices["attention"].component)
    assert ["attention.link.cache"] == codes(result, "fast")


def test_an_exclusion_leaves_the_rest_to_auto() -> None:
    result = choose(registry(), attention="!fast")
    assert "slow" == result.choices["attention"].component
    assert ["request.excluded"] == codes(result, "fast")


@pytest.mark.parametrize("wish", ["fats", "!fats", ["auto", "!fats"]])
def test_an_unknown_name_is_an_error_with_the_nearest(wish: object) -> None:
    with pytest.raises(RequestError, match="'fast'") as caught:
        choose(registry(), attention=wish)
    assert "RQ-NAME" == caught.value.code


def test_a_short_name_that_two_plugins_use_is_an_error_and_the_full_ids_serve() -> None:
    clash = registry(outside={"acme": [rigs.attention("fast")]})
    for wish in ("fast", ["fast", "slow"]):
        with pytest.raises(RequestError) as caught:
            choose(clash, attention=wish)
        assert "RQ-AMBIGUOUS" == caught.value.code
    assert "acme:fast" == choose(clash, attention="acme:fast").choices["attention"].component
    assert "modelrig:fast" == choose(clash).choices["attention"].component


def test_a_part_that_is_not_usable_is_a_row_and_an_error_only_when_it_is_pinned() -> None:
    installed = registry(fast=("unavailable", "needs fast-kernels"))
    result = choose(installed, attention=["fast", "slow"])
    assert ("slow", ["plugin.unavailable"]) == (result.choices["attention"].component, codes(result, "fast"))
    with pytest.raises(PluginError, match="needs fast-kernels"):
        choose(installed, attention="fast")


# ------------------------------------------------------------------------------------------------ planners and options


def test_every_reason_of_a_planner_is_kept() -> None:
    parts = (*rigs.house(), rigs.attention("picky", planner="rigs:Refuses"))
    assert ["made_up.first", "made_up.second"] == codes(choose(registry(*parts)), "picky")


def test_a_planner_that_fails_is_a_reason() -> None:
    parts = (
        *rigs.house(),
        rigs.attention("buggy", rank=0, planner="rigs:Fails"),
        rigs.attention("gone", rank=0, planner="rigs:Gone"),
    )
    result = choose(registry(*parts))
    assert ("fast", ["plugin.failed"], ["plugin.broken"]) == (
        result.choices["attention"].component,
        codes(result, "buggy"),
        codes(result, "gone"),
    )
    with pytest.raises(PluginError):
        choose(registry(*parts), attention="gone")


def test_options_reach_the_planner_and_the_choice() -> None:
    parts = (*rigs.house(), rigs.quantizer("int4", planner="rigs:WithOptions"))
    result = choose(registry(*parts), quantizer={"name": "int4", "group_size": 32}, set={"quantizer.symmetric": False})
    assert rigs.WithOptions.Options(32, False) == result.choices["quantizers"].options
    with pytest.raises(PlanError, match="128 does not divide"):
        choose(registry(*parts), quantizer={"name": "int4", "group_size": 128})


@pytest.mark.parametrize(("options", "code"), [({"groupsize": 32}, "RQ-UNKNOWN"), ({"group_size": "32"}, "RQ-VALUE")])
def test_wrong_options_of_a_pin_are_an_error_of_the_request(options: dict[str, object], code: str) -> None:
    parts = (*rigs.house(), rigs.quantizer("int4", planner="rigs:WithOptions"))
    with pytest.raises(RequestError, match="group_size") as caught:
        choose(registry(*parts), quantizer={"name": "int4"} | options)
    assert code == caught.value.code


def test_options_that_nothing_takes_are_an_error_of_the_request() -> None:
    with pytest.raises(RequestError, match="has no options"):
        choose(registry(), set={"cache.page_size": 16})


# ------------------------------------------------------------------------------------------------ links


def test_parts_are_chosen_so_that_each_offers_what_the_others_need() -> None:
    parts = (*rigs.house(), rigs.compiler("graphs", needs={"caches": {"fixed_address"}}))
    result = choose(registry(*parts), compiler="graphs")
    assert "fixed" == result.choices["caches"].component
    assert ["cache.link.compiler"] == codes(result, "growing")


def test_pins_that_exclude_each_other_are_an_error_that_names_both() -> None:
    parts = (*rigs.house(), rigs.compiler("graphs", needs={"caches": {"fixed_address"}}))
    with pytest.raises(PlanError) as caught:
        choose(registry(*parts), compiler="graphs", cache="growing")
    assert "PN-REFUSED" == caught.value.code
    assert "needs fixed_address of the cache; growing offers nothing" in caught.value.reason
    assert "cache.link.compiler" in {reason.code for reason in caught.value.refused["caches"]["growing"]}
    assert "cache='fixed'" in str(caught.value.hint)


def test_what_no_part_offers_is_told_of_the_part_that_needs_it() -> None:
    parts = (*rigs.house(), rigs.attention("alien", needs={"caches": {"layout:alien"}}))
    with pytest.raises(PlanError, match="needs layout:alien of the cache"):
        choose(registry(*parts), attention="alien")


# ------------------------------------------------------------------------------------------------ sampling


def test_the_decoder_for_calls_with_a_temperature_is_chosen_too() -> None:
    result = choose(registry())
    assert result.decoder_when_sampling is not None
    assert ("greedy", "sampling") == (result.choices["decoders"].component, result.decoder_when_sampling.component)
    assert [] == codes(result, "sampling")


def test_a_pinned_decoder_stands_for_both_and_for_none_if_it_cannot_sample() -> None:
    both = choose(registry(), decoder="sampling")
    assert both.choices["decoders"] == both.decoder_when_sampling
    assert choose(registry(), decoder="greedy").decoder_when_sampling is None


# ------------------------------------------------------------------------------------------------ installing changes nothing

REQUESTS = [{}, {"cache": "fixed"}, {"attention": ["slow", "fast"]}, {"attention": "!fast"}]
TOKENS = st.frozensets(st.sampled_from(["fixed_address", "layout:x", "rewind", "special"]), max_size=2)


@st.composite
def foreign_parts(draw: st.DrawFn) -> list[Component]:
    makers = {
        "attention": rigs.attention,
        "caches": rigs.cache,
        "decoders": rigs.decoder,
        "quantizers": rigs.quantizer,
        "compilers": rigs.compiler,
    }
    parts = []
    for number in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(sorted(makers)))
        linked = draw(st.sampled_from(sorted(set(makers) - {kind})))
        part = makers[kind](
            f"foreign{number}",
            rank=draw(st.integers(-100, 100)),
            offers=draw(TOKENS),
            needs={linked: draw(TOKENS)},
            experimental=draw(st.booleans()),
        )
        if kind == "attention" and draw(st.booleans()):
            capabilities = attrs.evolve(part.capabilities, softcap=True, grouped_heads=True)  # type: ignore[attr-defined]
            part = attrs.evolve(part, capabilities=capabilities)
        if kind == "quantizers":
            lossless = attrs.evolve(part.capabilities, lossless=draw(st.booleans()))  # type: ignore[attr-defined]
            part = attrs.evolve(part, capabilities=lossless)
        parts.append(part)
    return parts


def ids(result: Negotiated) -> dict[str, str | None]:
    sampling = result.decoder_when_sampling
    chosen: dict[str, str | None] = {kind: choice.id for kind, choice in result.choices.items()}
    return chosen | {"decoder when sampling": None if sampling is None else sampling.id}


@settings(max_examples=60, deadline=None)
@given(
    foreign_parts(),
    st.booleans(),
    st.sampled_from([{}, {"cache": "fixed"}, {"attention": ["slow", "fast"]}, {"attention": "!fast"}]),
)
def test_installing_packages_changes_no_request_that_was_served_before(
    foreign: list[Component], has_softcap: bool, request_: dict[str, Any]
) -> None:
    at = SOFTCAP if has_softcap else situation()
    before = choose(registry(), at, **request_)
    after = choose(registry(outside={"acme": foreign}), at, **request_)
    assert {kind: choice.id for kind, choice in before.choices.items()} == {
        kind: choice.id for kind, choice in after.choices.items()
    }
    assert before.decoder_when_sampling == after.decoder_when_sampling or (
        before.decoder_when_sampling is not None
        and after.decoder_when_sampling is not None
        and before.decoder_when_sampling.id == after.decoder_when_sampling.id
    )
    shown = {row.component for row in after.refused}
    assert {part.name for part in foreign} <= shown
    assert all(row.reasons for row in after.refused)


def test_hundreds_of_installed_parts_cost_no_noticeable_time() -> None:
    crowd = [rigs.attention(f"a{i}", needs={"caches": {f"t{i}"}}) for i in range(300)]
    crowd += [rigs.cache(f"c{i}", offers={f"t{i}"}) for i in range(300)]  # type: ignore[misc]
    installed = registry(outside={"crowd": crowd})
    started = time.perf_counter()
    result = choose(installed, attention=[f"crowd:a{i}" for i in range(250, 300)])
    assert "a250" == result.choices["attention"].component
    assert time.perf_counter() - started < 3
