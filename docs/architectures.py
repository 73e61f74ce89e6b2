"""Run the parity tests and keep what they found in docs/architectures.json, of which docs/generate.py makes a page: `make docs`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOUND = Path(__file__).with_suffix(".json")


class Collector:
    """A pytest plugin: architecture → check → how many of its tests passed, were skipped, failed; and the figures they recorded."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
        self.figures: dict[str, dict[str, float]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        said = dict(report.user_properties)
        name = said.get("architecture")
        if name is None:
            return
        check = report.nodeid.partition("::")[2].partition("[")[0]
        self.counts[str(name)][check][report.outcome] += 1
        for figure in ("error", "half"):
            if figure in said:
                value = float(said[figure])  # type: ignore[arg-type]
                self.figures[str(name)][figure] = max(value, self.figures[str(name)].get(figure, 0.0))

    def document(self) -> dict[str, Any]:
        return {
            "versions": {package: version(package).partition("+")[0] for package in ("torch", "transformers")},
            "architectures": {
                name: {"checks": {check: dict(counts) for check, counts in sorted(checks.items())}, **self.figures[name]}
                for name, checks in sorted(self.counts.items())
            },
        }


def main() -> int:
    collector = Collector()
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests/parity"), "--rootdir", str(ROOT)], plugins=[collector])
    FOUND.write_text(json.dumps(collector.document(), indent=1) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
