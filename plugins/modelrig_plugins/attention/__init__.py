"""Attention kernels. Each lowers the symbolic mask (`modelrig.modules.slots.Visibility`) itself."""

from modelrig.components import FLOATING, NOTHING_TO_PLAN, AttentionBackend, AttentionCapabilities
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
            offers={"fullgraph"},
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
            name="eager",
            summary="the readable reference: every score is computed, softmax in float32",
            planner=NOTHING_TO_PLAN,
            implementation="modelrig_plugins.attention.eager:EagerAttention",
            offers={"fullgraph"},
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
