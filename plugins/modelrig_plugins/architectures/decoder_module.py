"""The modules of families of llama's shape, on the meta device."""

from __future__ import annotations

from modelrig.components import ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import Attention, BuildContext, CausalLM, Decoder, DecoderBlock, GatedMLP


class DecoderBuilder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> CausalLM:
        config = facts.config
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        blocks = [
            DecoderBlock(
                hidden,
                epsilon,
                Attention(hidden, spec, config.qkv_bias, config.output_bias, context, epsilon if config.qk_norm else None),
                GatedMLP(hidden, config.intermediate_size, config.mlp_bias, FUNCTIONS[config.hidden_act], context),
                context.dtype,
            )
            for spec in facts.layers
        ]
        decoder = Decoder(config.vocab_size, hidden, epsilon, blocks, facts.layers, config.rope, context)
        return CausalLM(decoder, config.vocab_size, hidden, config.tied, context)
