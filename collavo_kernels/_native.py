"""The compiled modules, if they are there: the CPU kernels ``_C`` and the CUDA library ``_cuda``.

Neither is ever an import error. ``native()`` and ``cuda_library()`` return None where a module is
missing, broken or of no use on this machine, and ``native_reason()`` and ``cuda_reason()`` say
why in words that a backend can give as its own reason for declining.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISA_CODES = {"best": -1, "baseline": 0, "avx2": 1, "avx512": 2}
ISA_VARIABLE = "COLLAVO_ISA"
BEST_ISA = ISA_CODES["best"]
_REBUILD = "mend that and pip install again with --force-reinstall --no-deps --no-cache-dir"


def native() -> ModuleType | None:
    """Return the compiled CPU module, on torch's thread pool, or None if there is none."""
    return _load_native()[0]


def native_of(operator: str) -> ModuleType:
    """Return the compiled CPU module for an operator that needs it.

    Raises:
        RuntimeError: if there is none.
    """
    module = native()
    if module is None:
        raise RuntimeError(f"{operator}: {native_reason()}")
    return module


def scratch(size: int) -> Tensor:
    """Return uninitialised memory on the CPU, what native functions take as ``allocate``.

    Args:
        size: Its bytes.
    """
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def native_reason() -> str | None:
    """Say why ``native()`` is None; None if it is a module."""
    return _load_native()[1]


def best_isa() -> str | None:
    """Return the instruction set the CPU kernels use here: baseline, avx2 or avx512."""
    module = native()
    return None if module is None else str(module.best_isa())


def cuda_library() -> ctypes.CDLL | None:
    """Return the CUDA library, or None if it was not built, does not load or finds no device."""
    return _load_cuda()[0]


def cuda_reason() -> str | None:
    """Say why ``cuda_library()`` is None; None if it is a library."""
    return _load_cuda()[1]


def cuda_check(error: int, what: str) -> None:
    """Raise if a launcher of the CUDA library returned an error code.

    Args:
        error: What the launcher returned; 0 is success.
        what: The launcher's name, for the message.

    Raises:
        RuntimeError: with the CUDA runtime's words for the code.
    """
    if error == 0:
        return
    library = cuda_library()
    words = library.collavo_cuda_error_string(error).decode() if library is not None else "unknown"
    raise RuntimeError(f"{what}: CUDA error {error}: {words}")


@functools.cache
def _load_native() -> tuple[ModuleType | None, str | None]:
    # Any failure is a reason: a module of another Python, a missing library, a truncated file.
    try:
        module = importlib.import_module("collavo_kernels._C")
    except ModuleNotFoundError:
        return None, f"the compiled module was not built ({_build_reason('_C')}); {_REBUILD}"
    except Exception as error:
        return None, f"the compiled module does not load ({error!r}); {_REBUILD}"
    wanted = os.environ.get(ISA_VARIABLE, "").strip() or "best"
    if wanted != "best":
        if wanted not in module.isas():
            usable = ", ".join(module.isas())
            raise ValueError(
                f"{ISA_VARIABLE}: expected best or one of {usable} on this machine, got {wanted!r}"
            )
        module.use_isa(ISA_CODES[wanted])
    module.attach_thread_pool()
    return module, None


def _build_reason(module: str) -> str:
    """Return what setup.py wrote in the place of a module that it did not build."""
    try:
        return Path(__file__).with_name(f"{module}.reason").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return "no build was tried here: these are the bare sources"


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    file = Path(__file__).with_name("_cuda" + importlib.machinery.EXTENSION_SUFFIXES[0])
    if not file.exists():
        return None, f"the CUDA library was not built ({_build_reason('_cuda')})"
    try:
        library = ctypes.CDLL(str(file))
        library.collavo_cuda_error_string.restype = ctypes.c_char_p
        devices = int(library.collavo_cuda_device_count())
    except (OSError, AttributeError) as error:
        return None, f"the CUDA library does not load ({error!r})"
    if devices == 0:
        return None, "no CUDA device (or its driver is older than the CUDA library)"
    return library, None
