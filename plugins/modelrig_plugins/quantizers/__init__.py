"""How 2-D weights are held and multiplied. `none` keeps them as they are."""

from modelrig.components import FLOATING, Quantizer, QuantizerCapabilities
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_quantizers() -> list[Quantizer]:
    return [
        Quantizer(
            name="none",
            summary="weights as stored, or cast to the compute dtype",
            planner="modelrig_plugins.quantizers.none:NonePlanner",
            implementation="modelrig_plugins.quantizers.none_module:DenseLinear",
            offers={"fullgraph"},
            rank=0,
            capabilities=QuantizerCapabilities(
                devices={"cpu", "cuda"}, dtypes=FLOATING, reads={"none"}, lossless=True, streams=True
            ),
        )
    ]
