"""When the kernels of the package flash-attn can serve: by its documentation, and by a trial in a child process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from modelrig.components import Reason
from modelrig.planning.needs import AttentionNeed
from modelrig.planning.probes import Finding
from modelrig_plugins.attention.probing import attention_probe

PACKAGE = "flash-attn"
INSTALL = "pip install flash-attn --no-build-isolation"
LARGEST_DIM = 256
LEAST_CAPABILITY = (8, 0)  # Ampere


class FlashAttention2Planner:
    @staticmethod
    def check(need: AttentionNeed, options: Any) -> Iterator[Reason]:  # noqa: ARG004 - protocol
        capability = None if need.gpu is None else need.gpu.capability
        if capability is not None and capability < LEAST_CAPABILITY:
            here, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
            assert need.gpu is not None
            yield Reason("attention.capability", f"needs compute capability {least}; {need.gpu.name} has {here}")
            return
        wide = sorted({spec.value_dim for spec in need.layers if spec.value_dim > LARGEST_DIM})
        if wide:
            yield Reason("attention.value_dim", f"value_dim {', '.join(map(str, wide))} is more than {LARGEST_DIM}")
            return
        found = _tried(need)
        if found is not None and (problem := found.problem or (found.found or {}).get("error")):
            yield Reason("attention.probe", f"{_versions(found)} cannot be used on {_place(need)}: {problem}", INSTALL)

    @staticmethod
    def notes(need: AttentionNeed, options: Any) -> Iterable[str]:  # noqa: ARG004 - protocol
        found = _tried(need)
        if found is None:
            yield f"whether {PACKAGE} works on {_place(need)} is unverified"
        else:
            yield f"{_versions(found)} was tried on {_place(need)} and computes what eager does"


def _tried(need: AttentionNeed) -> Finding | None:
    return need.probe(attention_probe("flash_attention_2", need, {}, packages=("torch", PACKAGE)))


def _versions(found: Finding) -> str:
    """The package and the torch it was built for, or should have been."""
    seen = (found.found or {}).get("versions") or {}
    return f"{PACKAGE} {seen.get(PACKAGE) or ''}".strip() + (f" with torch {seen['torch']}" if seen.get("torch") else "")


def _place(need: AttentionNeed) -> str:
    return need.gpu.name if need.gpu is not None else need.device
