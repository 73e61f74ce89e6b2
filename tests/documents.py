"""Pages whose code blocks run. `python tests/documents.py` (part of `make docs`) writes the outputs they show anew.

A page is run from top to bottom in an empty folder:

    ```python                     executed; all blocks of a page share their names
    ```toml title="rig.toml"      written to that file, whatever its language
    ```console                    lines with `$ ` are executed, those below one are its output; without any `$ `, each is a command
    ```text                       for people

In an output a line `...` stands for any lines, and what differs between machines (`VARYING`) is not compared. A comment before a
block changes what is done with it:

    <!-- not run: the reason -->
    <!-- exit code: 3 -->
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from attrs import define, frozen

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is imported

from modelrig.cli import main as modelrig
from modelrig.registry import current

ROOT = Path(__file__).parents[1]
GENERATED = "<!-- Written by docs/generate.py"
LANGUAGES = ("python", "console", "text", "toml", "json", "markdown")

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"\n]+)\")?\n(?P<text>.*?)^```$", re.M | re.S
)
#: what an output may have differently, and how it is shown
VARYING = (
    (r"\S*/(?=modelrig_plugins/)", ".../"),
    (r"\S*/(?=\w+\.toml)", ".../"),
    (r"[\d.]+ .?B \([\d.]+ .?i?B\) available", "# available"),
    (r"\d+ prompt tokens in \d.*? peak memory [\d,]+ MiB", "# figures"),
    (r"\b(modelrig|Python|torch|safetensors|tokenizers|huggingface_hub|transformers|numpy) \d[\w.+]*", r"\1 #"),
)


@frozen
class Block:
    """A fenced block. `span` is where its text stands in the page."""

    language: str
    title: str | None
    text: str
    note: str
    line: int
    span: tuple[int, int]

    @property
    def is_run(self) -> bool:
        return not self.note.startswith("not run: ")

    @property
    def exit_code(self) -> int:
        return int(self.note.removeprefix("exit code: ")) if self.note.startswith("exit code: ") else 0

    def commands(self) -> list[tuple[str, str]]:
        """(command, the output shown) of a console block."""
        lines = self.text.splitlines()
        if not any(line.startswith("$ ") for line in lines):
            return [(line, "") for line in lines if line.strip()]
        found: list[tuple[str, str]] = []
        for line in lines:
            if line.startswith("$ "):
                found.append((line[2:], ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
        return found


def pages() -> list[Path]:
    """Every page people read, written by hand."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    found += [page for folder in ("docs", "examples", "contrib") for page in (ROOT / folder).rglob("*.md")]
    return sorted(page for page in found if GENERATED not in page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"], found["title"], found["text"], found["note"] or "", text.count("\n", 0, found.start("text")) + 1,
            found.span("text"),
        )
        for found in _BLOCK.finditer(text)
    ]  # fmt: skip


