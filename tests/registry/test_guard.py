"""No plugin imports torch while it registers, whoever imported torch before."""

from __future__ import annotations

import builtins
import importlib
import json
import sys

import pytest

from distributions import cache_plugin, run_python, write_distribution
from modelrig.registry.guard import TorchGuard, TorchRefused

WAYS = {
    "plain": "import torch",
    "submodule": "from torch.nn import functional",
    "tried": "try:\n    import torch\nexcept ImportError:\n    torch = None",
    "swallowed": "try:\n    import torch\nexcept BaseException:\n    torch = None",
    "by_name": "import importlib\nimportlib.import_module('torch')",
    "in_hook": cache_plugin("ring").replace("    return", "    import torch\n    return"),
    "in_generator": cache_plugin("ring").replace("    return [", "    import torch\n    yield from ["),
    "in_package": "import package_of_plugin.heavy",
}
ALLOWED = "import importlib.util\nassert importlib.util.find_spec('torch').origin\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    for name, source in WAYS.items():
        source = source if "MODELRIG_API" in source else source + "\n" + cache_plugin("ring")
        write_distribution(folder, name, {f"{name}_modelrig.py": source})
    for file, source in {"__init__": "", "light": "", "heavy": "from . import light\nimport torch"}.items():
        write_file = folder / "package_of_plugin" / f"{file}.py"
        write_file.parent.mkdir(exist_ok=True)
        write_file.write_text(source)
    write_distribution(folder, "asking", {"asking_modelrig.py": ALLOWED + cache_plugin("asked")})
    inside = {"packaged/__init__.py": "", "packaged/light.py": "", "packaged/plugin.py": "from packaged import light\nimport torch"}
    write_distribution(folder, "packaged", inside, entry_points={"packaged": "packaged.plugin"})
    return folder


REPORT = """
import json, sys
from modelrig.registry import current
rows = {row.plugin: [row.state, row.reason, row.traceback is not None] for row in current().rows if row.distribution != "modelrig"}
left = [name for name in sys.modules if name.partition(".")[0] == "packaged"]
import builtins, importlib
clean = "guard" not in builtins.__import__.__name__ + importlib.import_module.__name__ + repr(sys.meta_path)
print(json.dumps([rows, left, clean, "torch" in sys.modules]))
"""


@pytest.mark.parametrize("before", ["", "import torch"], ids=["torch not loaded", "torch loaded"])
def test_every_way_to_import_torch_is_refused(folder, before):
    done = run_python("-c", before + REPORT, path=[folder])
    assert "" == done.stderr
    rows, left, clean, has_torch = json.loads(done.stdout)
    expected = {name: ["broken", "imports torch while registering"] for name in [*WAYS, "packaged"]}
    assert expected == {name: seen[:2] for name, seen in rows.items() if name != "asking"}
    assert ["active", None, False] == rows["asking"]
    assert [] == left
    assert clean
    assert bool(before) == has_torch
    assert rows["plain"][2]


def test_a_listing_of_everything_leaves_torch_alone(folder):
    done = run_python("-X", "importtime", "-m", "modelrig.cli", "plugins", path=[folder], cwd=folder)
    assert 0 == done.returncode
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert [] == [name for name in imported if name.partition(".")[0] == "torch"]


def test_a_refused_plugin_can_be_imported_properly_later(folder):
    code = REPORT.replace(
        "print(", "import packaged.plugin\nprint(packaged.plugin.torch.__name__, packaged.light.__name__)\n0 and ("
    )
    done = run_python("-c", code, path=[folder])
    assert ("torch packaged.light\n", "") == (done.stdout, done.stderr)


def test_other_threads_import_torch_while_one_registers(folder):
    code = """
import threading
from modelrig.registry.guard import TorchGuard
seen = []
with TorchGuard() as guard:
    thread = threading.Thread(target=lambda: seen.append(__import__("torch").__name__))
    thread.start(); thread.join()
print(seen, guard.tripped)
"""
    done = run_python("-c", code)
    assert ("['torch'] False\n", "") == (done.stdout, done.stderr)


def test_a_relative_import_of_a_module_called_torch_is_fine(tmp_path, monkeypatch):
    (tmp_path / "relative_pack").mkdir()
    (tmp_path / "relative_pack/__init__.py").write_text("from . import torch\nfrom .torch import here")
    (tmp_path / "relative_pack/torch.py").write_text("here = 1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with TorchGuard() as guard:
        assert 1 == importlib.import_module("relative_pack").here
    assert not guard.tripped


def test_guards_nest_and_leave_everything_as_it_was():
    before = builtins.__import__, importlib.import_module, list(sys.meta_path)
    with TorchGuard(), TorchGuard(), pytest.raises(TorchRefused):
        importlib.import_module("torch")
    assert before == (builtins.__import__, importlib.import_module, sys.meta_path)


def test_what_a_plugin_put_before_the_guard_stays_and_lets_torch_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)  # any module will do
    before = builtins.__import__
    try:
        with TorchGuard():
            guarded = builtins.__import__
            builtins.__import__ = lambda *arguments: guarded(*arguments)
        assert sys is importlib.import_module("torch")
        assert sys is builtins.__import__("torch")
    finally:
        builtins.__import__ = before


def test_without_torch_installed_nothing_is_found_as_ever(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    with TorchGuard() as guard:
        assert guard.find_spec("torch", None) is None
    assert not guard.tripped
