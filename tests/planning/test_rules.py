"""Each rule, both ways: a part that declares what is needed passes, one that does not is refused with the rule's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

import rigs
from modelrig.components import Range
from modelrig.errors import ConfigError
from modelrig.planning.needs import NEEDS, Situation, decoder_need, stored_scheme
from modelrig.planning.rules import RULES, link_reasons, unary_reasons, unknown_links
from rigs import situation, spec

WINDOW = situation(spec(window=8))
CASES: list[tuple[str, Any, dict[str, Any], dict[str, Any], Situation]] = [
    # code, part, capabilities that serve, capabilities that do not, situation
    ("quantizer.device", rigs.quantizer, {"devices": {"cpu"}}, {"devices": {"cuda"}}, situation()),
    ("quantizer.dtype", rigs.quantizer, {"dtypes": {"float32"}}, {"dtypes": {"float16"}}, situation()),
    ("quantizer.scheme", rigs.quantizer, {"reads": {"awq"}}, {"reads": {"none"}}, situation(scheme="awq")),
    ("quantizer.streams", rigs.quantizer, {"streams": True}, {}, situation(streamed=True)),
    ("attention.device", rigs.attention, {"devices": {"cuda"}}, {"devices": {"cpu"}}, situation(device="cuda:1")),
    ("attention.dtype", rigs.attention, {"dtypes": {"float32"}}, {"dtypes": {"bfloat16"}}, situation()),
    ("attention.head_dim", rigs.attention, {"head_dims": Range(8, 64, 8)}, {"head_dims": Range(32, 64)}, situation()),
    ("attention.mask", rigs.attention, {"masks": {"causal", "padding", "window"}}, {"masks": {"causal", "padding"}}, WINDOW),
    ("attention.grouped_heads", rigs.attention, {"grouped_heads": True}, {}, situation(spec(num_key_value_heads=2))),
    ("attention.softcap", rigs.attention, {"softcap": True}, {}, situation(spec(softcap=30.0))),
    ("attention.sinks", rigs.attention, {"sinks": True}, {}, situation(spec(sinks=True))),
    ("attention.value_dim", rigs.attention, {"unequal_value_dim": True}, {}, situation(spec(value_dim=8))),
    ("cache.device", rigs.cache, {"devices": {"cpu"}}, {"devices": {"cuda"}}, situation()),
    ("cache.dtype", rigs.cache, {"dtypes": {"float32"}}, {"dtypes": {"float16"}}, situation()),
    ("cache.layers", rigs.cache, {"layers": {"sliding"}}, {"layers": {"full"}}, WINDOW),
    ("cache.batch", rigs.cache, {"batched": True}, {"batched": False}, situation(batch=2)),
    ("decoder.batch", rigs.decoder, {"batched": True}, {"batched": False}, situation(batch=2)),
    ("compiler.device", rigs.compiler, {"devices": {"cpu"}}, {"devices": {"cuda"}}, situation()),
]


@pytest.mark.parametrize(("code", "part", "serving", "lacking", "at"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_passes_what_is_declared_and_refuses_what_is_not(
    code: str, part: Any, serving: dict[str, Any], lacking: dict[str, Any], at: Situation
) -> None:
    usual = {"devices": {at.device_type}} if part is not rigs.decoder else {}
    need = NEEDS[part().kind](at)
    assert [] == list(unary_reasons(part(**(usual | serving)), need))
    assert [code] == [reason.code for reason in unary_reasons(part(**(usual | lacking)), need)]


def test_sampling_is_needed_only_when_a_temperature_is_given() -> None:
    greedy = rigs.decoder(samples=False)
    assert [] == list(unary_reasons(greedy, decoder_need(situation())))
    assert ["decoder.samples"] == [one.code for one in unary_reasons(greedy, decoder_need(situation(), samples=True))]


def test_every_rule_has_a_case() -> None:
    assert {rule.code for rule in RULES} - {"decoder.samples"} == {case[0] for case in CASES}


def test_all_reasons_are_told_with_the_value_seen_and_the_values_accepted() -> None:
    part = rigs.attention(devices={"cuda"}, dtypes={"float16"}, head_dims=Range(32, 128, 32))
    reasons = {one.code: one.text for one in unary_reasons(part, NEEDS["attention"](situation()))}
    assert {"attention.device", "attention.dtype", "attention.head_dim"} == set(reasons)
    assert "head_dim 16 (config.json) is not among 32 to 128, multiples of 32" == reasons["attention.head_dim"]
    assert "does not compute in float32 (dtype: argument); it computes in float16" == reasons["attention.dtype"]


def test_what_is_not_declared_is_refused() -> None:
    @attrs.frozen
    class OldCapabilities:
        devices: frozenset[str] = frozenset({"cpu"})

    old = attrs.evolve(rigs.compiler(), capabilities=OldCapabilities())
    assert [] == list(unary_reasons(old, NEEDS["compilers"](situation())))
    older = attrs.evolve(rigs.attention(), capabilities=OldCapabilities())
    codes = [one.code for one in unary_reasons(older, NEEDS["attention"](situation()))]
    assert {rule.code for rule in RULES if rule.kind == "attention"} - {"attention.device"} == set(codes)
    none = attrs.evolve(rigs.compiler(), capabilities=None)
    assert ["compiler.device"] == [one.code for one in unary_reasons(none, NEEDS["compilers"](situation()))]


def test_links_are_checked_in_both_directions() -> None:
    needing = rigs.attention("wants", needs={"caches": {"layout:x", "rewind"}})
    giving, half, nothing = (rigs.cache(offers=offers) for offers in ({"layout:x", "rewind"}, {"rewind"}, ()))
    assert [] == list(link_reasons(needing, "wants", {"caches": ("c", giving)}))
    (reason,) = link_reasons(needing, "wants", {"caches": ("half", half)})
    assert ("attention.link.cache", "needs layout:x of the cache; half offers rewind") == (reason.code, reason.text)
    (reason,) = link_reasons(nothing, "c", {"attention": ("wants", needing)})
    assert ("cache.link.attention", "wants needs layout:x, rewind of the cache; c offers nothing") == (reason.code, reason.text)


def test_a_kind_that_does_not_exist_can_never_be_linked() -> None:
    (reason,) = unknown_links(rigs.attention(needs={"cache": {"x"}, "caches": {"y"}}))
    assert "did you mean 'caches'" in reason.text


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({}, "none"),
        ({"quantization_config": None}, "none"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes_int8"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            "bitsandbytes_nf4",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes_fp4"),
    ],
)
def test_the_stored_scheme_comes_from_quantization_config(config: dict[str, Any], scheme: str) -> None:
    assert scheme == stored_scheme(config, Path("config.json"))


@pytest.mark.parametrize(
    ("settings", "code", "key"),
    [
        ("awq", "CF-TYPE", "quantization_config"),
        ({}, "CF-MISSING", "quantization_config.quant_method"),
        ({"quant_method": ["awq"]}, "CF-TYPE", "quantization_config.quant_method"),
        ({"quant_method": "\x1b[2J"}, "CF-ENUM", "quantization_config.quant_method"),
        ({"quant_method": "../evil"}, "CF-ENUM", "quantization_config.quant_method"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "CF-REL", "quantization_config.load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int3"}, "CF-ENUM", "quantization_config.bnb_4bit_quant_type"),
        ({"quant_method": "awq", "load_in_4bit": "yes"}, "CF-TYPE", "quantization_config.load_in_4bit"),
    ],
)
def test_a_malformed_quantization_config_names_its_key(settings: Any, code: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stored_scheme({"quantization_config": settings}, Path("config.json"))
    assert (code, key, "config.json") == (caught.value.code, caught.value.locus, caught.value.path)
