"""The devices of a machine on which a request may put weights, and those it may run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import Factory, frozen

from modelrig.errors import PlanError, RequestError
from modelrig.planning import values
from modelrig.planning.environment import Environment, Gpu, read_environment
from modelrig.planning.memory import limits
from modelrig.planning.request import ARGUMENT, Request
from modelrig.planning.units import CPU, DISK, Device, is_gpu
from modelrig.planning.values import AUTO, LISTED


@frozen
class Placement:
    """The device that runs (`"cpu"`, `"cuda:0"`) and why it is considered.

    `strategy` says how weights are spread from there on; None if all of them are there, or if `device_map` says where they are.
    """

    device: str
    why: str
    strategy: str | None = None
    device_map: Mapping[str, str] = Factory(dict)


def place(request: Request, environment: Environment) -> tuple[Placement, ...]:
    """The devices to run on to try, in order: by a strategy the GPUs that torch can use, then the CPU; else what is asked for.

    Raises:
        PlanError: PN-DEVICE for a device that is not there.
    """
    wanted, origin = request.device_map, request.origin("device_map")
    usable = usable_gpus(request, environment)
    if isinstance(wanted, Mapping):
        _require(tuple(dict.fromkeys(wanted.values())), request, environment)
        main = next(filter(is_gpu, wanted.values()), CPU)
        return (Placement(main, f"runs the map asked for by {origin}", device_map=wanted),)
    if wanted in values.STRATEGIES:
        how = AUTO if wanted == AUTO else f"{wanted}, asked for by {origin}"
        first = tuple(Placement(gpu.device, f"{how}: the first GPU, {gpu.name}", wanted) for gpu in usable[:1])
        return (*first, Placement(CPU, f"{how}: {_why_no_gpu(environment)}", wanted))
    if wanted == DISK:
        return (Placement(CPU, f"runs what is on disk, as asked for by {origin}", device_map={"": DISK}),)
    device = values.numbered(wanted)
    _require((device,), request, environment, wanted)
    return (Placement(device, f"asked for by {origin}"),)


def usable_gpus(request: Request, environment: Environment) -> tuple[Gpu, ...]:
    """The GPUs that torch can use and, where `max_memory` names any, that it names with room."""
    gpus = environment.gpus if environment.torch_cuda else ()
    named = {device: size for device, size in request.max_memory.items() if device and is_gpu(device)}
    return tuple(gpu for gpu in gpus if (named.get(gpu.device) if named else True))


def notes_on_limits(request: Request, environment: Environment) -> list[str]:
    """Devices that `max_memory` names and that are not there. Configs are carried from machine to machine, so it is no error."""
    there = {gpu.device for gpu in environment.gpus} if environment.torch_cuda else set()
    absent = [device for device in request.max_memory if device and is_gpu(device) and device not in there]
    return [f"max_memory ({request.origin('max_memory')}) names {device}, which is not there" for device in absent]


def tiers(request: Request, environment: Environment, *, gpus: bool = True) -> tuple[Device, ...]:
    """Where weights may be, the fastest first: GPUs, the CPU, the disk; each with its tightest limit."""
    names = [gpu.device for gpu in usable_gpus(request, environment)] if gpus else []
    found = []
    for name in (*names, CPU, DISK):
        tightest = min(limits(name, request, environment), key=lambda limit: limit.bytes, default=None)
        found.append(Device(name=name) if tightest is None else Device(name=name, limit=tightest.bytes, why=tightest.why))
    return tuple(found)


def devices_of_machine(max_memory: Any = None, environment: Environment | None = None) -> tuple[Device, ...]:
    """`tiers` for callers without a request: `max_memory` as a request has it. Raises `RequestError` (RQ-VALUE)."""
    return tiers(request_of_limits(max_memory), environment or read_environment())


def request_of_limits(max_memory: Any) -> Request:
    """A request of nothing but this `max_memory`. Raises `RequestError` (RQ-VALUE)."""
    try:
        asked = {} if max_memory is None else values.max_memory(max_memory)
    except ValueError as error:
        raise RequestError("RQ-VALUE", str(error), locus="max_memory") from error
    return Request(max_memory=asked, origins={"max_memory": ARGUMENT})


def _require(devices: Sequence[str], request: Request, environment: Environment, spelt: str | None = None) -> None:
    usable = environment.gpus if environment.torch_cuda else ()
    absent = [device for device in devices if is_gpu(device) and device not in {gpu.device for gpu in usable}]
    if absent:
        there = ", ".join(f"{gpu.device} ({gpu.name})" for gpu in usable)
        shown = ", ".join(repr(spelt or device) for device in absent[:LISTED])
        more = f" and {len(absent) - LISTED:,} more" if len(absent) > LISTED else ""
        reason = f"{shown}{more} (asked for by {request.origin('device_map')}) {'is' if len(absent) == 1 else 'are'} not there: "
        raise PlanError("PN-DEVICE", reason + (f"there is {there}" if usable else _why_no_gpu(environment)), locus="device_map")


def _why_no_gpu(environment: Environment) -> str:
    hidden = f", {environment.hidden_gpus} hidden by CUDA_VISIBLE_DEVICES" if environment.hidden_gpus else ""
    if environment.gpus and not environment.torch_cuda:
        return f"the installed torch {environment.torch} is built without GPU support ({environment.gpus[0].name} is there)"
    return f"no GPU is visible{hidden}" if not environment.gpus else "the GPU does not serve"
