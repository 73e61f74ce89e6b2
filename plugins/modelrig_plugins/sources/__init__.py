"""Places checkpoints come from."""

from modelrig.components import Source
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_sources() -> list[Source]:
    return [
        Source(
            name="local",
            summary="a folder on this machine",
            planner="modelrig_plugins.sources.local:LocalPlanner",
            implementation="modelrig_plugins.sources.local_module:LocalFetcher",
            rank=10,
        ),
        Source(
            name="bundled",
            summary="models that ship with Modelrig, by name",
            planner="modelrig_plugins.sources.bundled:BundledPlanner",
            implementation="modelrig_plugins.sources.local_module:LocalFetcher",
            rank=20,
        ),
        Source(
            name="hub",
            summary="org/name[@revision] on the Hugging Face Hub or in its cache",
            planner="modelrig_plugins.sources.hub:HubPlanner",
            implementation="modelrig_plugins.sources.hub_module:HubFetcher",
            rank=30,
        ),
    ]
