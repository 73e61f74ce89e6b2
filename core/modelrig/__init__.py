"""Modelrig: load language models and generate with them out of exchangeable parts.

Names are imported when they are first used: `import modelrig` itself imports neither torch nor a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelrig import errors
    from modelrig.loading.dispatch import load_and_dispatch
    from modelrig.loading.empty import empty_weights
    from modelrig.loading.into_module import load_checkpoint
    from modelrig.model import Model, Plan, load, plan
    from modelrig.registry import plugins, register
    from modelrig.saving.convert import convert

__version__ = "0.1.0"

#: public name → the module it lives in
_HOMES = {
    "Model": "modelrig.model",
    "Plan": "modelrig.model",
    "convert": "modelrig.saving.convert",
    "empty_weights": "modelrig.loading.empty",
    "load": "modelrig.model",
    "load_and_dispatch": "modelrig.loading.dispatch",
    "load_checkpoint": "modelrig.loading.into_module",
    "plan": "modelrig.model",
    "plugins": "modelrig.registry",
    "register": "modelrig.registry",
}

__all__ = [
    "Model",
    "Plan",
    "__version__",
    "convert",
    "empty_weights",
    "errors",
    "load",
    "load_and_dispatch",
    "load_checkpoint",
    "plan",
    "plugins",
    "register",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("modelrig.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'modelrig' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
