"""Plugins and their components: discovery, isolation, the ledger, and the meaning of a name.

    registry = current()                      every plugin that is installed, each in its state
    registry.rows                             the ledger
    registry.components("caches")             all caches, in the order in which `auto` considers them
    registry.find("caches", "static")         one of them, or an error that says what is the matter

`discovery` finds and examines, `checks` says what a plugin must be, `guard` keeps torch out meanwhile, `ledger` holds the result,
`process` keeps one for this process.
"""

from .ledger import PluginRow, Provided, Registered, Registry
from .process import current, plugins, register, temporary, unregister

__all__ = ["PluginRow", "Provided", "Registered", "Registry", "current", "plugins", "register", "temporary", "unregister"]
