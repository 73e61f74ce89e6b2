"""Plain decoding with draws: the sampler the call made from its options draws instead of taking the maximum."""

from __future__ import annotations

from modelrig_plugins.decoders.greedy import GreedyDecoder


class SamplingDecoder(GreedyDecoder):
    pass
