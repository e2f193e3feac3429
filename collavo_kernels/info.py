"""What is installed, what this machine has, and which backend serves each operator, and why."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from collavo_kernels import __version__, ops
from collavo_kernels._backends import ENVIRONMENT_VARIABLE, environment_choice
from collavo_kernels._console import run_command
from collavo_kernels._native import ISA_VARIABLE, cuda_reason, native, native_reason
from collavo_kernels._register import AnyBackend, AnyOperator
from collavo_kernels._requirements import (
    OLDEST_TRANSFORMERS,
    OLDEST_WITH_SEAMS,
    RequirementError,
    require,
)

__all__ = [
    "OLDEST_TRANSFORMERS",
    "OLDEST_WITH_SEAMS",
    "BackendReport",
    "OperatorReport",
    "Report",
    "RequirementError",
    "add_arguments",
    "collect",
    "format_report",
    "main",
    "operator_report",
    "operators",
    "processor_name",
    "require",
    "run",
    "run_command",
]

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "safetensors")
PEERS = {  # import name -> what it is called on package indexes
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
    "flashinfer": "flashinfer-python",
    "torchao": "torchao",
    "unsloth": "unsloth",
    "xformers": "xformers",
}


@functools.cache
def operators() -> dict[str, AnyOperator]:
    """Return every operator by name: each folder of ``collavo_kernels/ops`` is one."""
    found: dict[str, AnyOperator] = {}
    for folder in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{folder.name}.registration")
        found[folder.name] = module.OPERATOR
    return found


@dataclasses.dataclass(frozen=True)
class BackendReport:
    """One backend of one operator on one device type; ``declines`` is None if it can serve."""

    name: str
    declines: str | None
    has_backward: bool


@dataclasses.dataclass(frozen=True)
class OperatorReport:
    """Who serves an operator on a device type, and every backend in order of preference."""

    operator: str
    device: str
    forward: str
    backward: str
    note: str | None
    backends: list[BackendReport]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything ``collavo info`` prints; ``dataclasses.asdict`` gives what ``--json`` prints."""

    version: str
    versions: dict[str, str | None]
    platform: dict[str, str]
    devices: dict[str, list[str]]
    threads: dict[str, Any]
    cpu_kernels: dict[str, Any]
    cuda_kernels: dict[str, Any]
    peers: dict[str, str | None]
    environment: dict[str, str]
    operators: list[OperatorReport]


def collect() -> Report:
    """Look at this machine and this installation.

    Example:
        >>> report = collect()
        >>> "qlora_linear" in {row.operator for row in report.operators}
        True
    """
    devices = _devices()
    return Report(
        version=__version__,
        versions={name: _version(name) for name in PACKAGES},
        platform={
            "python": platform.python_version(),
            "system": platform.platform(),
            "processor": processor_name(),
        },
        devices=devices,
        threads=_threads(),
        cpu_kernels=_cpu_kernels(),
        cuda_kernels={"loaded": cuda_reason() is None, "reason": cuda_reason()},
        peers={name: _peer_version(name) for name in PEERS},
        environment={
            name: os.environ[name]
            for name in (ENVIRONMENT_VARIABLE, ISA_VARIABLE)
            if os.environ.get(name)
        },
        operators=[
            operator_report(operator, device)
            for operator in operators().values()
            for device in devices
        ],
    )


def operator_report(operator: AnyOperator, device_type: str) -> OperatorReport:
    """Say which backend serves an operator on a device type, and why the others do not.

    Args:
        operator: The operator with its table of backends.
        device_type: A device type such as ``"cpu"`` or ``"cuda"``.
    """
    explained = operator.explain(device_type)
    chosen = next(backend for backend, reason in explained if reason is None)
    note, requested = None, ""
    try:
        requested = environment_choice(operator.name)
    except ValueError as error:
        note = f"calls fail: {error}"
    if requested:
        named = {backend.name: backend for backend in operator.backends}.get(requested)
        if named is None:
            note = (
                f"{ENVIRONMENT_VARIABLE} asks for {requested!r}, which does not exist: calls fail"
            )
        elif (reason := named.reason_against(device_type)) is not None:
            note = f"{ENVIRONMENT_VARIABLE} asks for {requested!r}: calls fail: {reason}"
        else:
            chosen, note = named, f"{ENVIRONMENT_VARIABLE} asks for {requested!r}"
    return OperatorReport(
        operator=operator.name,
        device=device_type,
        forward=chosen.name,
        backward=_backward_name(operator, chosen),
        note=note,
        backends=[
            BackendReport(backend.name, reason, backend.backward is not None)
            for backend, reason in explained
        ],
    )


