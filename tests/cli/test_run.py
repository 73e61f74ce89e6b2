"""`modelrig run`: data on stdout, everything else on stderr, flags that mean what they say, exit codes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import modelrig
from automata import constraint, plugin
from distributions import run_python
from modelrig.cli import main
from modelrig.cli.run import command
from modelrig.generation.options import GenerateOptions
from modelrig.registry import temporary

TEXT = "def add(a, b):"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny() -> modelrig.Model:
    return modelrig.load("tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["run", *arguments])
    return code, *capsys.readouterr()


def start(*arguments: str, **given: Any) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MODELRIG_")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "modelrig", "run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment, **given,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ output


def test_the_completion_goes_to_stdout_and_the_rest_to_stderr(tiny: modelrig.Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = tiny.generate(TEXT, max_new_tokens=20)
    code, out, err = run(capsys, "tiny", TEXT, "--max-new-tokens", "20")
    assert (0, expected.text + "\n") == (code, out)
    plan, figures = err.splitlines()
    assert tiny.plan.summary() == plan
    assert figures.startswith("7 prompt tokens in ") and figures.endswith("finished: length")
    assert "20 new tokens in " in figures and "peak memory " in figures


def test_quiet_is_the_completion_alone(tiny: modelrig.Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = tiny.generate(TEXT, max_new_tokens=5).text
    assert (0, expected + "\n", "") == run(capsys, "tiny", TEXT, "--max-new-tokens", "5", "--quiet")


def test_json_is_one_object(tiny: modelrig.Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = tiny.generate(TEXT, max_new_tokens=5, stop="zzz")
    code, out, err = run(capsys, "tiny", TEXT, "--max-new-tokens", "5", "--json", "--stop", "zzz")
    told = json.loads(out)
    assert (0, "") == (code, err)
    assert ["text", "tokens", "finish_reason", "stats", "plan"] == list(told)
    assert (expected.text, list(expected.tokens), "length") == (told["text"], told["tokens"], told["finish_reason"])
    assert attrs.asdict(expected.stats).keys() == told["stats"].keys()
    assert (7, 5) == (told["stats"]["prompt_tokens"], told["stats"]["new_tokens"])
    assert ("tiny", tiny.plan.hash) == (told["plan"]["model"], told["plan"]["hash"])


def test_several_sequences_are_told_apart(tiny: modelrig.Model, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num-return-sequences", "2", "--temperature", "1.5", "--seed", "3", "--max-new-tokens", "6")
    expected = tiny.generate(TEXT, num_return_sequences=2, temperature=1.5, seed=3, max_new_tokens=6)
    code, out, err = run(capsys, "tiny", TEXT, *flags)
    assert (0, "\n---\n".join(one.text for one in expected) + "\n") == (code, out)
    assert 2 == err.count("finished: ")
    _, out, _ = run(capsys, "tiny", TEXT, *flags, "--json")
    assert [list(one.tokens) for one in expected] == [one["tokens"] for one in json.loads(out)["sequences"]]


def test_a_process_of_its_own_prints_the_same(tiny: modelrig.Model) -> None:
    done = run_python("-m", "modelrig", "run", "tiny", TEXT, "--max-new-tokens", "8", "--quiet")
    assert (0, tiny.generate(TEXT, max_new_tokens=8).text + "\n", "") == (done.returncode, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------------ prompts


def test_a_dash_reads_the_prompt_from_standard_input(
    tiny: modelrig.Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\nimport é\n"))
    _, out, _ = run(capsys, "tiny", "-", "--max-new-tokens", "8", "--quiet")
    assert tiny.generate("import os\nimport é\n", max_new_tokens=8).text + "\n" == out


@pytest.mark.parametrize(
    ("stdin", "encoding", "code", "text"),
    [(b"\xff\xfe", "utf-8", 2, "GN-INPUT"), (b"\xff", "utf-8:surrogateescape", 1, "TK-TEXT"), (b"", "utf-8", 2, "GN-INPUT")],
)
def test_standard_input_that_is_no_text_is_a_typed_error(stdin: bytes, encoding: str, code: int, text: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelrig", "run", "tiny", "-", "--quiet"],
        input=stdin, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False,
    )  # fmt: skip
    assert (code, b"") == (done.returncode, done.stdout)
    assert done.stderr.startswith(f"Error: [{text}]".encode()) and b"Traceback" not in done.stderr


def test_a_closed_standard_input_is_an_empty_prompt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = run(capsys, "tiny", "-")
    assert (2, "") == (code, out)
    assert "[GN-INPUT] an empty prompt" in err


def test_an_argument_that_is_no_text_is_a_typed_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelrig", "run", "tiny", b"\xff", "--quiet"], capture_output=True, check=False, text=True
    )
    assert (1, "") == (done.returncode, done.stdout)
    assert "[TK-TEXT]" in done.stderr


# ------------------------------------------------------------------------------------------------ flags

FLAGS: dict[str, tuple[list[str], Any]] = {
    "max_new_tokens": (["5"], 5),
    "min_new_tokens": (["0"], 0),
    "temperature": (["0"], 0.0),
    "top_k": (["3"], 3),
    "top_p": (["0.5"], 0.5),
    "min_p": (["0"], 0.0),
    "repetition_penalty": (["1.5"], 1.5),
    "presence_penalty": (["-1"], -1.0),
    "frequency_penalty": (["0"], 0.0),
    "logit_bias": (["4=-2.5", "7=1"], {4: -2.5, 7: 1.0}),
    "stop": (["a", "b c"], ("a", "b c")),
    "stop_ids": (["4", "0"], (4, 0)),
    "seed": (["0"], 0),
    "ignore_eos": ([], True),
    "num_return_sequences": (["2"], 2),
    "constraint": (["ids=[[70, 71], [80]]", "name=chains"], {"ids": "[[70, 71], [80]]", "name": "chains"}),
    "pad_to_multiple_of": (["16"], 16),
}


@pytest.fixture(autouse=True)
def chains() -> Iterator[None]:
    """Something that serves constraints in the language `ids`."""
    with temporary(plugin(constraint()), "acme"):
        yield


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches `Model.generate` instead of a generation."""
    seen: list[dict[str, Any]] = []

    def remember(self: Any, prompt: str, **options: Any) -> list[Any]:
        seen.append(options)
        return []

    monkeypatch.setattr(modelrig.Model, "generate", remember)
    return seen


