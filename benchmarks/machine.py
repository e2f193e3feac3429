"""Where and with what a row was measured."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Name the device as its maker does, e.g. ``NVIDIA H200`` or ``AMD EPYC 9654``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from collavo_kernels.info import processor_name

    return processor_name()


def isa(device: torch.device | None = None) -> str:
    """Return the widest instruction set that torch uses on the CPU; empty for a GPU."""
    if device is not None and device.type != "cpu":
        return ""
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def facts(device: torch.device) -> dict[str, str | int]:
    """Say where and with what a measurement was made."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "isa": isa(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return result.stdout.strip()
