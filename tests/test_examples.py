"""The examples run as they are, and stay short."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)


@every_example
def test_it_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()  # whoever runs an example runs nothing before it: shapes that other tests compiled make more graphs
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert [] == list(tmp_path.iterdir())


@every_example
def test_it_is_short_and_says_what_it_shows_needs_and_takes(example: Path) -> None:
    text = example.read_text()
    assert text.count("\n") < 60
    assert re.search(r"^Shows: .+ · Needs: .+ · Seconds: \d+$", ast.get_docstring(ast.parse(text)) or "", re.M)


def test_they_are_numbered_without_a_gap_and_listed() -> None:
    assert [f"{number:02}" for number in range(1, len(EXAMPLES) + 1)] == [example.name[:2] for example in EXAMPLES]
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\)", (ROOT / "examples/README.md").read_text(), re.M)
    assert [example.name for example in EXAMPLES] == listed
