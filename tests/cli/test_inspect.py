from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modelrig.cli import main
from modelrig.planning.pipeline import make_plan


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_counts_what_the_checkpoint_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inspect(capsys, "tiny", "--json")
    document, plan = json.loads(out), make_plan("tiny")
    assert (0, "") == (code, err)
    assert (len(plan.catalog.entries), plan.catalog.total_bytes) == (document["tensors"], document["bytes"])
    assert plan.num_parameters == document["architecture"]["parameters"]
    assert [{"dtype": "bfloat16", "tensors": 29, "elements": document["elements"], "bytes": document["bytes"]}] == document[
        "dtypes"
    ]
    assert "llama" == document["config"]["model_type"]


def test_inspect_prints_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inspect(capsys, "tiny")
    assert (0, "") == (code, err)
    assert "model.safetensors" in out
    assert "bfloat16" in out


def test_inspect_shows_a_checkpoint_that_no_architecture_knows(
    capsys: pytest.CaptureFixture[str], edited_checkpoint: Callable[..., Path]
) -> None:
    code, out, _ = inspect(capsys, edited_checkpoint(model_type="unheard_of"), "--json")
    document = json.loads(out)
    assert (0, None) == (code, document["architecture"])
    assert any("CF-ARCH" in note for note in document["notes"])


def test_inspect_does_without_a_config(capsys: pytest.CaptureFixture[str], edited_checkpoint: Callable[..., Path]) -> None:
    folder = edited_checkpoint()
    (folder / "config.json").unlink()
    code, out, _ = inspect(capsys, folder, "--json")
    assert (0, {}) == (code, json.loads(out)["config"])


def test_inspect_and_plan_take_a_variant(capsys: pytest.CaptureFixture[str], edited_checkpoint: Callable[..., Path]) -> None:
    folder = edited_checkpoint()
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    for command in ("inspect", "plan"):
        assert 1 == main([command, str(folder)])
        assert "--variant fp16" in capsys.readouterr().err
        assert 0 == main([command, str(folder), "--variant", "fp16", "--json"])
        document = json.loads(capsys.readouterr().out)
    assert {"value": "fp16", "origin": "argument"} == document["request"]["variant"]
    assert 2 == main(["inspect", str(folder), "--variant", "../x"])
    assert "RQ-VALUE" in capsys.readouterr().err


def test_inspect_of_nothing_is_one_typed_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = inspect(capsys, tmp_path)
    assert (1, "") == (code, out)
    assert "SR-FORMAT" in err


def test_inspect_counts_what_two_names_share_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    shared = torch.zeros(7, 5)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(3, dtype=torch.float16)}, tmp_path / "pytorch_model.bin")
    code, out, _ = inspect(capsys, tmp_path, "--json")
    document = json.loads(out)
    assert (0, 3, 38, 146) == (code, document["tensors"], document["elements"], document["bytes"])
    assert [["a", "b"]] == document["ties"]
    assert [
        {"dtype": "float32", "tensors": 2, "elements": 35, "bytes": 140},
        {"dtype": "float16", "tensors": 1, "elements": 3, "bytes": 6},
    ] == document["dtypes"]
