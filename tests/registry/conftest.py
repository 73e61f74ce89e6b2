from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributions import write_distribution
from modelrig.registry import Registry
from modelrig.registry.discovery import discover


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`install(name, modules, ...)`: a distribution on the path of this process, until the test ends."""
    before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(folder))

    def install_into(name: str, modules: dict[str, str], **more: Any) -> Path:
        return write_distribution(more.pop("folder", folder), name, modules, **more)

    yield install_into
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def discovered() -> Callable[..., Registry]:
    """`discovered(disable=(), **environment)`: a registry of its own, apart from the process's."""
    return lambda disable=(), **environment: Registry(discover(environment, disable))
