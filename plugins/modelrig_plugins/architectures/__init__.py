"""Model families. `<name>.py` plans (facts from config and headers, no torch), `<name>_module.py` computes."""

from modelrig.components import Architecture
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_architectures() -> list[Architecture]:
    return [
        Architecture(
            name="llama",
            summary="Llama 1, 2 and 3.x, and models that share their config",
            planner="modelrig_plugins.architectures.llama:LlamaPlanner",
            implementation="modelrig_plugins.architectures.llama_module:LlamaBuilder",
            model_types={"llama"},
        )
    ]
