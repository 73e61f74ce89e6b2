"""The registry of this process: discovered once, and what calls have registered on top."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator, Sequence

from modelrig.errors import PluginError, nearest, quoted

from .discovery import ALLOW_VARIABLE, DISABLE_VARIABLE, Found, discover, examine
from .ledger import PluginRow, Registry

Key = tuple[str | None, str | None, tuple[str, ...]]

_lock = threading.RLock()
_discovered: dict[Key, list[Found]] = {}
_composed: dict[Key, Registry] = {}
_called: dict[str, tuple[object, Found]] = {}  # plugin name → what was registered by a call
_registering = False  # held under the lock, so only a plugin that is registering can see it set


def current(refresh: bool = False, disable: Sequence[str] = ()) -> Registry:
    """The registry of this process. Plugins are discovered at the first call, or again with `refresh`.

    Args:
        refresh: look again for what is installed; modules that were imported are not executed again.
        disable: names of plugins, or full ids of components, the configuration switches off.

    Raises:
        RequestError: `disable`, `MODELRIG_PLUGINS` or `MODELRIG_DISABLE` names something that is not installed (RQ-UNKNOWN).
    """
    key = (os.environ.get(ALLOW_VARIABLE), os.environ.get(DISABLE_VARIABLE), tuple(disable))
    with _alone():
        if refresh:
            importlib.invalidate_caches()
            _discovered.clear()
            _composed.clear()
        if key not in _composed:
            if key not in _discovered:
                _discovered[key] = discover(os.environ, disable)
            _composed[key] = Registry([*_discovered[key], *(found for _, found in _called.values())])
        return _composed[key]


def plugins() -> tuple[PluginRow, ...]:
    """Every plugin that is installed or registered, each in its state: the rows of `current()`."""
    return current().rows


def register(plugin: object, name: str | None = None) -> PluginRow:
    """Register a module or object with hooks, as if it were installed under the plugin name `name` (default `local`).

    The same checks hold as for an installed plugin. Registering the same object again changes nothing.

    Raises:
        PluginError: it fails a check (PL-API, PL-SPEC, PL-HOOK), or the name is taken (PL-CONFLICT).
    """
    name = "local" if name is None else name
    if not isinstance(name, str) or not name or not name.replace("-", "_").isidentifier():
        raise PluginError(
            "PL-SPEC", f"a plugin cannot be called {quoted(name)}; use letters, digits, '-' and '_'", plugin=str(name)
        )
    taken = {row.plugin for row in current().rows}
    with _alone():
        if name in _called and _called[name][0] is plugin:
            return _called[name][1][0]
        if name in taken or name in _called:
            hint = "give another name: modelrig.register(plugin, name=...)"
            raise PluginError("PL-CONFLICT", f"the plugin name {name!r} is taken", plugin=name, hint=hint)
        row, components = examine(PluginRow(id=f"local/{name}", plugin=name, distribution=None), lambda: plugin)
        if row.state not in ("active", "unavailable"):
            raise row.error()
        _called[name] = (plugin, (row, components))
        _composed.clear()
    return next(row for row in current().rows if row.id == f"local/{name}")


def unregister(name: str = "local") -> None:
    """Take back a plugin that a call registered. Raises `PluginError` (PL-UNKNOWN)."""
    with _alone():
        if name not in _called:
            raise PluginError("PL-UNKNOWN", f"no call registered a plugin {quoted(name)}{nearest(name, _called)}", plugin=name)
        del _called[name]
        _composed.clear()


@contextlib.contextmanager
def temporary(plugin: object, name: str | None = None) -> Iterator[Registry]:
    """`with temporary(plugin) as registry:` registers a plugin for the length of the block. For tests."""
    row = register(plugin, name)
    try:
        yield current()
    finally:
        unregister(row.plugin)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    global _registering
    with _lock:
        if _registering:
            raise PluginError(
                "PL-HOOK", "a plugin used the registry while it was registering; it is not complete before all have registered"
            )
        _registering = True
        try:
            yield
        finally:
            _registering = False
