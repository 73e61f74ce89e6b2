"""What each negotiated kind has to do for this model, request and device: frozen data that rules and planners check against.

A need is derived once per plan. `origins` says for each field where its value comes from, for the sentence a refusal is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, frozen

from modelrig.checkpoint.config import ConfigReader
from modelrig.components import AttentionSpec, ModelFacts
from modelrig.errors import quoted
from modelrig.planning.nvml import Gpu
from modelrig.planning.probes import Finding, Probe, not_asked

PLAIN = "none"  # the scheme of a checkpoint whose weights are not quantised
BITSANDBYTES_4BIT = ("fp4", "nf4")
_METHOD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@frozen(kw_only=True)
class Need:
    """What all needs have. `device` is a device type (`"cpu"`, `"cuda"`), `dtype` the one the model computes in.

    `probe` tries something out (`modelrig.planning.probes.find`), or answers None where the component was not asked for by name.
    """

    device: str
    dtype: str
    batch: int = 1
    context: int = 1
    origins: Mapping[str, str] = Factory(dict)
    probe: Callable[[Probe], Finding | None] = not_asked


@frozen(kw_only=True)
class AttentionNeed(Need):
    """For a kernel that serves every layer."""

    head_dims: frozenset[int]
    masks: frozenset[str]
    grouped_heads: bool
    softcap: bool
    sinks: bool
    unequal_value_dim: bool
    layers: tuple[AttentionSpec, ...]  # the distinct ones
    cpu_flags: frozenset[str] = frozenset()
    gpu: Gpu | None = None  # the one that runs, where it is known
    driver: str | None = None  # its version
    lacks_cpp: str | None = None  # why nothing can be compiled from C++; None if it can


@frozen(kw_only=True)
class CacheNeed(Need):
    """For a cache that holds every layer. `kinds` are layer kinds: full, sliding."""

    kinds: frozenset[str]
    batched: bool
    layers: tuple[AttentionSpec, ...]  # one per layer that keeps keys and values


@frozen(kw_only=True)
class QuantizerNeed(Need):
    """For whatever holds the 2-D weights. `scheme` is what they are stored as: "none", or the checkpoint's own quantisation."""

    scheme: str
    shapes: frozenset[tuple[int, ...]]  # the distinct shapes of linear weights [out, in]
    cpu_flags: frozenset[str] = frozenset()  # as /proc/cpuinfo names them; what kernels are fast here
    multiplied: frozenset[tuple[int, int]] = frozenset()  # like `shapes`, with the head and single experts
    machine: str = ""  # under which name `modelrig.planning.measured` keeps what was measured of its kernels
    streamed: bool = False  # weights do not stay where they are computed with, so kernels can keep no form of their own


@frozen(kw_only=True)
class DecoderNeed(Need):
    samples: bool
    batched: bool


@frozen(kw_only=True)
class CompilerNeed(Need):
    """For whatever compiles the step."""

    generates: bool = True
    streamed: bool = False  # weights do not stay where they are computed with


@frozen(kw_only=True)
class Situation:
    """What needs are derived from: the model, and what was decided before the parts are negotiated."""

    facts: ModelFacts
    scheme: str
    device: str  # with its number: "cuda:0"
    dtype: str
    context: int
    batch: int
    origins: Mapping[str, str]  # of device, dtype, context and batch
    cpu_flags: frozenset[str] = frozenset()
    machine: str = ""  # its name in `modelrig.planning.measured`
    streamed: bool = False  # some weights are not on the device that runs
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    lacks_cpp: str | None = None
    is_here: bool = False  # planned for this machine

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]


