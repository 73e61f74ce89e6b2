"""Where torch can compile flex_attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from modelrig.components import Reason
from modelrig.planning.needs import AttentionNeed
from modelrig.planning.probes import Finding
from modelrig_plugins.attention.probing import attention_probe


class FlexPlanner:
    @staticmethod
    def check(need: AttentionNeed, options: Any) -> Iterator[Reason]:  # noqa: ARG004 - protocol
        """Uncompiled, flex_attention keeps every score in memory and is slow; that is never done instead."""
        if need.device == "cpu":
            if need.lacks_cpp is not None:
                text = f"is compiled on the machine it runs on, and {need.lacks_cpp}"
                yield Reason(
                    "attention.compiler", text, "install a C++ compiler and Python's headers (apt install g++ python3-dev)"
                )
            if "avx2" not in need.cpu_flags:
                yield Reason("attention.cpu_flags", "its kernel needs a CPU with the flag avx2")
            return
        found = _tried(need)
        if found is not None and (problem := found.problem or (found.found or {}).get("error")):
            yield Reason("attention.probe", f"a trial on {need.gpu.name if need.gpu else need.device} failed: {problem}")

    @staticmethod
    def notes(need: AttentionNeed, options: Any) -> Iterable[str]:  # noqa: ARG004 - protocol
        yield "each form of step (a prompt, a single token, padded or not) is compiled at its first use, which takes seconds"
        if need.device != "cpu" and _tried(need) is None:
            yield f"whether it works on {need.device} is unverified"


def _tried(need: AttentionNeed) -> Finding | None:
    return need.probe(attention_probe("flex", need, {}, packages=("torch", "triton")))
