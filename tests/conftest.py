"""Fixtures that many tests share: one thread (two collapse when another process holds a core), and real tiny checkpoints."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_llama


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith("MODELRIG_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.fixture
def edited_checkpoint(llama_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited_checkpoint(key=value)`: a copy of the tiny checkpoint with config keys changed, or removed where the value is ..."""

    def edit(**changes: Any) -> Path:
        for file in llama_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        for key, value in changes.items():
            if value is ...:
                config.pop(key, None)
            else:
                config[key] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return edit