def format_report(report: Report) -> str:
    """Lay a report out for a terminal."""
    lines = [f"collavo_kernels {report.version}", ""]
    lines += _section("versions", {k: v or "not installed" for k, v in report.versions.items()})
    lines += _section("platform", report.platform)
    lines += _section("devices", {k: "; ".join(v) for k, v in report.devices.items()})
    if "cuda" not in report.devices:
        lines.insert(-1, _row("cuda", "no device"))
    lines += _section("threads", report.threads)
    lines += _section("compiled kernels", _kernel_rows(report))
    lines += _section("peers (for benchmarks)", {k: v or "absent" for k, v in report.peers.items()})
    lines += _section("environment", report.environment) if report.environment else []
    lines.append(
        "operators: the first backend that can serve does; inputs it declines go to the next"
    )
    for row in report.operators:
        lines += _operator_lines(row)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``collavo info`` and ``python -m collavo_kernels``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status, 0 unless the output takes no more.

    Args:
        argv: The command line without the program's name; None takes ``sys.argv``.
    """
    program = "python -m collavo_kernels"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    add_arguments(parser)
    own_process = argv is None
    return run_command(program, lambda: run(parser.parse_args(argv)), own_process=own_process)


def run(args: argparse.Namespace) -> int:
    """Print the report as parsed options ask for it; returns the exit status 0."""
    report = collect()
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else format_report(report))
    return 0


def _backward_name(operator: AnyOperator, forward: AnyBackend) -> str:
    if operator.reference.backward is None:
        return "none"
    return forward.name if forward.backward is not None else operator.reference.name


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peer_version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return _version(PEERS[module]) or "present"


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor as its maker does, e.g. ``AMD EPYC 9654``.

    Virtual machines may leave the number out; the name then ends with the processor's family and
    model, since such names stand for several generations: ``AMD EPYC family 25 model 17``.

    Args:
        cpuinfo: Linux's description of the processors; where there is none, Python's is taken.
    """
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    pairs = re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.M)
    found = dict(reversed(pairs))  # the first processor's stay
    name = found.get("model name") or platform.processor() or platform.machine()
    numbered = re.search(r"\d", name) is not None
    if numbered or "cpu family" not in found or "model" not in found:
        return name
    return f"{name} family {found['cpu family']} model {found['model']}"


def _devices() -> dict[str, list[str]]:
    devices = {"cpu": [f"{os.cpu_count()} cores"]}
    if torch.cuda.is_available():
        devices["cuda"] = [
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"capability {properties.major}.{properties.minor}"
            for properties in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ]
    return devices


def _threads() -> dict[str, Any]:
    module = native()
    pool = "" if module is None else module.thread_pool_path()
    return {
        "torch": torch.get_num_threads(),
        "kernels": 1 if module is None else module.num_threads(),
        "pool": pool or "none: kernels run on one thread",
    }


def _cpu_kernels() -> dict[str, Any]:
    module = native()
    if module is None:
        return {"loaded": False, "reason": native_reason()}
    return {
        "loaded": True,
        "reason": None,
        "instruction_set": module.best_isa(),
        "usable": module.isas(),
        "features": module.cpu_features(),
        **module.build_info(),
    }


def _kernel_rows(report: Report) -> dict[str, str]:
    cpu = report.cpu_kernels
    if cpu["loaded"]:
        usable = ", ".join(cpu["usable"])
        text = f"{cpu['instruction_set']} (usable here: {usable}; compiler {cpu['compiler']})"
    else:
        text = f"none: {cpu['reason']}"
    cuda = report.cuda_kernels
    return {"C++": text, "CUDA": "loaded" if cuda["loaded"] else f"none: {cuda['reason']}"}


def _row(name: str, value: Any) -> str:
    return f"  {name:<18} {value}"


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    return [title, *(_row(name, value) for name, value in rows.items()), ""]


def _operator_lines(row: OperatorReport) -> list[str]:
    lines = [f"  {row.operator} on {row.device}"]
    lines += [f"    note: {row.note}"] if row.note else []
    lines.append(f"    forward   {row.forward}")
    own = ""
    if row.backward == "none":
        own = "  (the operator has no gradients)"
    elif row.backward != row.forward:
        own = f"  ({row.forward} has none: the reference's serves)"
    lines.append(f"    backward  {row.backward}{own}")
    for backend in row.backends:
        if backend.name in (row.forward, row.backward):
            continue
        passed_over = row.note or "comes later in the order of preference"
        why = backend.declines or passed_over
        lines.append(f"    not {backend.name}: {why}")
    return lines