def test_there_is_a_flag_for_every_option_of_generate() -> None:
    names = {field.name for field in attrs.fields(GenerateOptions)}
    assert names == FLAGS.keys()
    assert names <= {parameter.name for parameter in command.params}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_reaches_generate_as_its_value(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], name: str) -> None:
    values, expected = FLAGS[name]
    flag = "--" + name.replace("_", "-")
    given = [part for value in values for part in (flag, value)] if values else [flag]
    assert 0 == run(capsys, "tiny", "x", "--json", *given)[0]
    assert [{name: expected}] == asked


def test_a_constraint_is_read_from_a_file_too(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "grammar.json").write_text("[[70], [71]]", encoding="utf-8")
    assert 0 == run(capsys, "tiny", "x", "--json", "--constraint", "ids=@grammar.json")[0]
    assert [{"constraint": {"ids": "[[70], [71]]"}}] == asked


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["regex"], "'regex' is not LANGUAGE=TEXT"),
        (["=a"], "'=a' is not LANGUAGE=TEXT"),
        (["regex=a", "regex=b"], "'regex=b' is not LANGUAGE=TEXT, once a language"),
        (["regex=a", "lark=b"], "accepted is a language with its text"),
        (["name=chains"], "accepted is a language with its text"),
        (["ids=@nowhere.json"], "the file 'nowhere.json' cannot be read: No such file or directory"),
        (["ids=@."], "the file '.' cannot be read: Is a directory"),
        (["nothing=x"], "nothing that is installed serves constraints in the language 'nothing'"),
        (["ids=[]", "name=nobody"], "no component of kind constraints is called 'nobody'"),
    ],
)
def test_a_wrong_constraint_is_a_usage_error_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setattr(modelrig.Plan, "load", None)
    code, out, err = run(capsys, "tiny", "x", *(part for flag in flags for part in ("--constraint", flag)))
    assert (2, "") == (code, out)
    assert says in err and "Traceback" not in err


def test_several_seeds_stay_several(asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "tiny", "x", "--json", "--seed", "1", "--seed", "2")
    assert [{"seed": (1, 2)}] == asked


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--max-new-tokens", "0"], "[GN-ARGS] max_new_tokens"),
        (["--top-k", "0"], "[GN-ARGS] top_k"),
        (["--repetition-penalty", "0"], "[GN-ARGS] repetition_penalty"),
        (["--temperature", "nan"], "[GN-ARGS] temperature"),
        (["--temperature", "-1"], "[GN-ARGS] temperature"),
        (["--stop", ""], "[GN-ARGS] stop"),
        (["--seed", "-1"], "[GN-ARGS] seed"),
        (["--logit-bias", "5"], "'5' is not ID=BIAS"),
        (["--logit-bias", "a=1"], "'a=1' is not ID=BIAS"),
        (["--max-new-tokens", "many"], "'many' is not a valid integer"),
        (["--max-new-tokens", "2000"], "[GN-CONTEXT]"),
        (["--seed", "1", "--seed", "2", "--temperature", "1"], "seed has 2 values"),
        (["--stop-ids", "2048"], "stop_ids has id 2048"),
        (["--nope"], "No such option"),
        (["--attention", "spda"], "did you mean 'sdpa'?"),
        (["--set", "cache"], "not written as SLOT.OPTION=VALUE"),
        (["--set", "quantizer.kernle=mv"], "did you mean 'kernel'?"),
        (["--config", "nothing.toml"], "[RQ-FILE]"),
        (["--dtype", "int3"], "[RQ-VALUE]"),
    ],
)
def test_wrong_flags_are_usage_errors_that_name_them(capsys: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    code, out, err = run(capsys, "tiny", TEXT, *flags)
    assert (2, "") == (code, out)
    assert text in err and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["tiny"], ["tiny", "a", "b"]])
