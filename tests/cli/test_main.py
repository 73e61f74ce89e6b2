"""What the command line does with errors, interruptions and closed pipes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import click
import pytest

from distributions import run_python
from modelrig import errors
from modelrig.cli import COMMANDS, main


@pytest.fixture
def command(monkeypatch):
    """`command(body)`: makes `modelrig doctor` run `body` instead."""

    def install(body):
        @click.command("doctor")
        @click.option("--json", "as_json", is_flag=True)
        def fake(as_json):
            return body()

        monkeypatch.setitem(sys.modules, "modelrig.cli.doctor", SimpleNamespace(command=fake))

    return install


def raising(error):
    def body():
        raise error

    return body


ERRORS = [
    (errors.LoadError("LD-META", "no data"), 1),
    (errors.RequestError("RQ-VALUE", "no such value"), 2),
    (errors.PlanError("PN-NONE", "nothing fits"), 3),
    (errors.PluginError("PL-IMPORT", "broken"), 4),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[error.code for error, _ in ERRORS])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_error_of_ours_is_a_message_on_stderr_and_its_exit_code(command, capsys, error, code, flags):
    command(raising(error))
    assert code == main(["doctor", *flags])
    assert ("", f"Error: {error}\n") == tuple(capsys.readouterr())


def test_a_hint_is_shown(command, capsys):
    command(raising(errors.RequestError("RQ-VALUE", "wrong", hint="do this")))
    main(["doctor"])
    assert "Error: [RQ-VALUE] wrong\nHint: do this\n" == capsys.readouterr().err


def test_an_unexpected_error_is_one_line(command, capsys):
    command(raising(ZeroDivisionError("a\nb" + "x" * 1000)))
    assert 1 == main(["doctor"])
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert err.startswith("Error: unexpected error ZeroDivisionError: a b") and "--debug" in err
    assert len(err) < 500


def test_a_panic_of_a_library_is_an_unexpected_error(command, capsys):
    command(raising(type("PanicException", (BaseException,), {})("in Rust")))
    assert 1 == main(["doctor"])
    assert "unexpected error PanicException: in Rust" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(command, capsys, arguments):
    command(raising(errors.LoadError("LD-META", "no data")))
    assert 1 == main(arguments)
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_debug_can_be_asked_for_by_variable(command, capsys, monkeypatch):
    monkeypatch.setenv("MODELRIG_DEBUG", "1")
    command(raising(ValueError("x")))
    assert 1 == main(["doctor"])
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_a_line_of_its_own(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert 130 == main(["doctor"])
    assert "interrupted" == capsys.readouterr().err.strip()


def test_the_end_of_input_is_no_interruption(command, capsys):
    command(raising(EOFError()))
    assert 1 == main(["doctor"])
    assert "aborted" == capsys.readouterr().err.strip()


def test_a_command_may_choose_its_exit_code(command):
    command(lambda: click.get_current_context().exit(3))
    assert 3 == main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["docter"], "there is no command 'docter'; did you mean 'doctor'?"),
        (["zzzzzz"], "there is no command 'zzzzzz'\n"),
        (["--nope"], "No such option"),
        (["plugins", "--nope"], "No such option"),
        (["plugins", "--kind", "nope"], "Invalid value for '--kind'"),
        (["plugins", "shwo"], "No such command 'shwo'"),
    ],
)
def test_wrong_usage_exits_with_two(capsys, arguments, text):
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert "" == out
    assert text in err


def test_help_lists_every_command_and_imports_none():
    code = "import sys\nfrom modelrig.cli import main\nmain(['--help'])\n"
    code += "print(sorted(name for name in sys.modules if name.startswith('modelrig')))"
    done = run_python("-c", code)
    assert "" == done.stderr
    assert [] == [name for name in COMMANDS if f"\n  {name} " not in done.stdout]
    assert "['modelrig', 'modelrig.cli', 'modelrig.errors']" == done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert 0 == main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"Usage: modelrig {name} ")


def test_the_version_is_that_of_the_package(capsys):
    import modelrig

    assert 0 == main(["--version"])
    assert f"modelrig {modelrig.__version__}\n" == capsys.readouterr().out


@pytest.mark.parametrize("module", ["modelrig", "modelrig.cli"])
def test_the_package_runs_as_a_module(module):
    done = run_python("-m", module, "--version")
    assert (0, "", True) == (done.returncode, done.stderr, done.stdout.startswith("modelrig "))


def test_a_reader_that_goes_away_ends_the_command_quietly():
    code = "import sys\nfrom modelrig.cli import main\nsys.exit(main(['plugins']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    _, err = writer.communicate()
    assert (b"", 1) == (err, writer.returncode)


def test_a_character_the_terminal_lacks_is_escaped():
    code = "from modelrig.cli import main\n"
    code += "main(['--version']); print('é…\\udc80')"
    done = run_python("-c", code, PYTHONIOENCODING="ascii")
    assert ("", r"\xe9\u2026\udc80") == (done.stderr, done.stdout.splitlines()[-1])
