from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelrig.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_plan_explains_on_stdout_and_says_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "tiny")
    assert (0, "") == (code, err)
    assert "attention     sdpa" in out


def test_plan_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "plan", "tiny", "--json", "--attention", "eager", "--context", "32", "--dtype", "fp32", "--batch", "2"
    )
    document: dict[str, Any] = json.loads(out)
    assert (0, "") == (code, err)
    assert ("tiny", "eager", 32, "float32", 2) == (
        document["model"],
        document["choices"]["attention"]["component"],
        document["context"],
        document["dtype"],
        document["batch"],
    )


def test_plan_reads_another_config_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rig.toml").write_text('cache = "static"')
    code, out, _ = run(capsys, "plan", "tiny", "--json", "--config", "rig.toml", "--set", "quantizer.kernel=linear")
    document = json.loads(out)
    assert (0, "static", {"kernel": "linear"}) == (
        code,
        document["choices"]["caches"]["component"],
        document["choices"]["quantizers"]["options"],
    )


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["plan", "no-such-model"], 1, "SR-UNKNOWN"),
        (["plan", "tinny"], 1, "did you mean 'tiny'"),
        (["plan"], 2, "Missing argument"),
        (["plan", "tiny", "--atention", "x"], 2, "No such option"),
        (["plan", "tiny", "--attention", "spda"], 2, "did you mean 'sdpa'"),
        (["plan", "tiny", "--context", "many"], 2, "RQ-VALUE"),
        (["plan", "tiny", "--set", "x"], 2, "SLOT.OPTION=VALUE"),
        (["plan", "tiny", "--set", "cash.x=1"], 2, "did you mean 'cache'"),
        (["plan", "tiny", "--config", "missing.toml"], 2, "RQ-FILE"),
        (["plan", "tiny", "--device-map", "cuda:77"], 3, "PN-DEVICE"),
        (["plan", "tiny", "--max-memory", "1kB"], 3, "RL-MEM"),
    ],
)
def test_plan_fails_with_the_documented_code_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    found, out, err = run(capsys, *arguments)
    assert (code, "") == (found, out)
    assert part in err
    assert "Traceback" not in err


def test_a_list_on_the_command_line_is_an_ordered_wish(capsys: pytest.CaptureFixture[str]) -> None:
    for wish in ("missing,eager", '["missing", "eager"]', "!sdpa"):
        code, out, _ = run(capsys, "plan", "tiny", "--json", "--attention", wish)
        assert (0, "eager") == (code, json.loads(out)["choices"]["attention"]["component"])


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_torch_is_not_imported(command: str) -> None:
    code = "import sys; from modelrig.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, command, "tiny"], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
