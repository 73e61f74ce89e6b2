"""The modules of families of llama's shape, on the meta device."""

from __future__ import annotations

from functools import partial

from modelrig.components import ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import Attention, CausalLM, Decoder, GatedMLP, PreNormBlock
from modelrig.modules.network import BuildContext
from modelrig.modules.norms import RMSNorm


class DecoderBuilder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> CausalLM:
        config = facts.config
        hidden = config.hidden_size
        norm = partial(RMSNorm, epsilon=config.rms_norm_eps, dtype=context.dtype)
        blocks = [
            PreNormBlock(
                hidden,
                norm,
                Attention(hidden, spec, config.qkv_bias, config.output_bias, context, norm if config.qk_norm else None),
                GatedMLP(hidden, config.intermediate_size, config.mlp_bias, FUNCTIONS[config.hidden_act], context),
            )
            for spec in facts.layers
        ]
        ropes = (config.rope,) * len(blocks)
        decoder = Decoder(config.vocab_size, hidden, blocks, norm(hidden), facts.layers, ropes, context)
        return CausalLM(decoder, config.vocab_size, hidden, config.tied, context)
