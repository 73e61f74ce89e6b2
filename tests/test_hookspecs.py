"""Each hook's docstring is a complete example: it runs, and what it registers is right."""

from __future__ import annotations

import inspect
import textwrap
from types import ModuleType

import pytest

from modelrig import hookspecs
from modelrig.components import DESCRIPTORS, KINDS
from modelrig.registry.checks import collect

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("modelrig_")}


def test_there_is_one_hook_per_kind():
    assert [f"modelrig_{kind}" for kind in KINDS] == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_registers_what_the_hook_collects(hook):
    _, found, example = inspect.getdoc(HOOKS[hook]).partition("Example:\n")
    assert found
    module = ModuleType("example")
    exec(textwrap.dedent(example), vars(module))
    kind = hook.removeprefix("modelrig_")
    assert [DESCRIPTORS[kind]] == [type(descriptor) for descriptor in collect(module)]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_says_what_it_returns(hook):
    kind = hook.removeprefix("modelrig_")
    assert f"Iterable[{DESCRIPTORS[kind].__name__}]" == inspect.get_annotations(HOOKS[hook])["return"]
