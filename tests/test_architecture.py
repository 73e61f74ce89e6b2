"""What the design says about the structure of the code. `make check` holds the direction of imports; this holds the rest."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from modelrig.components import KINDS, NOTHING_TO_PLAN, PLANNED
from modelrig.hookspecs import ENTRY_POINT_GROUP
from modelrig.registry import current

ROOT = Path(__file__).parents[1]
CORE, PLUGINS = ROOT / "core/modelrig", ROOT / "plugins/modelrig_plugins"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MOST_LINES = 450
#: files that may be longer, and why
LONG_FILES = {"core/modelrig/components.py": (960, "an author of parts finds all there is to implement in one file")}

#: strings in decisions of core that are spelt like a component, and what they are
NO_COMPONENTS = {
    ("checkpoint/rope.py", "dynamic"): "a rope_type of config.json",
}
#: the only files that may import by name, and what
IMPORTERS = {
    "__init__.py": "the homes of public names, from a table",
    "cli/__init__.py": "the module of a command, from a table",
    "registry/ledger.py": "what the descriptor of an installed component names",
    "registry/guard.py": "replaces the import functions while plugins register",
}
#: calls that would run what data says
RUNS_CODE = {"eval", "exec", "__import__", "import_module", "find_loader", "run_path", "run_module"}
#: packages of core that work without torch
TORCH_FREE = ("registry", "checkpoint", "planning", "cli")


def parsed(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(folder.rglob("*.py")):
        yield str(file.relative_to(folder)), ast.parse(file.read_text(encoding="utf-8"))


def component_names() -> set[str]:
    ours = [one for kind in KINDS for one in current().components(kind) if one.is_ours]
    return {name for one in ours for name in (one.name, one.id, one.descriptor.implementation, one.descriptor.planner)} - {
        NOTHING_TO_PLAN
    }


def deciding_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, string) of every literal that is compared, looked up, or matched."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in filter(None, parts):
            inner = [part] if isinstance(part, ast.Constant) else getattr(part, "elts", [])
            for one in inner:
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield one.lineno, one.value


def test_core_decides_nothing_by_the_name_of_a_component() -> None:
    names = component_names()
    found = {(file, text): line for file, tree in parsed(CORE) for line, text in deciding_strings(tree) if text in names}
    assert {} == {place: line for place, line in found.items() if place not in NO_COMPONENTS}
    assert set(NO_COMPONENTS) == set(found), "an exception is no longer needed"


@pytest.mark.parametrize(
    "code",
    ['if name == "static": pass', 'x in ("static", "y")', 'x = {"static": 1}', 'y["static"]', 'match x:\n  case "static": pass'],
)
def test_every_way_to_decide_by_a_name_is_seen(code: str) -> None:
    assert "static" in {text for _, text in deciding_strings(ast.parse(code))}


def test_core_imports_no_plugin() -> None:
    for file, tree in parsed(CORE):
        assert not any(name.startswith("modelrig_plugins") for name in imported(tree)), file
        assert not any("modelrig_plugins" in text for _, text in deciding_strings(tree)), file


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Names of modules that are imported with this one: not in functions, and not for type checkers."""
    return imported(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))


def test_planning_registry_checkpoint_and_commands_import_no_torch() -> None:
    for file, tree in parsed(CORE):
        if "/" not in file or file.split("/")[0] in TORCH_FREE:
            assert "torch" not in {name.partition(".")[0] for name in imported_at_once(tree)}, file


def test_pluggy_stays_where_plugins_are_found() -> None:
    users = {file for file, tree in parsed(CORE) if "pluggy" in imported(tree)} | {
        f"plugins: {file}" for file, tree in parsed(PLUGINS) if "pluggy" in imported(tree)
    }
    assert {"hookspecs.py", "registry/checks.py"} == users


def test_nothing_runs_code_that_data_names() -> None:
    for folder in (CORE, PLUGINS):
        for file, tree in parsed(folder):
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr != "eval"}
            allowed = folder == CORE and file in IMPORTERS
            assert allowed or not used & RUNS_CODE, file
            assert not {"pickle", "marshal", "shelve", "dill"} & set(imported(tree)), file


def test_each_import_root_holds_one_package() -> None:
    for root, package in (("core", "modelrig"), ("plugins", "modelrig_plugins")):
        assert [package] == [path.name for path in (ROOT / root).iterdir() if path.name != "__pycache__"]
        assert (ROOT / root / package / "py.typed").is_file()


def test_the_installed_entry_points_are_those_of_the_project() -> None:
    written = PROJECT["project"]["entry-points"][ENTRY_POINT_GROUP]
    installed = {
        point.name: point.value for point in metadata.distribution("modelrig").entry_points if point.group == ENTRY_POINT_GROUP
    }
    assert written == installed, "install again: pip install --editable ."


def test_there_is_one_plugin_for_each_kind_of_a_plan() -> None:
    assert {kind: f"modelrig_plugins.{kind}" for kind in PLANNED} == PROJECT["project"]["entry-points"][ENTRY_POINT_GROUP]


def test_the_wheel_holds_both_packages_and_nothing_else() -> None:
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    expected = {
        str(file.relative_to(package.parent))
        for package in (CORE, PLUGINS)
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert expected == files
    assert {"modelrig/py.typed", "modelrig_plugins/sources/bundled_models/tiny/model.safetensors"} <= files


@pytest.mark.parametrize("folder", [CORE, PLUGINS], ids=["core", "plugins"])
def test_files_can_be_read_in_one_sitting(folder: Path) -> None:
    for file in folder.rglob("*.py"):
        name = str(file.relative_to(ROOT))
        limit, _ = LONG_FILES.get(name, (MOST_LINES, ""))
        assert len(file.read_text(encoding="utf-8").splitlines()) <= limit, f"{name} is probably two things"
