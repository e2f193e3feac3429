"""Work in a child process: what a test may not do to its own (be killed, be limited, mount)."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], object]) -> tuple[int, str]:
    """Do work in a child; return its status, or minus its signal, and its answer or error.

    The child may not compute gradients if its parent did: autograd's threads are not forked.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(silence, stream)
            answer = work()
            os.write(write, str("" if answer is None else answer).encode())
            os._exit(0)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
            os.write(write, text.encode("utf-8", "replace")[:60_000])
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message


def mount(folder: Path, size: str = "4m") -> bool:
    """Mount a tmpfs that this process and its children alone see; False if it may not be."""
    library = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x20000, 0x44000
    if not hasattr(library, "unshare") or library.unshare(new_namespace) != 0:
        return False
    if library.mount(b"none", b"/", None, private, None) != 0:
        return False
    options = f"size={size}".encode()
    return bool(library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0)


def mounting_is_permitted() -> bool:
    """Say whether :func:`mount` works here."""
    if not sys.platform.startswith("linux"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return forked(lambda: mount(Path(folder)))[1] == "True"
