"""The packages we are measured beside: which are importable here, and why the others are not.

A provider of a peer begins with ``peers.require("bitsandbytes")``: it returns the module, or says
why the provider is not there. The run's summary names those present and those absent.

On a processor with AVX-512 BF16 bitsandbytes takes its 4-bit product from a kernel on the Hugging
Face hub if ``kernels`` is installed and the hub answers, else from its own library; the two differ.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks.registry import Unavailable

HUB_KERNEL = ("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward_kernel")


@dataclass(frozen=True)
class Peer:
    """A package that does part of what an operator here does.

    Attributes:
        name: Name in tables.
        module: What to import.
        ops: The operators it is held against.
        needs_cuda: It does nothing without an NVIDIA GPU.
    """

    name: str
    module: str
    ops: tuple[str, ...]
    needs_cuda: bool = False

    def absent(self) -> str | None:
        """Why it cannot be measured here, or None if it can."""
        top_level = self.module.split(".")[0]
        if importlib.util.find_spec(top_level) is None:
            return "not installed"
        if self.needs_cuda and not torch.cuda.is_available():
            return "needs an NVIDIA GPU"
        try:
            importlib.import_module(self.module)
        except Exception as error:
            return f"import failed: {type(error).__name__}: {error}"
        return None

    def version(self) -> str:
        """Return the installed version, or an empty string."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("bitsandbytes", "bitsandbytes", ("qlora_linear",)),
        # Brings bitsandbytes' CPU kernel from the hub; see has_hub_kernel.
        Peer("kernels", "kernels", ("qlora_linear", "end_to_end")),
        Peer("peft", "peft", ("qlora_linear", "end_to_end")),
        Peer("torchao", "torchao", ("qlora_linear",)),
        Peer("unsloth", "unsloth", ("qlora_linear",), needs_cuda=True),
        Peer("flash-attn", "flash_attn", ("crayon_attention",), needs_cuda=True),
        Peer("flash-attn-3", "flash_attn_interface", ("crayon_attention",), needs_cuda=True),
        Peer("flashinfer", "flashinfer", ("crayon_attention",), needs_cuda=True),
        Peer("xformers", "xformers.ops", ("crayon_attention",), needs_cuda=True),
        Peer("liger-kernel", "liger_kernel", ("crayon_attention",), needs_cuda=True),
        Peer("flex-attention", "torch.nn.attention.flex_attention", ("crayon_attention",)),
        Peer("transformers", "transformers", ("crayon_attention", "end_to_end")),
    )
}


def require(name: str) -> ModuleType:
    """Return the peer's module; raises ``Unavailable`` with the reason where it is absent."""
    peer = PEERS[name]
    reason = peer.absent()
    if reason is not None:
        raise Unavailable(f"{name}: {reason}")
    return importlib.import_module(peer.module)


def has_hub_kernel() -> bool:
    """Whether bitsandbytes has loaded its CPU kernel from the hub in this process."""
    module, name = HUB_KERNEL
    try:
        return getattr(importlib.import_module(module), name, None) is not None
    except ImportError:
        return False


def summary() -> tuple[list[str], list[str]]:
    """Return the peers present (``name version``) and absent (``name (why)``)."""
    present: list[str] = []
    absent: list[str] = []
    for peer in PEERS.values():
        reason = peer.absent()
        if reason is None:
            kernel = "with" if has_hub_kernel() else "without"
            note = f" ({kernel} its hub kernel)" if peer.name == "bitsandbytes" else ""
            present.append(f"{peer.name} {peer.version()}".strip() + note)
        else:
            absent.append(f"{peer.name} ({reason})")
    return present, absent
