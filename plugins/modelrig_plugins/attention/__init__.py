"""Attention kernels. Each lowers the symbolic mask (`modelrig.modules.slots.Visibility`) itself."""

from modelrig.components import FLOATING, NOTHING_TO_PLAN, AttentionBackend, AttentionCapabilities, Range
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_attention() -> list[AttentionBackend]:
    return [
        AttentionBackend(
            name="sdpa",
            summary="torch's scaled_dot_product_attention",
            planner="modelrig_plugins.attention.sdpa:SdpaPlanner",
            implementation="modelrig_plugins.attention.sdpa_module:SdpaAttention",
            offers={"fullgraph", "symbolic_lengths"},
            needs={"caches": {"layout:bhsd"}},
            rank=10,
            capabilities=AttentionCapabilities(
                devices={"cpu", "cuda"},
                dtypes=FLOATING,
                masks={"causal", "bidirectional", "padding", "window"},
                grouped_heads=True,
                unequal_value_dim=True,
            ),
        ),
        AttentionBackend(
            name="flash_attention_2",
            summary="the kernels of the package flash-attn, for NVIDIA GPUs from Ampere on",
            planner="modelrig_plugins.attention.flash_attention_2:FlashAttention2Planner",
            implementation="modelrig_plugins.attention.flash_attention_2_module:FlashAttention2",
            requires=("flash-attn>=2.6.3",),
            install="pip install flash-attn --no-build-isolation",
            needs={"caches": {"layout:bhsd", "uniform"}},
            rank=20,
            capabilities=AttentionCapabilities(
                devices={"cuda"},
                dtypes={"float16", "bfloat16"},
                head_dims=Range(1, 256),
                masks={"causal", "bidirectional", "padding", "window"},
                grouped_heads=True,
                softcap=True,
                unequal_value_dim=True,
            ),
        ),
        AttentionBackend(
            name="flex",
            summary="torch's flex_attention, compiled at first use; caps scores",
            planner="modelrig_plugins.attention.flex:FlexPlanner",
            implementation="modelrig_plugins.attention.flex_module:FlexAttention",
            offers={"fullgraph"},
            needs={"caches": {"layout:bhsd"}},
            rank=95,
            capabilities=AttentionCapabilities(
                devices={"cpu", "cuda"},
                dtypes={"float32", "bfloat16", "float16"},
                masks={"causal", "bidirectional", "padding", "window"},
                grouped_heads=True,
                softcap=True,
                unequal_value_dim=True,
            ),
        ),
        AttentionBackend(
            name="eager",
            summary="the readable reference: every score is computed, softmax in float32",
            planner=NOTHING_TO_PLAN,
            implementation="modelrig_plugins.attention.eager:EagerAttention",
            offers={"fullgraph", "symbolic_lengths"},
            needs={"caches": {"layout:bhsd"}},
            rank=90,
            capabilities=AttentionCapabilities(
                devices={"cpu", "cuda"},
                dtypes=FLOATING,
                masks={"causal", "bidirectional", "padding", "window"},
                grouped_heads=True,
                softcap=True,
                unequal_value_dim=True,
            ),
        ),
    ]
