"""Plain decoding with draws: the call's options have a temperature."""

from __future__ import annotations

from modelrig_plugins.decoders.greedy import GreedyDecoder


class SamplingDecoder(GreedyDecoder):
    pass
