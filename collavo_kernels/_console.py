"""What every command owes the terminal, shell or service that it runs under.

A reader that goes away (``| head``) ends a command without a word and with status 141, Ctrl-C and
SIGTERM with one line and 130 and 143, and an output that takes no more with one line and 2. What
an output's encoding lacks is written as an escape. A stream that was closed is an empty one. This
module imports no torch: it is loaded before it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ERROR_STATUS = 2
INTERRUPTED_STATUS = 128 + signal.SIGINT
_PIPE_STATUS = 141  # 128 + SIGPIPE, which Windows does not have
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run_command(
    program: str,
    command: Callable[[], int],
    *,
    own_process: bool,
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Run a command and return the exit status that says how it ended.

    Args:
        program: What its messages begin with.
        command: Does the work and returns its status. A ``KeyboardInterrupt`` that it raises may
            have a hint, which follows the word "interrupted".
        own_process: Whether the process ends with the command. If not, what is changed of the
            process is put back.
        mistakes: Errors that are printed as one line; others keep their traceback.

    Raises:
        SystemExit: as the command raised it.
    """
    _open_missing_streams()
    failure: BaseException | None = None
    status = 0
    endings: tuple[type[BaseException], ...] = (SystemExit, KeyboardInterrupt, *mistakes)
    with _escapes():
        with _signals(program, own_process) as received:
            try:
                status = command()
            except BaseException as error:
                if not isinstance(error, endings) and not received:
                    raise
                failure = error
        if failure is not None:
            failure = _without_frames(failure, bool(received))
        return _status_of(program, failure, status, received)


def _without_frames(error: BaseException, signalled: bool) -> BaseException:
    """Let go what a failed command held: a progress bar ends its line when it is gone."""
    if signalled and not isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt()  # what came of one, such as a data loader without its workers
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    return error


def _status_of(
    program: str, failure: BaseException | None, status: int, received: list[signal.Signals]
) -> int:
    output = _settle(sys.stdout)
    if isinstance(failure, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        say("; ".join([f"{program}: {_WORDS[number]}", *map(str, failure.args)]))
        status = 128 + number
    elif isinstance(failure, BrokenPipeError) or isinstance(output, BrokenPipeError):
        status = status or _PIPE_STATUS
    elif output is not None:
        say(f"{program}: error: standard output: {output}")
        status = ERROR_STATUS
    elif failure is not None and not isinstance(failure, SystemExit):
        say(f"{program}: error: {_one_line(failure)}")
        status = ERROR_STATUS
    _settle(sys.stderr)
    if isinstance(failure, SystemExit) and output is None:
        raise failure
    return status


def say(line: str) -> None:
    """Print a line to the standard error, if that takes it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def _settle(stream: Any) -> OSError | None:
    """Flush a stream; return why it takes no more, and let the rest go: Python would complain."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        return error
    except ValueError:  # somebody closed it
        return None
    return None


def _open_missing_streams() -> None:
    """Open those of the three standard streams that were closed, as empty ones.

    Otherwise the next file that is opened gets such a stream's number, and what a library writes
    there goes into the file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            # Lives as long as the process.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def _escapes() -> Iterator[None]:
    """Write what the output's encoding does not have as escapes; the error stream does always."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=before)


@contextlib.contextmanager
def _signals(program: str, own_process: bool) -> Iterator[list[signal.Signals]]:
    """Raise ``KeyboardInterrupt`` for both signals that ask to end; yields what was received."""
    received: list[signal.Signals] = []
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked: as if nobody had set anything
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if own_process and _is_loading(frame):
            _leave(program, signal.Signals(number))
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {}
    for number in _WORDS:
        # What is ignored (nohup, a shell's background jobs) stays so. Threads may set nothing.
        if signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, former in before.items():
            # What is left of a process of its own is to leave: unwinding that would be noise.
            # A handler that was not set from Python is None, and cannot be put back from there.
            if own_process or former is not None:
                signal.signal(number, _leave_quietly if own_process else former)
        if own_process and received and hasattr(signal, "SIGCHLD"):
            # torch raises an error there when a data loader's worker got the signal too.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _is_loading(frame: FrameType | None) -> bool:
    """Say whether a module is being loaded, where an exception may be swallowed or replaced."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave(program: str, number: signal.Signals) -> None:
    say(f"{program}: {_WORDS[number]}")
    os._exit(128 + number)


def _leave_quietly(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _guard_loading() -> None:
    """Let ``python -m collavo_kernels`` end quietly while torch loads, before its first line."""
    package = __name__.partition(".")[0]
    if sys.argv[:1] != ["-m"] or f"-m {package} " not in " ".join([*sys.orig_argv, ""]):
        return
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda n, _: _leave(f"python -m {package}", signal.Signals(n)))


_guard_loading()