def attention_need(at: Situation) -> AttentionNeed:
    layers = tuple(dict.fromkeys(at.facts.layers))
    # `generate` takes prompts of different lengths whatever was planned, so padding is always needed.
    masks = {"padding"} | {"causal" if spec.causal else "bidirectional" for spec in layers}
    masks |= {"window" for spec in layers if spec.window is not None}
    from_config = dict.fromkeys(("head_dims", "masks", "grouped_heads", "softcap", "sinks", "unequal_value_dim"), "config.json")
    return AttentionNeed(
        **_common(at, from_config),
        head_dims=frozenset(spec.head_dim for spec in layers),
        masks=frozenset(masks),
        grouped_heads=any(spec.num_key_value_heads != spec.num_heads for spec in layers),
        softcap=any(spec.softcap is not None for spec in layers),
        sinks=any(spec.sinks for spec in layers),
        unequal_value_dim=any(spec.value_dim != spec.head_dim for spec in layers),
        layers=layers,
        cpu_flags=at.cpu_flags,
        gpu=next((gpu for gpu in at.gpus if gpu.device == at.device), None),
        driver=at.driver,
        lacks_cpp=at.lacks_cpp,
    )


def cache_need(at: Situation) -> CacheNeed:
    kinds = frozenset("full" if spec.window is None else "sliding" for spec in at.facts.cached_layers)
    common = _common(at, {"kinds": "config.json", "batched": at.origins.get("batch", "default")})
    return CacheNeed(**common, kinds=kinds, batched=at.batch > 1, layers=at.facts.cached_layers)


def quantizer_need(at: Situation) -> QuantizerNeed:
    shapes = {parameter.shape for parameter in at.facts.parameters if parameter.role == "linear"}
    return QuantizerNeed(
        **_common(at, {"scheme": "quantization_config in config.json", "streamed": at.origins.get("device", "the device map")}),
        scheme=at.scheme,
        shapes=frozenset(shapes),
        cpu_flags=at.cpu_flags,
        multiplied=multiplied_shapes(at.facts),
        machine=at.machine,
        streamed=at.streamed,
    )


def multiplied_shapes(facts: ModelFacts) -> frozenset[tuple[int, int]]:
    """The distinct [out, in] of everything that kernels of the linear slot multiply; of stacked experts that of one."""
    wanted = (one.shape[-2:] for one in facts.parameters if one.role in ("linear", "head", "experts") and len(one.shape) > 1)
    return frozenset((rows, columns) for rows, columns in wanted)


def decoder_need(at: Situation, samples: bool = False) -> DecoderNeed:
    origins = {"samples": "generate's temperature", "batched": at.origins.get("batch", "default")}
    return DecoderNeed(**_common(at, origins), samples=samples, batched=at.batch > 1)


def compiler_need(at: Situation) -> CompilerNeed:
    origins = {"generates": "config.json", "streamed": at.origins.get("device", "the device map")}
    return CompilerNeed(**_common(at, origins), generates=at.facts.generates, streamed=at.streamed)


#: kind → how its need is derived
NEEDS: dict[str, Callable[[Situation], Need]] = {
    "quantizers": quantizer_need,
    "attention": attention_need,
    "caches": cache_need,
    "decoders": decoder_need,
    "compilers": compiler_need,
}


def _common(at: Situation, origins: Mapping[str, str]) -> dict[str, Any]:
    return {
        "device": at.device_type,
        "dtype": at.dtype,
        "batch": at.batch,
        "context": at.context,
        "origins": {**at.origins, **origins},
    }


def stored_scheme(config: Mapping[str, Any], path: Path) -> str:
    """How config.json says its 2-D weights are stored: `"none"`, or `<quant_method>` with the variant where it names one.

    The name is only compared with what quantizers say they read. Raises `ConfigError` naming the key.
    """
    with ConfigReader(config, path) as read:
        settings = read.child("quantization_config")
        if settings is None:
            return PLAIN
        in_4bit = settings.boolean("load_in_4bit", default=False)
        in_8bit = settings.boolean("load_in_8bit", default=False)
        settings.require(not (in_4bit and in_8bit), "CF-REL", "load_in_8bit", "true, and so is load_in_4bit")
        # bitsandbytes is older than the key
        method = settings.string("quant_method", **({"default": "bitsandbytes"} if in_4bit or in_8bit else {}))
        is_name = _METHOD.fullmatch(method) is not None
        settings.require(is_name, "CF-ENUM", "quant_method", f"{quoted(method)} is not the name of a method")
        if in_4bit:
            return f"{method}_{settings.choice('bnb_4bit_quant_type', BITSANDBYTES_4BIT, default='fp4')}"
        return f"{method}_int8" if in_8bit else method
