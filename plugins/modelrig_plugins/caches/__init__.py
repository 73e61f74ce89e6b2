"""Key/value caches."""

from attrs import evolve

from modelrig.components import FLOATING, CacheCapabilities, CacheImplementation
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"

_CAPABILITIES = CacheCapabilities(devices={"cpu", "cuda"}, dtypes=FLOATING, layers={"full", "sliding"})


@hookimpl
def modelrig_caches() -> list[CacheImplementation]:
    return [
        CacheImplementation(
            name="dynamic",
            summary="grows with the sequence, doubling its room",
            planner="modelrig_plugins.caches.dynamic:DynamicPlanner",
            implementation="modelrig_plugins.caches.dynamic_module:DynamicCache",
            offers={"layout:bhsd", "uniform", "rewind", "fullgraph"},
            rank=10,
            capabilities=_CAPABILITIES,
        ),
        CacheImplementation(
            name="static",
            summary="allocated once at its full length; addresses never change, so a compiled step can use it",
            planner="modelrig_plugins.caches.static:StaticPlanner",
            implementation="modelrig_plugins.caches.static_module:StaticCache",
            offers={"layout:bhsd", "uniform", "rewind", "fullgraph", "fixed_address"},
            rank=20,
            capabilities=_CAPABILITIES,
        ),
        CacheImplementation(
            name="sliding",
            summary="layers with a window keep that window, the others everything; allocated once",
            planner="modelrig_plugins.caches.sliding:SlidingPlanner",
            implementation="modelrig_plugins.caches.sliding_module:SlidingCache",
            offers={"layout:bhsd", "uniform", "fullgraph", "fixed_address"},
            rank=30,
            capabilities=_CAPABILITIES,
        ),
        CacheImplementation(
            name="quantized",
            summary="the newest tokens as they are, the others packed to 8 or 4 bits a number",
            planner="modelrig_plugins.caches.quantized:QuantizedPlanner",
            implementation="modelrig_plugins.caches.quantized_module:QuantizedCache",
            offers={"layout:bhsd"},
            rank=60,
            capabilities=evolve(_CAPABILITIES, lossy=True),
        ),
        CacheImplementation(
            name="offloaded",
            summary="on disk for a model on the CPU, in main memory for one on a GPU; brought layer by layer",
            planner="modelrig_plugins.caches.offloaded:OffloadedPlanner",
            implementation="modelrig_plugins.caches.offloaded_module:OffloadedCache",
            offers={"layout:bhsd", "uniform", "rewind"},
            rank=70,
            capabilities=_CAPABILITIES,
        ),
    ]
