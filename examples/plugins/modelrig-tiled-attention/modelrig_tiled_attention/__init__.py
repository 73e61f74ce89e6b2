"""Registers the attention backend `tiled`."""

from modelrig.components import AttentionBackend, AttentionCapabilities, Range
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_attention():
    return [
        AttentionBackend(
            name="tiled",
            summary="online softmax over blocks of keys: memory grows with the block, not with the prompt",
            planner="modelrig_tiled_attention.tiled:TiledPlanner",
            implementation="modelrig_tiled_attention.tiled_module:TiledAttention",
            offers={"fullgraph"},
            needs={"caches": {"layout:bhsd"}},
            capabilities=AttentionCapabilities(
                devices={"cpu", "cuda"},
                dtypes={"float32", "bfloat16", "float16"},
                head_dims=Range(1, 512),
                masks={"causal", "bidirectional", "padding", "window"},
                grouped_heads=True,
                softcap=True,
                unequal_value_dim=True,
            ),
        )
    ]
