"""Which of torch's attention kernels may run, and which one does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from attrs import evolve, field, frozen

from modelrig.components import Reason
from modelrig.errors import nearest, quoted
from modelrig.planning.needs import AttentionNeed
from modelrig.planning.probes import Finding
from modelrig_plugins.attention.probing import attention_probe

KERNELS = ("flash", "efficient", "math", "cudnn")
#: what torch has for each type of device, in the order of torch's preference
KERNELS_OF = {"cpu": ("flash", "math"), "cuda": ("flash", "efficient", "math", "cudnn")}


def _names(value: Any) -> Any:
    """`"flash,efficient"` and lists as a tuple without repetitions; what is neither stays, for `check` to refuse."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(dict.fromkeys(value))
    return value


@frozen
class SdpaOptions:
    """`kernels`: those that torch may use, of flash, efficient, math and cudnn. `math` keeps every score in memory; it never runs
    unless it is named here."""

    kernels: Any = field(default=("flash", "efficient", "cudnn"), converter=_names)


class SdpaPlanner:
    Options = SdpaOptions

    @staticmethod
    def check(need: AttentionNeed, options: SdpaOptions) -> Iterator[Reason]:
        kernels, there = options.kernels, KERNELS_OF.get(need.device, ())
        if not isinstance(kernels, tuple) or not kernels:
            yield Reason("attention.kernels", f"kernels {quoted(kernels)}: a list of {', '.join(KERNELS)} is accepted")
            return
        unknown = [name for name in kernels if name not in KERNELS]
        for name in unknown:
            yield Reason(
                "attention.kernels", f"there is no kernel {quoted(name)}{nearest(name, KERNELS)}; there are {', '.join(KERNELS)}"
            )
        if unknown:
            return
        if not set(kernels) & set(there):
            text = f"none of the kernels {', '.join(kernels)} runs on {need.device}; {' and '.join(there)} do"
            yield Reason("attention.kernels", text)
            return
        found = _probed(need, options)
        if found is not None and found.problem is None and (found.found or {}).get("error"):
            yield Reason("attention.probe", f"a trial on {_gpu(need)} failed: {(found.found or {})['error']}")

    @staticmethod
    def settle(need: AttentionNeed, options: SdpaOptions) -> SdpaOptions:
        """On CPU the one kernel that runs. There flash takes every mask, grouped heads and all dtypes; its one demand, keys and
        values of one size, is met by padding."""
        if need.device != "cpu":
            return evolve(options, kernels=tuple(name for name in options.kernels if name in KERNELS_OF[need.device]))
        return evolve(options, kernels=next((name,) for name in KERNELS_OF["cpu"] if name in options.kernels))

    @staticmethod
    def notes(need: AttentionNeed, options: SdpaOptions) -> Iterable[str]:
        if len(options.kernels) == 1:
            return
        found = _probed(need, options)
        if found is not None and found.found is not None and found.found.get("kernels"):
            seen = "; ".join(f"{name} by {kernel}" for name, kernel in found.found["kernels"].items())
            yield f"a trial on {_gpu(need)} computed {seen}"
        else:
            why = f" ({found.problem})" if found is not None and found.problem else ""
            yield (
                f"which of the kernels {', '.join(options.kernels)} runs is unverified{why}; it is looked at while generating, "
                "and any other is an error"
            )


def _probed(need: AttentionNeed, options: SdpaOptions) -> Finding | None:
    if need.device == "cpu":  # known without trying
        return None
    return need.probe(attention_probe("sdpa", need, {"kernels": list(options.kernels)}, packages=("torch",)))


def _gpu(need: AttentionNeed) -> str:
    return need.gpu.name if need.gpu is not None else need.device
