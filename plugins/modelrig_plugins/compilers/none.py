"""Eager execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NoneCompiler:
    @staticmethod
    def compile(step: Callable[..., Any], options: Any) -> Callable[..., Any]:  # noqa: ARG004 - protocol
        return step
