"""The hooks: all of them, each with a complete example that the tests execute.

A plugin is a light module named by an entry point in the group `modelrig.plugins`. It states the API version it was written
for, imports neither torch nor anything else that is heavy, and implements hooks that return descriptors:

    MODELRIG_API = "1.0"

    from modelrig.components import CacheImplementation
    from modelrig.hookspecs import hookimpl

    @hookimpl
    def modelrig_caches():
        return [CacheImplementation(...)]

and in its pyproject.toml:

    [project.entry-points."modelrig.plugins"]
    my-cache = "my_cache_modelrig"

There is one collecting hook per kind. Nothing per tensor, per layer or per token goes through hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from modelrig.components import (
        Architecture,
        AttentionBackend,
        CacheImplementation,
        Compiler,
        Constraint,
        Decoder,
        Format,
        Quantizer,
        Source,
    )

PROJECT = "modelrig"
ENTRY_POINT_GROUP = "modelrig.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def modelrig_sources() -> Iterable[Source]:  # type: ignore[empty-body]
    """Places checkpoints come from. Exactly one must claim a model reference.

    Example:
        from modelrig.components import Source
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_sources():
            return [
                Source(
                    name="vault",
                    summary="models in our company's vault: vault://name",
                    planner="my_vault.vault:VaultPlanner",
                    implementation="my_vault.vault_module:VaultFetcher",
                )
            ]
    """


@hookspec
def modelrig_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Formats of tensor files. Exactly one must claim a checkpoint folder.

    Example:
        from modelrig.components import Format
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_formats():
            return [
                Format(
                    name="npz",
                    summary="NumPy archives",
                    planner="my_npz.npz:NpzPlanner",
                    implementation="my_npz.npz_module:NpzReader",
                )
            ]
    """


@hookspec
def modelrig_architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]
    """Model families. Exactly one must list config.json's `model_type`.

    Example:
        from modelrig.components import Architecture
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_architectures():
            return [
                Architecture(
                    name="mamba",
                    summary="selective state spaces",
                    planner="my_mamba.mamba:MambaPlanner",
                    implementation="my_mamba.mamba_module:MambaBuilder",
                    model_types={"mamba"},
                )
            ]
    """


@hookspec
def modelrig_quantizers() -> Iterable[Quantizer]:  # type: ignore[empty-body]
    """Ways to hold and multiply 2-D weights.

    Example:
        from modelrig.components import Quantizer, QuantizerCapabilities
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_quantizers():
            return [
                Quantizer(
                    name="ternary",
                    summary="weights as -1, 0, 1 with a scale per row",
                    planner="my_ternary.ternary:TernaryPlanner",
                    implementation="my_ternary.ternary_module:TernaryLinear",
                    capabilities=QuantizerCapabilities(devices={"cpu"}, dtypes={"float32", "bfloat16"}, reads={"none"}),
                )
            ]
    """


@hookspec
def modelrig_attention() -> Iterable[AttentionBackend]:  # type: ignore[empty-body]
    """Attention kernels.

    Example:
        from modelrig.components import AttentionBackend, AttentionCapabilities, Range
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_attention():
            return [
                AttentionBackend(
                    name="tiled",
                    summary="online softmax over blocks of keys",
                    planner="my_tiled.tiled:TiledPlanner",
                    implementation="my_tiled.tiled_module:TiledAttention",
                    needs={"caches": {"layout:bhsd"}},
                    capabilities=AttentionCapabilities(
                        devices={"cpu", "cuda"},
                        dtypes={"float32", "bfloat16"},
                        head_dims=Range(8, 256, multiple_of=8),
                        masks={"causal", "padding"},
                        grouped_heads=True,
                    ),
                )
            ]
    """


@hookspec
def modelrig_caches() -> Iterable[CacheImplementation]:  # type: ignore[empty-body]
    """Key/value caches.

    Example:
        from modelrig.components import CacheCapabilities, CacheImplementation
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_caches():
            return [
                CacheImplementation(
                    name="paged",
                    summary="keys and values in pages of 256 tokens",
                    planner="my_paged.paged:PagedPlanner",
                    implementation="my_paged.paged_module:PagedCache",
                    offers={"layout:bhsd", "rewind"},
                    capabilities=CacheCapabilities(devices={"cpu"}, dtypes={"float32"}, layers={"full"}),
                )
            ]
    """


@hookspec
def modelrig_decoders() -> Iterable[Decoder]:  # type: ignore[empty-body]
    """Ways to propose and accept tokens.

    Example:
        from modelrig.components import Decoder, DecoderCapabilities
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_decoders():
            return [
                Decoder(
                    name="lookahead",
                    summary="drafts n-grams from a pool",
                    planner="my_lookahead.lookahead:LookaheadPlanner",
                    implementation="my_lookahead.lookahead_module:LookaheadDecoder",
                    needs={"caches": {"rewind"}},
                    capabilities=DecoderCapabilities(samples=False),
                )
            ]
    """


@hookspec
def modelrig_compilers() -> Iterable[Compiler]:  # type: ignore[empty-body]
    """What makes `model.step` faster.

    Example:
        from modelrig.components import Compiler, CompilerCapabilities
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_compilers():
            return [
                Compiler(
                    name="tvm",
                    summary="one graph for the step, compiled by TVM",
                    planner="my_tvm.tvm:TvmPlanner",
                    implementation="my_tvm.tvm_module:TvmCompiler",
                    needs={"caches": {"fixed_address"}, "attention": {"fullgraph"}},
                    capabilities=CompilerCapabilities(devices={"cpu"}),
                )
            ]
    """


@hookspec
def modelrig_constraints() -> Iterable[Constraint]:  # type: ignore[empty-body]
    """What compiles grammars into masks of tokens. No part of a plan: a call of `generate` names a language, and the first
    component that declares it serves.

    Example:
        from modelrig.components import Constraint
        from modelrig.hookspecs import hookimpl

        @hookimpl
        def modelrig_constraints():
            return [
                Constraint(
                    name="automaton",
                    summary="regular expressions, as a table of states and tokens",
                    implementation="my_automaton.automaton:AutomatonCompiler",
                    languages={"regex"},
                )
            ]
    """
