"""`modelrig chat`: a line is a message, over a pipe and in a terminal; /reset, /exit, the end of input, Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelrig
from automata import constraint, plugin
from checkpoints import write_llama
from modelrig.cli import main
from modelrig.generation.session import Session
from modelrig.registry import temporary

FLAGS = ("--max-new-tokens", "8")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny() -> Iterator[modelrig.Model]:
    with modelrig.load("tiny") as loaded:
        yield loaded


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chat(input, *flags)` over a pipe: (exit code, stdout, stderr)."""

    def talk(text: str, *flags: str, model: str = "tiny") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", model, *FLAGS, *flags])
        return code, *capsys.readouterr()

    return talk


def answers(model: modelrig.Model, *messages: str, system: str | None = None) -> str:
    """What a conversation of `messages` prints."""
    session = model.session()
    session.messages = [{"role": "system", "content": system}] if system else []
    return "".join(session.send(message, max_new_tokens=8).text + "\n" for message in messages)


# ------------------------------------------------------------------------------------------------ over a pipe


def test_every_answer_keeps_to_a_constraint(tiny: modelrig.Model, chat: Any) -> None:
    word = tiny.tokenizer.encode("word", add_special_tokens=False)
    with temporary(plugin(constraint()), "acme"):
        code, out, _ = chat("one\ntwo\n", "--constraint", f"ids={[[token] for token in word]}")
    assert (0, "word\nword\n") == (code, out)


def test_each_line_is_answered_in_one_conversation(tiny: modelrig.Model, chat: Any) -> None:
    code, out, err = chat("add two numbers\nsort a list\n")
    assert (0, answers(tiny, "add two numbers", "sort a list")) == (code, out)
    first, *figures = err.splitlines()
    assert tiny.plan.summary() == first
    assert 2 == len(figures) and all(line.endswith("finished: length") for line in figures)
    assert "> " not in err  # nobody is there to be asked


def test_quiet_prints_answers_alone(tiny: modelrig.Model, chat: Any) -> None:
    assert (0, answers(tiny, "add"), "") == chat("add\n", "--quiet")


def test_the_last_line_needs_no_end(tiny: modelrig.Model, chat: Any) -> None:
    assert answers(tiny, "add") == chat("add", "--quiet")[1]


def test_reset_forgets_all_but_the_system_message(tiny: modelrig.Model, chat: Any) -> None:
    _, out, err = chat("one\n /reset \nadd\n", "--system", "be brief")
    assert answers(tiny, "one", system="be brief") + answers(tiny, "add", system="be brief") == out
    whole = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add"}]
    expected = len(tiny.tokenizer.encode(tiny.chat_prompt(whole), add_special_tokens=False))
    assert str(expected) == re.findall(r"(\d+) prompt tokens", err)[-1]  # nothing of it was in the cache


@pytest.mark.parametrize("end", ["/exit\nadd\n", "  /exit  \nadd\n", ""])
def test_exit_and_the_end_of_input_end_it(tiny: modelrig.Model, chat: Any, end: str) -> None:
    assert (0, answers(tiny, "add"), "") == chat("add\n" + end, "--quiet")


def test_empty_lines_are_no_messages(tiny: modelrig.Model, chat: Any) -> None:
    assert (0, answers(tiny, "add"), "") == chat("\n   \nadd\n\n", "--quiet")
    assert (0, "", "") == chat("", "--quiet")


def test_a_message_keeps_its_spaces_and_letters(tiny: modelrig.Model, chat: Any) -> None:
    assert answers(tiny, "  naïve 漢字 😀 ") == chat("  naïve 漢字 😀 \n", "--quiet")[1]


def test_options_of_generate_hold_for_every_answer(tiny: modelrig.Model, chat: Any) -> None:
    session = tiny.session()
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "seed": 3}
    expected = "".join(session.send(text, **how).text + "\n" for text in ("one", "two"))
    assert expected == chat("one\ntwo\n", "--quiet", "--temperature", "1.5", "--seed", "3")[1]


def test_a_conversation_longer_than_the_context_can_be_reset(tiny: modelrig.Model, chat: Any) -> None:
    code, out, err = chat("add\n" + "word " * 100 + "\n/reset\nadd\n", "--context", "64")
    assert (0, answers(tiny, "add") * 2) == (code, out)
    assert 1 == err.count("[GN-CONTEXT]")
    assert "/reset begins a new one" in err