@frozen
class Shown:
    """A command of a page with the output shown and the one it has."""

    block: Block
    command: str
    expected: str
    actual: str

    @property
    def is_right(self) -> bool:
        if not self.expected.strip():
            return True
        lines = (r"(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in alike(self.expected).splitlines())
        return re.fullmatch("".join(lines), alike(self.actual)) is not None


def alike(output: str) -> str:
    """An output without what differs between machines, and without blanks at the ends of lines."""
    for pattern, shown in VARYING:
        output = re.sub(pattern, shown, output)
    return "".join(line.rstrip() + "\n" for line in output.strip("\n").splitlines())


@define
class Shell:
    """Runs the commands of one page. `modelrig` runs in this process: a new one each time would take minutes."""

    cwd: Path
    site: Path  # where `pip install` puts things

    def run(self, command: str) -> tuple[int, str]:
        """(exit code, everything printed). What follows the first `|` reads what was printed before it."""
        first, _, rest = command.partition(" | ")
        words, environment = shlex.split(first, comments=True), {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        builtin = _BUILTINS.get(words[0])
        if builtin is None:
            return self.start(["bash", "-e", "-o", "pipefail", "-c", command])
        with patch.dict(os.environ, environment):
            code, output = builtin(self, words[1:])
        return (code, output) if code or not rest else self.start(["bash", "-c", rest], output)

    def modelrig(self, arguments: list[str]) -> tuple[int, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = modelrig(arguments)
        return code, out.getvalue()

    def pip(self, arguments: list[str]) -> tuple[int, str]:
        """A real build and a real installation, into a folder of the page's own and without the network."""
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(self.site), *arguments[1:]]
        done = self.start(command)
        importlib.invalidate_caches()
        current(refresh=True)
        return done

    def cd(self, arguments: list[str]) -> tuple[int, str]:
        self.cwd = self.cwd / arguments[0]
        os.chdir(self.cwd)
        return 0, ""

    def start(self, command: list[str], given: str = "") -> tuple[int, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.site)}
        streams: dict[str, Any] = {"input": given, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=self.cwd, env=environment, check=False, **streams)
        return done.returncode, done.stdout


_BUILTINS: dict[str, Callable[[Shell, list[str]], tuple[int, str]]] = {
    "modelrig": Shell.modelrig,
    "pip": Shell.pip,
    "cd": Shell.cd,
}


@contextlib.contextmanager
def plain_machine() -> Iterator[None]:
    """Pages show a machine without a GPU, with AVX2 and a compiler, so that they look the same wherever they are run."""
    with (
        patch("modelrig.planning.environment.read_cpu", return_value=("a CPU", frozenset({"avx2"}))),
        patch("modelrig.planning.environment.find_lack_of_cpp", return_value=None),
        patch("modelrig.planning.environment.visible_gpus", return_value=((), 0, None)),
    ):
        yield


@contextlib.contextmanager
def empty_folder() -> Iterator[Shell]:
    """A new working directory, from which the examples can be reached; what is installed or imported there is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, plain_machine():
        shell = Shell(Path(folder, "work"), Path(folder, "site"))
        shell.cwd.mkdir()
        shell.site.mkdir()
        for shown in ("examples", "contrib"):
            (shell.cwd / shown).symlink_to(ROOT / shown)
        sys.path.insert(0, str(shell.site))
        try:
            with contextlib.chdir(shell.cwd):
                yield shell
        finally:
            sys.path.remove(str(shell.site))
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(folder):
                    del sys.modules[name]
            if any(shell.site.iterdir()):
                current(refresh=True)


def run(page: Path) -> Iterator[Shown]:
    """Run all of a page; yields its commands. Raises what a block raises, and AssertionError for another exit code."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with empty_folder() as shell:
        for block in blocks(page):
            if block.title is not None:
                file = shell.cwd / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
            elif block.language == "python" and block.is_run:
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, names)
            elif block.language == "console" and block.is_run:
                for command, expected in block.commands():
                    code, actual = shell.run(command)
                    if code != block.exit_code:
                        raise AssertionError(f"{page}:{block.line}: `{command}` ended with {code}:\n{actual}")
                    yield Shown(block, command, expected, actual)


def rewrite(page: Path) -> bool:
    """Put today's outputs into the page; those with a line `...` are left to people. Returns whether it changed."""
    text = page.read_text(encoding="utf-8")
    for shown in reversed([one for one in run(page) if not one.is_right and "..." not in one.expected.splitlines()]):
        start, end = shown.block.span
        output = shown.actual
        for place in VARYING[:2]:
            output = re.sub(*place, output)
        output = output.strip("\n") + "\n"
        command = f"$ {shown.command}\n"
        text = text[:start] + text[start:end].replace(command + shown.expected, command + output, 1) + text[end:]
    changed = text != page.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for written in (page for page in pages() if rewrite(page)):
        print(f"rewrote outputs in {written.relative_to(ROOT)}")