def test_model_and_prompt_are_needed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (2, "") == (code, out)
    assert "Usage: modelrig run" in err


def test_the_request_comes_from_flags_over_the_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('cache = "static"\nattention = "eager"\n[quantizer]\nname = "none"\nkernel = "linear"\n')
    flags = ("--max-new-tokens", "1", "--json", "--config", "mine.toml", "--attention", "sdpa", "--dtype", "float32")
    code, out, _ = run(capsys, "tiny", "x", *flags, "--context", "64")
    plan = json.loads(out)["plan"]
    assert 0 == code
    assert ("static", "sdpa") == tuple(plan["choices"][kind]["component"] for kind in ("caches", "attention"))
    assert ("float32", 64, "linear") == (plan["dtype"], plan["context"], plan["choices"]["quantizers"]["options"]["kernel"])


def test_an_option_of_a_component_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "tiny", "x", "--max-new-tokens", "1", "--json", "--set", "quantizer.kernel=mv")
    assert "mv" == json.loads(out)["plan"]["choices"]["quantizers"]["options"]["kernel"]


# ------------------------------------------------------------------------------------------------ exit codes


def test_a_model_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tinny", "x")
    assert (1, "") == (code, out)
    assert "did you mean 'tiny'?" in err


def test_what_fits_nowhere_exits_with_three(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "tiny", "x", "--max-memory", "1kB")
    assert (3, "") == (code, out)
    assert "[RL-MEM]" in err


def test_a_broken_checkpoint_fails_with_its_code(capsys: pytest.CaptureFixture[str], llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "broken"))
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    code, out, err = run(capsys, str(folder), "x")
    assert (1, "") == (code, out)
    assert "[ST-TRAIL]" in err and "model.safetensors" in err


def test_text_for_a_model_without_a_tokenizer_is_a_usage_error(capsys: pytest.CaptureFixture[str], llama_folder: Path) -> None:
    code, out, err = run(capsys, str(llama_folder), "x", "--quiet")
    assert (2, "") == (code, out)
    assert "[GN-TOKENIZER]" in err


def test_text_for_a_tokenizer_in_another_form_fails_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    monkeypatch.setattr(modelrig.Plan, "load", None)
    code, out, err = run(capsys, str(folder), "x")
    assert (1, "") == (code, out)
    assert "[TK-MISSING]" in err and "SentencePiece" in err and "pip install transformers sentencepiece protobuf" in err
    assert 0 == main(["plan", str(folder)])
    assert "pip install transformers sentencepiece protobuf" in capsys.readouterr().out


def test_what_the_checkpoint_says_of_generation_counts_unless_a_flag_says_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundled = modelrig.plan("tiny").snapshot.root
    folder = Path(shutil.copytree(bundled, tmp_path / "model"))
    said = {"eos_token_id": 0, "max_new_tokens": 7, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    told = json.loads(run(capsys, str(folder), TEXT, "--json")[1])
    assert 7 == told["stats"]["new_tokens"]
    assert {"value": 1.5, "origin": "generation_config.json"} == told["plan"]["generation"]["repetition_penalty"]
    flags = ("--max-new-tokens", "7", "--repetition-penalty")
    assert told["tokens"] == json.loads(run(capsys, "tiny", TEXT, "--json", *flags, "1.5")[1])["tokens"]
    plain = json.loads(run(capsys, "tiny", TEXT, "--json", "--max-new-tokens", "7")[1])["tokens"]
    assert plain == json.loads(run(capsys, str(folder), TEXT, "--json", "--repetition-penalty", "1")[1])["tokens"] != told["tokens"]


# ------------------------------------------------------------------------------------------------ Ctrl-C and closed pipes

ENDLESS = ("--ignore-eos", "--max-new-tokens", "1000")


def test_ctrl_c_prints_the_figures_and_exits_with_130() -> None:
    child = start("tiny", TEXT, *ENDLESS)
    begun = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert 130 == child.returncode
    assert begun and out.endswith("\n")
    assert "finished: cancelled" in err and err.endswith("interrupted\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [["--quiet"], ["--json"], ["--num-return-sequences", "2", "--quiet"]])
def test_ctrl_c_is_quiet_otherwise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    interrupt_after(monkeypatch, 3)
    code, out, err = run(capsys, "tiny", TEXT, *ENDLESS, *flags)
    assert (130, "interrupted") == (code, err.strip())
    assert {"--quiet": "\n", "--json": "", "--num-return-sequences": "\n---\n"}[flags[0]] in out


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    from modelrig.generation.loop import Run

    step, calls = Run._drafts, []

    def interrupted(self: Any) -> Any:
        calls.append(1)
        if len(calls) == steps:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Run, "_drafts", interrupted)


def test_ctrl_c_while_loading_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("modelrig.assembly.materialise", interrupted)
    assert (130, "", "interrupted") == (lambda code, out, err: (code, out, err.strip()))(*run(capsys, "tiny", TEXT))


def test_a_reader_that_goes_away_ends_the_run_quietly() -> None:
    child = start("tiny", TEXT, *ENDLESS, "--quiet")
    child.stdout.read(1)
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert (1, "") == (child.returncode, err)
