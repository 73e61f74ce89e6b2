"""Rules that every component of ours keeps, read from the real registry."""

from __future__ import annotations

import json

import pytest

from distributions import run_python
from modelrig.components import KINDS, NOTHING_TO_PLAN, PLANNED
from modelrig.registry import Registered, Registry
from modelrig.registry.discovery import discover

OURS = [component for kind in KINDS for component in Registry(discover({})).components(kind) if component.is_ours]

every_component = pytest.mark.parametrize("component", OURS, ids=[component.id for component in OURS])

PLAN_WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from modelrig.components import KINDS
from modelrig.errors import PluginError
from modelrig.registry import current
outcome = {}
for component in (one for kind in KINDS for one in current().components(kind) if one.is_ours):
    try:
        outcome[component.id] = "ok" if component.planner() is not None else "None"
    except PluginError as error:
        outcome[component.id] = str(error)
print(json.dumps(outcome))
"""


def test_every_kind_of_a_plan_has_a_component_of_ours_and_every_plugin_of_ours_is_a_kind():
    assert list(PLANNED) == list(dict.fromkeys(component.kind for component in OURS))
    assert {component.kind for component in OURS} == {component.plugin for component in OURS}


def test_every_planner_is_imported_with_torch_blocked():
    done = run_python("-c", PLAN_WITHOUT_TORCH)
    assert "" == done.stderr
    assert {component.id: "ok" for component in OURS} == json.loads(done.stdout)


@every_component
def test_no_component_of_ours_plans_with_torch(component: Registered):
    assert not component.descriptor.plans_with_torch


@every_component
def test_a_component_is_called_as_its_file_or_is_a_variant_of_it(component: Registered):
    descriptor = component.descriptor
    planned = descriptor.planner != NOTHING_TO_PLAN
    folder, _, stem = (descriptor.planner if planned else descriptor.implementation).partition(":")[0].rpartition(".")
    assert f"modelrig_plugins.{component.kind}" == folder == descriptor.implementation.partition(":")[0].rpartition(".")[0]
    assert component.name == stem or component.name.startswith(f"{stem}_")


@every_component
def test_an_active_component_can_be_imported(component: Registered):
    if component.state == "active":
        assert component.implementation() is not None
    else:
        assert component.reason
