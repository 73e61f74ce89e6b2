"""What the compiler needs of the machine, and what it compiles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from attrs import evolve, frozen

from modelrig.components import Reason
from modelrig.planning.needs import CompilerNeed

SCOPES = ("auto", "block", "step")


@frozen
class InductorOptions:
    """`scope`: what is compiled as one graph. `block`: one decoder block, which serves for all that are alike (seconds, on CPU);
    `step`: the whole step (longer by the number of layers); `auto`: block on CPU, step on GPUs."""

    scope: str = "auto"


class InductorPlanner:
    Options = InductorOptions

    @staticmethod
    def check(need: CompilerNeed, options: InductorOptions) -> Iterable[Reason]:
        if options.scope not in SCOPES:
            yield Reason("compiler.scope", f"there is no scope {options.scope!r}; accepted is {', '.join(SCOPES)}")
        elif options.scope == "block" and need.device != "cpu":
            text = f"scope block is for the CPU: on {need.device} the whole step is recorded as one graph"
            yield Reason("compiler.scope", text, "set compiler.scope to 'step' or leave it out")
        if not need.generates:
            yield Reason(
                "compiler.generates", "compiles the short steps of generation, and this model is an encoder, which has none"
            )
        if need.streamed:
            origin = need.origins.get("streamed", "the device map")
            text = f"cannot compile for weights that are brought from cpu or disk for each step, as this placement does ({origin})"
            yield Reason("compiler.streams", text)
        if find_compiler() is None:
            asked = os.environ.get("CXX")
            text = f"CXX is {asked!r}, which is not found" if asked else "there is no g++ or clang++ on the path"
            yield Reason("compiler.cxx", f"needs a C++ compiler, and {text}", "install g++, or set CXX")

    @staticmethod
    def settle(need: CompilerNeed, options: InductorOptions) -> InductorOptions:
        if options.scope != "auto":
            return options
        return evolve(options, scope="block" if need.device == "cpu" else "step")


def find_compiler() -> str | None:
    """The C++ compiler that inductor would use: `CXX`, or g++ or clang++ on the path."""
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else shutil.which("g++") or shutil.which("clang++")
