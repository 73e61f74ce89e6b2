"""Which device the model goes to. In this version a model lives on one device."""

from __future__ import annotations

from attrs import frozen

from modelrig.errors import PlanError
from modelrig.planning.environment import Environment
from modelrig.planning.request import Request
from modelrig.planning.values import AUTO


@frozen
class Placement:
    """A device with its number (`"cpu"`, `"cuda:0"`) and why it is considered."""

    device: str
    why: str


def place(request: Request, environment: Environment) -> tuple[Placement, ...]:
    """The devices to try, in order: with `auto` the first GPU that torch can use, then the CPU; else the one asked for.

    Raises:
        PlanError: PN-DEVICE for a device that is not there.
    """
    wanted, origin = request.device_map, request.origin("device_map")
    usable = environment.gpus if environment.torch_cuda else ()
    if wanted == AUTO:
        first = tuple(Placement(gpu.device, f"auto: the first GPU, {gpu.name}") for gpu in usable[:1])
        return (*first, Placement("cpu", f"auto: {_why_no_gpu(environment)}"))
    if wanted == "cpu":
        return (Placement("cpu", f"asked for by {origin}"),)
    device = "cuda:0" if wanted == "cuda" else wanted
    if device not in {gpu.device for gpu in usable}:
        there = ", ".join(f"{gpu.device} ({gpu.name})" for gpu in usable)
        reason = f"{wanted!r} (asked for by {origin}) is not there: "
        raise PlanError("PN-DEVICE", reason + (f"there is {there}" if usable else _why_no_gpu(environment)), locus="device_map")
    return (Placement(device, f"asked for by {origin}"),)


def _why_no_gpu(environment: Environment) -> str:
    hidden = f", {environment.hidden_gpus} hidden by CUDA_VISIBLE_DEVICES" if environment.hidden_gpus else ""
    if environment.gpus and not environment.torch_cuda:
        return f"the installed torch {environment.torch} is built without GPU support ({environment.gpus[0].name} is there)"
    return f"no GPU is visible{hidden}" if not environment.gpus else "the GPU does not serve"
