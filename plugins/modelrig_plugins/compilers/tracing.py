"""A function of tensors, traced with torch.export and compiled by AOTInductor into a shared library.

Only this file imports `torch.export` and inductor, and only when something has to be compiled: with them torch._dynamo comes, whose
import alone takes a second.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from modelrig.modules.compiling import exporting

#: what differs from inductor's defaults: debugging tables and a precompiled header cost more than they save in a library as small
#: as this; which vector instructions there are is known from torch, and need not be found out by compiling
SETTINGS = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
    "cpp.vec_isa_ok": True,
    "compile_threads": 1,
}
_one_at_a_time = RLock()  # inductor's settings and cache folder belong to the process


class _Root(nn.Module):
    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(tensors)


def compile_library(
    function: Callable[[Sequence[Tensor]], Tensor], examples: Sequence[Tensor], dynamic: Sequence[frozenset[int]], workplace: Path
) -> tuple[Path, tuple[int, ...]]:
    """(a shared library below `workplace`, the numbers of the inputs it takes) of `function(inputs)`, which may write to inputs.

    Args:
        examples: inputs; sizes of at least 2 where they may change.
        dynamic: for each input the dimensions whose sizes may change from call to call.
    """
    from torch._inductor import aot_compile
    from torch.export import Dim, export

    shapes = tuple(dict.fromkeys(dims, Dim.DYNAMIC) or None for dims in dynamic)
    with _one_at_a_time, torch.inference_mode(False), torch.no_grad(), _cache_in(workplace):
        inputs = tuple(one.clone() if one.is_inference() else one.detach() for one in examples)
        with exporting():
            exported = export(_Root(function), inputs, dynamic_shapes=(shapes,), strict=False)
        module: Any = exported.module(check_guards=False)
        used = _drop_unused(module, len(inputs))
        target = str(workplace / "step.wrapper.so")
        made = aot_compile(module, tuple(inputs[i] for i in used), options={**SETTINGS, "aot_inductor.output_path": target})
    return Path(str(made)), used


def _drop_unused(module: Any, count: int) -> tuple[int, ...]:
    """Leave in the graph only the inputs that something comes of; returns their numbers."""
    graph = module.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    assert len(places) == count, "one input became several"
    used = tuple(number for number, node in enumerate(places) if node.users)
    for node in places:
        if not node.users:
            graph.erase_node(node)
    graph.set_codegen(torch.fx.graph.CodeGen())
    for name in ("_in_spec", "_out_spec"):
        module.__dict__.pop(name, None)
    module.recompile()
    return used


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let inductor put its files there: by default it shares a folder in /tmp with whoever made it first."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
