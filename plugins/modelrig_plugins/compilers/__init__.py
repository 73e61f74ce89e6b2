"""What turns a model's `step` into something faster. `none` runs it as it is."""

from modelrig.components import NOTHING_TO_PLAN, Compiler, CompilerCapabilities
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_compilers() -> list[Compiler]:
    return [
        Compiler(
            name="none",
            summary="the step as it is, eager",
            planner=NOTHING_TO_PLAN,
            implementation="modelrig_plugins.compilers.none:NoneCompiler",
            rank=0,
            capabilities=CompilerCapabilities(devices={"cpu", "cuda"}),
        ),
        Compiler(
            name="inductor",
            summary="native code for short steps, kept on disk: of one block that all share, or of the whole step",
            planner="modelrig_plugins.compilers.inductor:InductorPlanner",
            implementation="modelrig_plugins.compilers.inductor_module:InductorCompiler",
            needs={
                "caches": {"fixed_address", "fullgraph"},
                "attention": {"fullgraph", "symbolic_lengths"},
                "quantizers": {"fullgraph"},
            },
            rank=50,
            capabilities=CompilerCapabilities(devices={"cpu", "cuda"}),
        ),
    ]
