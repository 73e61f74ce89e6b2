"""Parts, registries, machines and models to plan with, made up in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from modelrig.components import (
    FLOATING,
    AttentionBackend,
    AttentionCapabilities,
    AttentionSpec,
    CacheCapabilities,
    CacheImplementation,
    Compiler,
    CompilerCapabilities,
    Component,
    Decoder,
    DecoderCapabilities,
    ModelFacts,
    Parameter,
    Quantizer,
    QuantizerCapabilities,
    Reason,
    TensorSpec,
    dtype_bytes,
)
from modelrig.planning.environment import Environment, Memory
from modelrig.planning.needs import Situation
from modelrig.planning.nvml import Gpu
from modelrig.registry import PluginRow, Registered, Registry

CPU = frozenset({"cpu"})
MASKS = frozenset({"causal", "padding"})
OURS = "modelrig"
MADE_UP: dict[str, str] = {"summary": "made up", "implementation": "rigs:none"}


# ------------------------------------------------------------------------------------------------ planners


class Plain:
    """Plans everything that needs no options."""

    @staticmethod
    def outputs(parameter: Parameter, dtype: str, options: Any) -> tuple[TensorSpec, ...]:
        return (TensorSpec("", dtype, parameter.shape),)

    @staticmethod
    def nbytes(layers: Any, batch: int, context: int, dtype: str, options: Any) -> int:
        return dtype_bytes(dtype, sum(2 * spec.num_key_value_heads * spec.head_dim for spec in layers) * batch * context)


class WithOptions(Plain):
    @attrs.frozen
    class Options:
        group_size: int = attrs.field(default=64, validator=attrs.validators.in_((32, 64, 128)))
        symmetric: bool = True

    @staticmethod
    def check(need: Any, options: Any) -> Iterable[Reason]:
        if options.group_size == 128:
            yield Reason("made_up.group", "128 does not divide the weights")


class Refuses(Plain):
    @staticmethod
    def check(need: Any, options: Any) -> Iterable[Reason]:
        return [Reason("made_up.first", "no"), Reason("made_up.second", "and no")]


class Fails(Plain):
    @staticmethod
    def check(need: Any, options: Any) -> Iterable[Reason]:
        raise ZeroDivisionError("a bug")


# ------------------------------------------------------------------------------------------------ components


def attention(name: str = "plain", *, planner: str = "rigs:Plain", **given: Any) -> AttentionBackend:
    names = {field.name for field in attrs.fields(AttentionCapabilities)}
    stated = {"devices": CPU, "dtypes": FLOATING, "masks": MASKS} | {key: given.pop(key) for key in names & given.keys()}
    return AttentionBackend(
        name=name,
        summary="made up",
        planner=planner,
        implementation="rigs:none",
        capabilities=AttentionCapabilities(**stated),
        **given,
    )


def cache(name: str = "plain", *, planner: str = "rigs:Plain", **given: Any) -> CacheImplementation:
    names = {field.name for field in attrs.fields(CacheCapabilities)}
    stated = {"devices": CPU, "dtypes": FLOATING, "layers": {"full"}} | {key: given.pop(key) for key in names & given.keys()}
    return CacheImplementation(name=name, planner=planner, **MADE_UP, capabilities=CacheCapabilities(**stated), **given)


def quantizer(name: str = "none", *, planner: str = "rigs:Plain", **given: Any) -> Quantizer:
    names = {field.name for field in attrs.fields(QuantizerCapabilities)}
    stated: dict[str, Any] = {"devices": CPU, "dtypes": FLOATING, "reads": {"none"}, "lossless": name == "none"}
    stated |= {key: given.pop(key) for key in names & given.keys()}
    return Quantizer(
        name=name,
        summary="made up",
        planner=planner,
        implementation="rigs:none",
        capabilities=QuantizerCapabilities(**stated),
        **given,
    )


def decoder(name: str = "greedy", *, samples: bool = False, batched: bool = True, **given: Any) -> Decoder:
    capabilities = DecoderCapabilities(samples=samples, batched=batched)
    return Decoder(name=name, planner="rigs:Plain", **MADE_UP, capabilities=capabilities, **given)


def compiler(name: str = "none", *, devices: Iterable[str] = CPU, **given: Any) -> Compiler:
    capabilities = CompilerCapabilities(devices=devices)
    return Compiler(name=name, planner="rigs:Plain", **MADE_UP, capabilities=capabilities, **given)


def house() -> tuple[Component, ...]:
    """The least with which a rig can be built: one or two of each kind, all ours."""
    return (
        quantizer(),
        attention("fast", rank=10),
        attention("slow", rank=90, softcap=True, sinks=True, grouped_heads=True),
        cache("growing", rank=10),
        cache("fixed", rank=20, offers={"fixed_address"}),
        decoder("greedy", rank=10),
        decoder("sampling", rank=20, samples=True),
        compiler(),
    )


def registry(*ours: Component, outside: Mapping[str, Iterable[Component]] | None = None, **states: tuple[str, str]) -> Registry:
    """A registry with `ours` (the house if none is given) and plugins from outside: name → components.

    `states` sets a component's state and reason: `fast=("unavailable", "needs x")`.
    """
    found = [("modelrig", OURS, tuple(ours or house()))]
    found += [(plugin, plugin, tuple(components)) for plugin, components in (outside or {}).items()]
    rows = []
    for plugin, distribution, components in found:
        registered = []
        for component in components:
            state, reason = states.get(component.name, ("active", None))
            registered.append(
                Registered(
                    descriptor=component, plugin=plugin, distribution=distribution, state=state, reason=reason, code="PL-NEED"
                )
            )
        rows.append((PluginRow(id=f"{distribution}/{plugin}", plugin=plugin, distribution=distribution), tuple(registered)))
    return Registry(rows)


# ------------------------------------------------------------------------------------------------ models and machines


def spec(**changes: Any) -> AttentionSpec:
    usual: dict[str, Any] = {"num_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "value_dim": 16, "scale": 0.25}
    return AttentionSpec(**(usual | changes))


def facts(*layers: AttentionSpec, **changes: Any) -> ModelFacts:
    layers = changes.pop("layers", layers or (spec(), spec()))
    parameters = [Parameter("embed", (100, 64), "embedding", "embed")]
    parameters += [Parameter(f"layers.{i}.up", (128, 64), "linear", f"layers.{i}.up", i) for i in range(len(layers))]
    parameters += [Parameter("head", (100, 64), "head", None)]
    usual: dict[str, Any] = {
        "architecture": "made_up",
        "config": None,
        "parameters": tuple(parameters),
        "blocks": tuple(f"layers.{i}" for i in range(len(layers))),
        "layers": layers,
        "ties": {"head": "embed"},
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 100,
        "context_length": 256,
        "dtype": "float32",
    }
    return ModelFacts(**(usual | changes))


def situation(*layers: AttentionSpec, **changes: Any) -> Situation:
    usual: dict[str, Any] = {
        "facts": facts(*layers),
        "scheme": "none",
        "device": "cpu",
        "dtype": "float32",
        "context": 256,
        "batch": 1,
        "origins": {"device": "auto", "dtype": "argument", "context": "auto", "batch": "default"},
    }
    return Situation(**(usual | changes))


def gpu(index: int = 0, free_bytes: int = 8 << 30, **changes: Any) -> Gpu:
    return Gpu(index=index, name="H200", uuid=f"GPU-{index}", total_bytes=8 << 30, free_bytes=free_bytes, **changes)


def machine(available: int = 16 << 30, *gpus: Gpu, **changes: Any) -> Environment:
    memory = Memory(total_bytes=32 << 30, available_bytes=available)
    usual: dict[str, Any] = {"memory": memory, "gpus": gpus, "torch": "2.13.0", "torch_cuda": bool(gpus)}
    return Environment(**(usual | changes))
