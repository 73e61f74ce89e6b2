"""The modules of families of llama's shape, on the meta device."""

from __future__ import annotations

from functools import partial

from torch import nn

from modelrig.components import AttentionSpec, ModelFacts
from modelrig.modules.activations import FUNCTIONS
from modelrig.modules.decoder import (
    Attention,
    CausalLM,
    Decoder,
    FusedAttention,
    FusedMLP,
    GatedMLP,
    MakeNorm,
    PostNormBlock,
    PreNormBlock,
    SandwichBlock,
)
from modelrig.modules.experts import SparseMLP
from modelrig.modules.network import BuildContext
from modelrig.modules.norms import LateRMSNorm, OffsetRMSNorm, RMSNorm
from modelrig_plugins.architectures.decoder import DecoderConfig

NORMS = {"plain": RMSNorm, "late": LateRMSNorm, "offset": OffsetRMSNorm}
BLOCKS = {"after": PostNormBlock, "both": SandwichBlock}


class DecoderBuilder:
    @staticmethod
    def build(facts: ModelFacts, context: BuildContext) -> CausalLM:
        config: DecoderConfig = facts.config
        hidden = config.hidden_size
        norm = partial(NORMS[config.family.norm], epsilon=config.rms_norm_eps, dtype=context.dtype)
        decoder = Decoder(
            config.vocab_size,
            hidden,
            [_block(config, norm, layer, context) for layer in range(len(config.layers))],
            norm(hidden),
            config.layers,
            config.ropes,
            context,
            config.embedding_scale,
            rounds_scale=config.rounds_scale,
        )
        return CausalLM(
            decoder,
            config.vocab_size,
            hidden,
            config.tied,
            context,
            logit_scale=config.logit_scale,
            logit_cap=config.logit_cap,
            restarts_at=config.restarts_at,
        )


def _block(config: DecoderConfig, norm: MakeNorm, layer: int, context: BuildContext) -> nn.Module:
    attention, mlp = _attention(config, config.layers[layer], norm, context), _mlp(config, layer, context)
    if config.family.block == "before":
        return PreNormBlock(config.hidden_size, norm, attention, mlp, config.residual_scale)
    return BLOCKS[config.family.block](config.hidden_size, norm, attention, mlp)


def _attention(config: DecoderConfig, spec: AttentionSpec, norm: MakeNorm, context: BuildContext) -> Attention:
    return (FusedAttention if config.family.is_fused else Attention)(
        config.hidden_size,
        spec,
        config.qkv_bias,
        config.output_bias,
        context,
        head_norm=norm if config.family.qk_norm == "heads" else None,
        wide_norm=norm if config.family.qk_norm == "all" else None,
    )


def _mlp(config: DecoderConfig, layer: int, context: BuildContext) -> nn.Module:
    act, experts = FUNCTIONS[config.hidden_act], config.experts
    if experts is not None and experts.layers[layer]:
        return SparseMLP(config.hidden_size, experts.size, experts.count, experts.chosen, experts.renormalises, act, context)
    kind = FusedMLP if config.family.is_fused else GatedMLP
    return kind(config.hidden_size, config.intermediate_size, config.mlp_bias, act, context)