def test_a_closed_standard_input_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert 0 == main(["chat", "tiny", "--quiet"])


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--top-k", "0"], "[GN-ARGS]"), (["--num-return-sequences", "2"], "one answer a turn"), (["--nope"], "No such option")],
)
def test_wrong_flags_are_usage_errors(chat: Any, flags: list[str], text: str) -> None:
    code, out, err = chat("add\n", *flags)
    assert (2, "") == (code, out)
    assert text in err


def test_a_model_without_a_tokenizer_or_template_says_so(chat: Any, llama_folder: Path, tmp_path: Path) -> None:
    code, out, err = chat("hello\n", "--quiet", model=str(llama_folder))
    assert (2, "") == (code, out)
    assert "[GN-TOKENIZER]" in err
    from tokenizer_folders import byte_level, write

    write_llama(tmp_path / "model", vocab_size=400)
    write(tmp_path / "model", byte_level())
    code, out, err = chat("hello\n", "--quiet", model=str(tmp_path / "model"))
    assert (1, "") == (code, out)
    assert "[TM-MISSING]" in err


# ------------------------------------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(tiny: modelrig.Model, chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelrig.generation.loop import Run

    step, calls = Run._drafts, []

    def interrupted(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    sessions: list[Session] = []
    make = modelrig.Model.session
    monkeypatch.setattr(modelrig.Model, "session", lambda self: sessions.append(make(self)) or sessions[0])
    monkeypatch.setattr(Run, "_drafts", interrupted)
    code, out, err = chat("add two numbers\nmore\n")
    monkeypatch.undo()
    (session,) = sessions
    first, second = (message["content"] for message in session.messages if message["role"] == "assistant")
    assert (0, f"{first}\n{second}\n") == (code, out)
    assert ["cancelled", "length"] == re.findall(r"finished: (\w+)", err)
    begun = tiny.generate(messages=[{"role": "user", "content": "add two numbers"}], max_new_tokens=4)
    assert begun.text.startswith(first) and 4 == len(begun.tokens)
    assert tiny.generate(messages=session.messages[:3], max_new_tokens=8).text == second


def test_ctrl_c_at_an_empty_prompt_ends_it(chat: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupting(io.StringIO):
        def readline(self, *arguments: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupting())
    assert 0 == main(["chat", "tiny", "--quiet"])
    assert ("", "\n") == capsys.readouterr()


# ------------------------------------------------------------------------------------------------ in a terminal


class Terminal:
    """A chat whose standard input and error are a terminal, and whose standard output is a pipe."""

    def __init__(self, *flags: str) -> None:
        self.master, slave = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MODELRIG_")}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "modelrig", "chat", "tiny", *flags],
            stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, times: int = 1) -> None:
        limit = time.monotonic() + 60
        while self.shown.count(text) < times:
            assert time.monotonic() < limit, self.shown
            self.shown += os.read(self.master, 4096).decode()

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> tuple[int, str]:
        out, _ = self.child.communicate(timeout=60)
        return self.child.returncode, out.decode()

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.communicate()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_one(*flags: str) -> Terminal:
        opened.append(Terminal(*flags))
        return opened[0]

    yield open_one
    for one in opened:
        one.close()


def test_a_terminal_is_asked_and_answers_go_to_stdout(tiny: modelrig.Model, terminal: Any) -> None:
    talk = terminal(*FLAGS)
    talk.wait_for("> ")
    talk.type("add two numbers\n")
    talk.wait_for("finished: length")
    talk.wait_for("> ", 2)
    talk.type("/reset\n")
    talk.wait_for("> ", 3)
    talk.type("add two numbers\n")
    talk.wait_for("finished: length", 2)
    talk.type("\x04")  # Ctrl-D
    assert (0, answers(tiny, "add two numbers") * 2) == talk.end()
    assert tiny.plan.summary() in talk.shown


def test_ctrl_c_in_a_terminal_stops_the_answer_then_the_conversation(terminal: Any) -> None:
    talk = terminal("--max-new-tokens", "900", "--ignore-eos")
    talk.wait_for("> ")
    talk.type("count\n")
    assert talk.child.stdout.read(1)
    talk.child.send_signal(signal.SIGINT)
    talk.wait_for("finished: cancelled")
    talk.wait_for("> ", 2)
    talk.child.send_signal(signal.SIGINT)
    code, _ = talk.end()
    assert 0 == code
    assert "Traceback" not in talk.shown
