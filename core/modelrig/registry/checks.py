"""What a plugin must be: its API version, its hooks, and the descriptors they return. Everything found wrong is told at once."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import pluggy

from modelrig import hookspecs
from modelrig.components import (
    API_VERSION,
    DESCRIPTORS,
    KINDS,
    PLANNED,
    AttentionCapabilities,
    CacheCapabilities,
    CompilerCapabilities,
    Component,
    DecoderCapabilities,
    QuantizerCapabilities,
)
from modelrig.errors import nearest, quoted

from .ledger import cause

HOOKS = {f"modelrig_{kind}": kind for kind in KINDS}
CAPABILITIES: dict[str, type] = {
    "quantizers": QuantizerCapabilities,
    "attention": AttentionCapabilities,
    "caches": CacheCapabilities,
    "decoders": DecoderCapabilities,
    "compilers": CompilerCapabilities,
}
MAX_COMPONENTS = 1000  # of one hook: a generator that never ends must not hang the listing
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
IMPORT_STRING = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class RejectedError(Exception):
    """A plugin cannot be used: the state its row gets, the code of asking for it, and why."""

    def __init__(self, state: str, code: str, reason: str) -> None:
        self.state, self.code, self.reason = state, code, reason
        super().__init__(reason)


def check_api(plugin: object) -> tuple[str, str | None]:
    """The API version a plugin states, and a note if it is newer than ours. Raises `RejectedError`."""
    stated = getattr(plugin, "MODELRIG_API", None)
    if stated is None:
        raise RejectedError(
            "incompatible", "PL-API", f'it does not state MODELRIG_API (this is API {API_VERSION}: MODELRIG_API = "{API_VERSION}")'
        )
    if not isinstance(stated, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", stated):
        raise RejectedError(
            "incompatible", "PL-API", f'MODELRIG_API is {quoted(stated)}; it must be a string such as "{API_VERSION}"'
        )
    (major, minor), (our_major, our_minor) = ([int(part) for part in version.split(".")] for version in (stated, API_VERSION))
    if major != our_major:
        raise RejectedError("incompatible", "PL-API", f"it was made for plugin API {stated}; this modelrig has {API_VERSION}")
    return stated, f"made for API {stated}, newer than {API_VERSION}" if minor > our_minor else None


def collect(plugin: object) -> list[Component]:
    """Call the plugin's hooks and check what they return. Raises `RejectedError`.

    The plugin is registered with a manager of its own, so one that fails leaves nothing behind, and no hook of another
    plugin runs.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name="plugin")
    except pluggy.PluginValidationError as error:
        text = " ".join(str(error).removeprefix("Plugin 'plugin'").split())
        raise RejectedError("broken", "PL-SPEC", f"wrong hook signature: {text}") from error
    implemented = _check_hooks(manager, plugin)
    found = [component for hook in implemented for component in _call(manager, hook)]
    problems = [problem for hook, item in found for problem in check_descriptor(hook, item)]
    if not problems:
        names = [(item.kind, item.name) for _, item in found]
        problems = [
            f"modelrig_{kind} returns two components called {name!r}"
            for kind, name in sorted({n for n in names if names.count(n) > 1})
        ]
    if problems:
        raise RejectedError(
            "broken", "PL-SPEC", "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        )
    return [item for _, item in found]


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> list[str]:
    """The names of the hooks the plugin implements, in the order of the kinds."""
    problems, implemented = [], set()
    for caller in manager.get_hookcallers(plugin) or []:
        implementations = caller.get_hookimpls()
        if caller.name in HOOKS:
            implemented.add(caller.name)
            if any(implementation.wrapper or implementation.hookwrapper for implementation in implementations):
                problems.append(f"{caller.name} is declared as a wrapper, but it collects")
        elif not all(implementation.optionalhook for implementation in implementations):
            problems.append(f"there is no hook {caller.name!r}{nearest(caller.name, HOOKS)}")
    unmarked = [hook for hook in HOOKS if hook not in implemented and callable(getattr(plugin, hook, None))]
    problems += [f"{hook} lacks the decorator @hookimpl" for hook in unmarked]
    if problems:
        raise RejectedError("broken", "PL-SPEC", "; ".join(problems))
    return [hook for hook in HOOKS if hook in implemented]


def _call(manager: pluggy.PluginManager, hook: str) -> list[tuple[str, Any]]:
    caller = getattr(manager.hook, hook)
    items: list[tuple[str, Any]] = []
    try:
        results = caller()
        # pluggy leaves out results that are None
        if len(results) < len(caller.get_hookimpls()):
            raise RejectedError("broken", "PL-HOOK", f"{hook} returned None; it must return its descriptors (is a return missing?)")
        for result in results:
            if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
                raise RejectedError(
                    "broken", "PL-HOOK", f"{hook} returned {type(result).__name__}; it must return an iterable of descriptors"
                )
            items += [(hook, item) for item in islice(result, MAX_COMPONENTS + 1)]
    except (RejectedError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RejectedError("broken", "PL-HOOK", f"{hook} raised {cause(error)}") from error
    if len(items) > MAX_COMPONENTS:
        raise RejectedError("broken", "PL-HOOK", f"{hook} returns more than {MAX_COMPONENTS} components")
    return items


def check_descriptor(hook: str, item: object) -> list[str]:
    """Everything wrong with one thing a hook returned, each problem a sentence that names hook, component and field."""
    expected = DESCRIPTORS[HOOKS[hook]]
    if not isinstance(item, expected):
        seen = quoted(item) if item is None or isinstance(item, str) else type(item).__name__
        return [f"{hook} returned {seen}, not {expected.__name__}"]
    values = {key: getattr(item, key) for key in RULES if hasattr(item, key)}
    wrong = [key for key, value in values.items() if not _follows(key, value, item.kind)]
    return [f"{hook}, component {quoted(item.name)}: {key} is {quoted(values[key])}; {RULES[key][0]}" for key in wrong]


def _follows(key: str, value: Any, kind: str) -> bool:
    if key == "capabilities":
        return isinstance(value, CAPABILITIES[kind])
    return bool(RULES[key][1](value))


def _is_import_string(value: object) -> bool:
    return isinstance(value, str) and IMPORT_STRING.fullmatch(value) is not None


def _are_strings(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and value for value in values)


def _is_requirement(text: object) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return isinstance(text, str) and bool(Requirement(text))
    except InvalidRequirement:
        return False


#: field → what is accepted, and its test
RULES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "name": (
        "it must be lower-case letters, digits and underscores, and begin with a letter or digit",
        lambda value: isinstance(value, str) and NAME.fullmatch(value),
    ),
    "summary": ("it must say in a line what the component is", lambda value: isinstance(value, str) and value.strip()),
    "planner": ('it must be an import string such as "my_package.module:Attribute"', _is_import_string),
    "implementation": ('it must be an import string such as "my_package.module:Attribute"', _is_import_string),
    "requires": (
        'it must be a tuple of requirement specifiers such as ("some-package>=1.2",)',
        lambda value: isinstance(value, tuple) and all(map(_is_requirement, value)),
    ),
    "install": ("it must be a command, or None", lambda value: value is None or (isinstance(value, str) and value.strip())),
    "offers": ("it must be a set of strings", _are_strings),
    "needs": (
        f"it must map kinds ({', '.join(PLANNED)}) to sets of strings",
        lambda value: all(kind in PLANNED and _are_strings(tokens) for kind, tokens in value.items()),
    ),
    "rank": ("it must be a whole number", lambda value: type(value) is int),
    "experimental": ("it must be True or False", lambda value: isinstance(value, bool)),
    "plans_with_torch": ("it must be True or False", lambda value: isinstance(value, bool)),
    "model_types": ("it must name at least one model_type", lambda value: value and _are_strings(value)),
    "languages": (
        "it must name at least one language, in lower-case letters, digits and underscores, and none 'name'",
        lambda value: value and all(isinstance(one, str) and NAME.fullmatch(one) and one != "name" for one in value),
    ),
    "capabilities": ("it must be an instance of the capabilities class of its kind", lambda value: value is not None),
}


def unmet(component: Component) -> str | None:
    """Why a component is unavailable: the requirements that are not met, and the command to install them. None if all are."""
    if not component.requires:
        return None
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    missing: dict[str, str] = {}  # requirement without its marker → what is there instead
    for requirement in map(Requirement, component.requires):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        requirement.marker = None
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing[str(requirement)] = "not installed"
            continue
        if not _satisfies(requirement, installed):
            missing[str(requirement)] = f"installed is {installed}"
    if not missing:
        return None
    needs = " and ".join(f"{requirement} ({there})" for requirement, there in missing.items())
    return f"it needs {needs}; run: {component.install or shlex.join(['pip', 'install', *missing])}"


def _satisfies(requirement: Any, installed: str | None) -> bool:
    from packaging.version import InvalidVersion

    try:
        return installed is not None and requirement.specifier.contains(installed, prereleases=True)
    except InvalidVersion:
        return False
