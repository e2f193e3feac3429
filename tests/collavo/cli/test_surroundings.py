"""Every command in awkward surroundings: who reads it, what its streams are, what it is sent.

The mechanism is shown on a small command that imports nothing, in milliseconds; then that the
project's commands go through it.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from collavo.cli import COMMANDS, main
from collavo.cli.chat import _questions

ROOT = Path(__file__).resolve().parents[3]
CONSOLE = ROOT / "collavo_kernels/_console.py"
TOY = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("console", {str(CONSOLE)!r})
console = importlib.util.module_from_spec(spec)
spec.loader.exec_module(console)

def command():
    COMMAND
    return 0

sys.exit(console.run_command("toy", command, own_process=True))
"""
PRINT = "for _ in range(50000): print('line')"
WAIT = "print('ready', flush=True); time.sleep(60)"


def toy(command: str) -> list[str]:
    return [sys.executable, "-c", TOY.replace("COMMAND", command)]


def run(command: str, shell: str = "{}", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the small command in a line of bash, whose status is the command's."""
    environment = {**os.environ, **variables}
    environment["CODE"] = TOY.replace("COMMAND", command)
    line = shell.format('"$PYTHON" -c "$CODE"')
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "shell", "status", "said"),
    [
        (PRINT, "{} | head -1", 141, ""),
        ("print('few')", "{} | (sleep 0.5; exit 0)", 0, ""),
        ("print('few')", "{} | cat", 0, ""),
        # The reader is gone before a word is written.
        ("time.sleep(0.3); print('few')", "{} | true", 141, ""),
        ("time.sleep(0.3); sys.exit(3)", "{} | true", 3, ""),
        (PRINT, "{} > /dev/full", 2, "toy: error: [Errno 28] No space left on device\n"),
        (PRINT, "{} >&-", 0, ""),
        (PRINT, "{} 2>&-", 0, ""),
        ("print(repr(sys.stdin.read()))", "{} <&-", 0, ""),
        ("raise ValueError('first\\n  second')", "{}", 2, "toy: error: first second\n"),
        ("raise ValueError", "{}", 2, "toy: error: ValueError\n"),
        ("raise ValueError('x')", "{} 2>&-", 2, ""),
        ("raise ValueError('x')", "{} 2>/dev/full", 2, ""),
        ("raise FileNotFoundError(2, 'No', 'a')", "{}", 2, "toy: error: [Errno 2] No: 'a'\n"),
        ("raise KeyboardInterrupt('go on')", "{}", 130, "toy: interrupted; go on\n"),
        ("print('é €')", "{}", 0, ""),
    ],
)
def test_streams(command: str, shell: str, status: int, said: str, unbuffered: str) -> None:
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    result = run(command, shell, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, result.stderr) == (status, said)


def test_a_small_output_that_finds_no_room_is_an_error() -> None:
    """It is written when the command is over, where Python would exit with 120."""
    result = run("print('few')", "{} > /dev/full", PYTHONUNBUFFERED="")
    assert result.returncode == 2
    assert result.stderr == "toy: error: standard output: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
        {"LC_ALL": "C"},
    ],
)
def test_what_an_encoding_lacks_is_written_as_an_escape(variables: dict[str, str]) -> None:
    result = run("print('\\u20ac \\ud800 over')", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout in ("\\u20ac \\ud800 over\n", "€ \\ud800 over\n")


def test_a_closed_stream_does_not_become_another_file(tmp_path: Path) -> None:
    """Otherwise the first file that is opened is number 1, and what a library prints goes there."""
    path = tmp_path / "model"
    command = f"f = open({str(path)!r}, 'w'); import os; os.write(1, b'noise'); f.write('w')"
    assert run(command, "{} >&-").returncode == 0
    assert path.read_text() == "w"


def started(command: str) -> subprocess.Popen[str]:
    """Return a process that has said that it is ready."""
    process = subprocess.Popen(
        toy(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a script runs in the background ignore interrupts, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize(
    "command",
    [
        WAIT,
        # Cleaning up goes on, and a command may raise it again.
        f"try:\n        {WAIT}\n    finally:\n        time.sleep(0.2)",
        f"try:\n        {WAIT}\n    except KeyboardInterrupt:\n        raise",
        # A data loader whose workers got the signal too.
        f"try:\n        {WAIT}\n    finally:\n        raise RuntimeError('worker was killed')",
    ],
)
def test_signals(number: int, status: int, word: str, command: str) -> None:
    process = started(command)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, f"toy: {word}\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """``nohup`` and the background jobs of a script; a handler would bring the signal back."""
    command = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('on')"
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{toy(command)[2]}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "on\n", "")


def test_a_forked_worker_ends_as_if_nobody_had_set_anything() -> None:
    """Data loaders end their workers with SIGTERM, which must not print the command's line."""
    lines = (
        "import os, signal",
        "child = os.fork()",
        "time.sleep(30) if child == 0 else time.sleep(0.3)",
        "os.kill(child, signal.SIGTERM)",
        "print(os.waitpid(child, 0)[1])",
    )
    result = run("\n    ".join(lines))
    assert (result.stdout, result.stderr) == (f"{int(signal.SIGTERM)}\n", "")


def test_a_signal_while_modules_load_ends_the_process(tmp_path: Path) -> None:
    """A module that is being loaded may swallow the exception: here one does."""
    module = "print('ready', flush=True)\ntry:\n    import time; time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(module + "except BaseException:\n    time.sleep(60)\n")
    command = f"sys.path.insert(0, {str(tmp_path)!r}); import slow"
    process = started(command)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "toy: interrupted\n")


def test_what_main_changes_of_a_process_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    errors = sys.stdout.errors
    assert main(["info", "--json"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert sys.stdout.errors == errors
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize("module", ["collavo", "collavo_kernels"])
def test_the_real_commands_are_quiet(module: str) -> None:
    words = [module, "info"] if module == "collavo" else [module]
    line = f"{sys.executable} -m {' '.join(words)} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "COLLAVO_BACKEND": "", "COLLAVO_ISA": ""}
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert (result.returncode, result.stderr) == (141, "")


def test_the_package_is_light_until_a_command_runs() -> None:
    """Torch takes seconds, in which Ctrl-C has to be quiet: the command sets that up first."""
    code = (
        "import sys, collavo.cli, collavo; assert 'torch' not in sys.modules; collavo.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_whole_in_ascii(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--help"] if command is None else [command, "--help"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: collavo")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import collavo_kernels

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"collavo {collavo_kernels.__version__}\n"


def test_a_question_that_is_no_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--model", "none", "--question", "wo\udcff"]) == 2
    said = capsys.readouterr().err
    assert "collavo chat: error: --question: expected UTF-8 text, got 'wo\\udcff'" in said


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("strict", "standard input: expected text in ascii, got the byte 0xff; PYTHONIOENCODING"),
        # As Python reads it in the C locale.
        ("surrogateescape", r"standard input: expected UTF-8 text, got 'wo\\udcff'"),
    ],
)
def test_so_is_a_line_of_the_input(
    errors: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"hello\nwo\xff\n"), "ascii", errors)
    monkeypatch.setattr(sys, "stdin", given)
    lines = _questions(None)
    if errors != "strict":  # whose decoder takes both lines at once
        assert next(lines) == "hello"
    with pytest.raises(ValueError, match=message):
        next(lines)


def test_an_input_that_is_over_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert list(_questions(None)) == ["hello"]
