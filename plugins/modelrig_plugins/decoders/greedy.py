"""Plain decoding, one token a step, as the call's options choose it: without a temperature the most likely one."""

from __future__ import annotations

from typing import Any

from modelrig.components import DecoderCall
from modelrig.generation.decoding import PlainRun


class GreedyDecoder:
    @staticmethod
    def open(call: DecoderCall, options: Any) -> PlainRun:  # noqa: ARG004 - protocol
        return PlainRun(call)
