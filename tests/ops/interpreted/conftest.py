"""Mends for Triton's interpreter, in the processes that run kernels through it."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_index(tensor: Any, scope: Any) -> None:
    """Let a scalar bound a loop: Triton 3.6 makes an int of ``[x]``, which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_with_index
