"""OLMo 2: what comes out of attention and feed-forward is normalised, and queries and keys of all heads together."""

from __future__ import annotations

from modelrig_plugins.architectures.decoder import DecoderPlanner, Family

PLANNER = DecoderPlanner(
    Family(name="olmo2", max_positions=2048, epsilon=1e-5, mlp_bias=False, norm="late", qk_norm="all", block="after")
)
