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
        Decoder(
            name="prompt_lookup",
            summary="drafts what followed the last tokens where they came before; the same tokens in fewer steps",
            planner="modelrig_plugins.decoders.prompt_lookup:PromptLookupPlanner",
            implementation="modelrig_plugins.decoders.prompt_lookup_module:PromptLookupDecoder",
            rank=50,
            capabilities=DecoderCapabilities(samples=True),
        ),
        Decoder(
            name="draft_model",
            summary="a small model drafts; the same tokens in fewer steps",
            planner="modelrig_plugins.decoders.draft_model:DraftModelPlanner",
            implementation="modelrig_plugins.decoders.draft_model_module:DraftModelDecoder",
            rank=60,
            capabilities=DecoderCapabilities(samples=True),
        ),
        Decoder(
            name="beam",
            summary="beam search: the best of the texts that the best beginnings lead to",
            planner="modelrig_plugins.decoders.beam:BeamPlanner",
            implementation="modelrig_plugins.decoders.beam_module:BeamDecoder",
            rank=70,
            capabilities=DecoderCapabilities(samples=True),
        ),
    ]
