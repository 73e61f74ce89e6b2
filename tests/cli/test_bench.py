"""`modelrig bench`: settings against each other and against the bandwidth, refused ones as rows; `--tune` keeps measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import modelrig
from checkpoints import write_llama
from distributions import run_python
from modelrig.cli import main
from modelrig.cli.bench import command
from modelrig.cli.options import FLAGS
from modelrig.generation import bench
from modelrig.planning.environment import read_environment
from modelrig.planning.measured import kernels_file
from modelrig.planning.pipeline import make_plan
from modelrig_plugins.quantizers import none_tuning

SMALL = ("--context", "48", "--repeat", "2")


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "MOST_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "WARM_TOKENS", 2)
    monkeypatch.setattr(none_tuning, "SECONDS", 0.01)
    monkeypatch.setattr(none_tuning, "POOL_BYTES", 1 << 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


def settings(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    done, out, _ = run(capsys, *arguments, "--json", "--quiet")
    assert code == done
    found: list[dict[str, Any]] = json.loads(out)["settings"]
    return found


# ------------------------------------------------------------------------------------------------ settings


def test_by_default_the_plans_own_choice_is_measured_beside_a_cache_of_a_fixed_size(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, llama, *SMALL)
    assert 0 == code
    lines = out.splitlines()
    assert "GB/s" in lines[0] and read_environment().cpu in lines[0]
    assert lines[2].split("  ")[0] == "setting" and "bound tokens/s" in lines[2] and "kernels" in lines[2]
    assert ["cache=dynamic", "cache=static"] == [line.split()[0] for line in lines[3:5]]
    assert lines[-1].startswith("medians of 2 runs: prompts of ")
    assert ["measuring how fast cpu reads memory", "measuring cache=dynamic", "measuring cache=static"] == err.splitlines()


def test_json_is_one_object_with_the_machine_and_every_figure(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, llama, *SMALL, "--json", "--quiet", "--prompt-tokens", "20", "--new-tokens", "11", "--batch", "2")
    told = json.loads(out)
    assert (0, "") == (code, err)
    assert ["model", "machine", "bytes_per_second", "repeat", "settings"] == list(told)
    assert read_environment().cpu == told["machine"]["cpu"] and told["machine"]["threads"] >= 1
    for row, cache in zip(told["settings"], ("dynamic", "static"), strict=True):
        plan = make_plan(llama, cache=cache, context=48, batch=2)
        assert ("ok", cache, plan.hash) == (row["state"], row["choices"]["cache"], row["hash"])
        assert (40, 20) == (row["prefill"]["tokens"], row["decode"]["tokens"])
        assert 2 == len(row["prefill"]["runs"]) == len(row["decode"]["runs"])
        assert row["read"]["total"] == row["read"]["weights"] + row["read"]["cache"]
        assert row["bound_tokens_per_second"] == pytest.approx(2 * told["bytes_per_second"]["cpu"] / row["read"]["total"])
        assert row["share"] == pytest.approx(row["decode"]["tokens_per_second"] / row["bound_tokens_per_second"])
        weights = sum(one.role in ("linear", "head") for one in plan.facts.parameters)
        assert weights == sum(row["kernels"].values())


def test_what_is_given_several_times_is_measured_with_each_other(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--attention", "eager", "--attention", "sdpa", "--set", "quantizer.kernel=mv", "--set", "quantizer.kernel=linear")
    rows = settings(capsys, llama, *SMALL, "--cache", "static", *asked)
    expected = [(attention, kernel) for attention in ("eager", "sdpa") for kernel in ("mv", "linear")]
    assert [f"attention={first} quantizer.kernel={second}" for first, second in expected] == [row["setting"] for row in rows]
    assert expected == [(row["asked"]["attention"], row["asked"]["quantizer.kernel"]) for row in rows]
    assert {"static"} == {row["choices"]["cache"] for row in rows}
    assert ["mv", "linear"] * 2 == [next(iter(row["kernels"])) for row in rows]


def test_a_wish_in_order_is_one_setting(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = settings(capsys, llama, *SMALL, "--cache", "static,dynamic")
    assert "static" == row["choices"]["cache"]


def test_every_option_of_a_request_is_there() -> None:
    flags = {option for parameter in command.params for option in parameter.opts}
    assert {f"--{key.replace('_', '-')}" for key in FLAGS} | {"--set", "--config", "--json", "--tune"} <= flags


# ------------------------------------------------------------------------------------------------ refusals


def test_a_setting_that_is_refused_is_a_row_with_its_reason(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--set", "quantizer.kernel=auto", "--set", "quantizer.kernel=tuned", "--set", "quantizer.kernel=zzz")
    rows = settings(capsys, llama, *SMALL, *asked)
    assert ["ok", "refused", "refused"] == [row["state"] for row in rows]
    assert "PN-NONE" == rows[1]["reason"]["code"] and "nothing was measured yet" in rows[1]["reason"]["text"]
    code, out, _ = run(capsys, llama, *SMALL, *asked)
    assert 0 == code
    assert "quantizer.kernel=zzz: refused: no combination of components fits: quantizer 'none': there is no kernel 'zzz'" in out


def test_if_all_are_refused_there_is_no_feasible_plan(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = settings(capsys, llama, *SMALL, "--max-memory", "1kB", code=3)
    assert ("refused", "RL-MEM") == (row["state"], row["reason"]["code"])


def test_what_does_not_fit_into_the_context_fails_as_a_row(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = settings(capsys, llama, "--prompt-tokens", "50", "--context", "48", "--context", "100", "--repeat", "1", code=1)
    assert ["failed", "ok"] == [row["state"] for row in rows]
    assert "GN-CONTEXT" == rows[0]["reason"]["code"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--cache", "statc", "--cache", "dynamic"], 2, "did you mean 'static'?"),
        (["--set", "quantizer.kernle=mv"], 2, "did you mean 'kernel'?"),
        (["--set", "=1"], 2, "SLOT.OPTION=VALUE"),
        (["--prompt-tokens", "0"], 2, "--prompt-tokens"),
        (["--new-tokens", "1"], 2, "--new-tokens"),
        (["--repeat", "0"], 2, "--repeat"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    llama: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    done, out, err = run(capsys, llama, *arguments)
    assert (code, "") == (done, out)
    assert told in err and "measuring" not in err


def test_a_model_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tinny")
    assert (1, "") == (code, out) and "[SR-" in err


def test_an_encoder_is_a_typed_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(config).save_pretrained(tmp_path / "bert")
    code, out, err = run(capsys, str(tmp_path / "bert"))
    assert (2, "") == (code, out)
    assert "[GN-MODEL]" in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------------ bounds


def test_lengths_are_cut_to_what_the_context_has_room_for(llama: str) -> None:
    for context, expected in ((4096, (512, 64)), (100, (51, 50)), (2, (1, 2)), (600, (512, 64))):
        assert expected == bench.lengths(make_plan(llama, context=context), None, None)
        assert sum(expected) <= context + 1
    plan = make_plan(llama, context=100)
    assert (90, 11) == bench.lengths(plan, 90, None)
    assert (92, 9) == bench.lengths(plan, None, 9)
    assert (7, 8) == bench.lengths(plan, 7, 8)


def test_the_buffer_is_larger_than_the_caches_and_small_beside_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attrs import evolve

    monkeypatch.setattr(bench, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "MOST_BUFFER_BYTES", 64 << 20)
    here = read_environment()
    free = evolve(here, memory=evolve(here.memory, available_bytes=1 << 40))
    caches = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    for number, (text, size) in enumerate(
        [("48K", 1 << 20), ("8M", 16 << 20), ("x", 16 << 20), ("9" * 30 + "M", 16 << 20), ("480M", 64 << 20)]
    ):
        (caches / f"index{number}").mkdir(parents=True)
        (caches / f"index{number}/size").write_text(text)
        assert size == bench.buffer_bytes(free, root=tmp_path)
    short = evolve(here, memory=evolve(here.memory, available_bytes=1 << 20))
    assert 1 << 18 == bench.buffer_bytes(short, root=tmp_path)
    assert bench.read_bandwidth(short, seconds=0.0) > 1e6


def test_measuring_ends_when_its_time_is_over(
    llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    (row,) = settings(capsys, llama, "--cache", "static", "--context", "48", "--repeat", "1000")
    assert 1 == len(row["decode"]["runs"])


def test_help_imports_no_torch() -> None:
    code = "import sys; from modelrig.cli import main; main(['bench', '--help']); print('torch' in sys.modules)"
    out = run_python("-c", code, path=[Path(modelrig.__file__).parents[1]]).stdout
    assert "--prompt-tokens" in out and "False" == out.split()[-1]


def test_an_interrupt_prints_what_was_measured_and_ends_cleanly(llama: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "modelrig", "bench", llama, "--cache", "static", "--cache", "dynamic",
         "--context", "2000", "--new-tokens", "400", "--repeat", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # a run in the background ignores it
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("measuring cache"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert 130 == process.returncode
    assert "interrupted" == err.strip()


# ------------------------------------------------------------------------------------------------ kernels


def test_tuning_keeps_what_it_measured_for_the_quantizer_to_take(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, llama, "--tune", "--dtype", "float32", "--dtype", "bfloat16", "--json")
    told = json.loads(out)["tuned"]
    assert (0, ["float32", "bfloat16"]) == (code, [one["dtype"] for one in told])
    assert {str(kernels_file())} == {one["file"] for one in told} and kernels_file().exists()
    assert "rows, microseconds" in err
    shapes = {one.shape for one in make_plan(llama).facts.parameters if one.role in ("linear", "head")}
    assert len(shapes) == len(told[0]["measured"]) == len(told[1]["measured"])
    rows = settings(capsys, llama, *SMALL, "--set", "quantizer.kernel=tuned", "--dtype", "float32", "--dtype", "float16")
    assert ["ok", "refused"] == [row["state"] for row in rows]
    assert "none was measured in float16" in rows[1]["reason"]["text"]


def test_tuning_prints_a_table_and_where_it_is_kept(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, llama, "--tune", "--quiet")
    assert (0, "") == (code, err)
    assert out.startswith("weight") and f"kept in {kernels_file()}" in out


def test_tuning_replaces_a_broken_file_even_where_a_config_asks_for_tuned_kernels(
    llama: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The hint's own command line works."""
    kernels_file().parent.mkdir(parents=True)
    kernels_file().write_text("{")
    (tmp_path / "modelrig.toml").write_text('[quantizer]\nname = "none"\nkernel = "tuned"\n')
    code, _, err = run(capsys, llama, "--tune")
    assert 3 == code
    hint = "bench --tune MODEL --set quantizer.kernel=auto"
    assert hint in err
    arguments = hint.replace("MODEL", llama).split()
    assert 0 == main([*arguments, "--quiet"])
    capsys.readouterr()
    assert "ok" == settings(capsys, llama, *SMALL)[0]["state"]


def test_where_nothing_can_be_kept_the_error_is_typed(
    llama: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, err = run(capsys, llama, "--tune", "--quiet")
    assert (1, "") == (code, out) and "[SV-IO]" in err


def test_a_quantizer_without_kernels_to_measure_says_so(
    llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelrig_plugins.quantizers.none_module import DenseLinear

    monkeypatch.delattr(DenseLinear, "tune")
    code, out, err = run(capsys, llama, "--tune")
    assert (2, "") == (code, out) and "has no kernels to measure" in err
