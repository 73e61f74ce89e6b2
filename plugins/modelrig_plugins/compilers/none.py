"""Eager execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class NoneCompiler:
    @staticmethod
    def compile(module: nn.Module, options: Any) -> Callable[..., Any]:  # noqa: ARG004 - protocol
        step: Callable[..., Any] = module.step  # type: ignore[assignment]
        return step
