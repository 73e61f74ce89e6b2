"""Model families. `<name>.py` plans (facts from config and headers, no torch), `<name>_module.py` computes."""

from modelrig.components import Architecture
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


DECODERS = {
    "llama": "Llama 1, 2 and 3.x, and models that share their config",
    "mistral": "Mistral 7B and its relatives, with or without a sliding window",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3, dense",
}


@hookimpl
def modelrig_architectures() -> list[Architecture]:
    return [
        Architecture(
            name=name,
            summary=summary,
            planner=f"modelrig_plugins.architectures.{name}:PLANNER",
            implementation="modelrig_plugins.architectures.decoder_module:DecoderBuilder",
            model_types={name},
        )
        for name, summary in DECODERS.items()
    ]
