"""Model families. `<name>.py` plans (facts from config and headers, no torch), `<name>_module.py` computes.

Families of llama's shape have no module of their own: what tells them apart is data (`decoder.py`, `decoder_module.py`).
"""

from modelrig.components import Architecture
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"

#: families of llama's shape
DECODERS = {
    "llama": "Llama 1, 2 and 3.x, and models that share their config",
    "mistral": "Mistral 7B and its relatives, with or without a sliding window",
    "mixtral": "Mixtral 8x7B and 8x22B: sparse experts",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3, dense",
    "qwen3_moe": "Qwen3 with sparse experts",
    "gemma": "Gemma 2B and 7B",
    "gemma2": "Gemma 2: soft caps and alternating windows",
    "gemma3_text": "Gemma 3, text only",
    "phi3": "Phi-3, Phi-3.5 and Phi-4: fused projections, long contexts",
    "olmo2": "OLMo 2",
    "granite": "Granite 3.x, dense",
    "smollm3": "SmolLM3",
}
#: families with modules of their own: the name of their builder, and what they are
OTHERS = {
    "gpt2": ("GPT2Builder", "GPT-2 and models that share its config"),
    "gpt_neox": ("NeoXBuilder", "GPT-NeoX and Pythia"),
    "bert": ("BertBuilder", "BERT encoders: hidden states, masked tokens, classes of texts and of tokens"),
}


@hookimpl
def modelrig_architectures() -> list[Architecture]:
    here = "modelrig_plugins.architectures"
    builders = {name: ("decoder_module:DecoderBuilder", summary) for name, summary in DECODERS.items()}
    builders |= {name: (f"{name}_module:{builder}", summary) for name, (builder, summary) in OTHERS.items()}
    return [
        Architecture(
            name=name,
            summary=summary,
            planner=f"{here}.{name}:PLANNER",
            implementation=f"{here}.{builder}",
            model_types={name},
        )
        for name, (builder, summary) in builders.items()
    ]
