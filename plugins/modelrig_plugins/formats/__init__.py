"""Formats of tensor files."""

from modelrig.components import Format
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_formats() -> list[Format]:
    return [
        Format(
            name="safetensors",
            summary="safetensors files, one or sharded with an index, as Hugging Face lays them out",
            planner="modelrig_plugins.formats.safetensors:SafetensorsPlanner",
            implementation="modelrig_plugins.formats.safetensors_module:SafetensorsReader",
            rank=10,
        ),
        Format(
            name="pytorch_bin",
            summary="the .bin files of torch.save, one or sharded with an index; read without running the pickle in them",
            planner="modelrig_plugins.formats.pytorch_bin:PytorchBinPlanner",
            implementation="modelrig_plugins.formats.pytorch_bin_module:PytorchBinReader",
            yields_to={"safetensors"},
            rank=20,
        ),
    ]
