"""How tokens are proposed and accepted."""

from modelrig.components import NOTHING_TO_PLAN, Decoder, DecoderCapabilities
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_decoders() -> list[Decoder]:
    return [
        Decoder(
            name="greedy",
            summary="the most likely token, every time",
            planner=NOTHING_TO_PLAN,
            implementation="modelrig_plugins.decoders.greedy:GreedyDecoder",
            rank=10,
            capabilities=DecoderCapabilities(samples=False),
        ),
        Decoder(
            name="sampling",
            summary="a token drawn from the distribution that temperature, top_k, top_p and min_p leave",
            planner=NOTHING_TO_PLAN,
            implementation="modelrig_plugins.decoders.sampling:SamplingDecoder",
            rank=20,
            capabilities=DecoderCapabilities(samples=True),
        ),
    ]
