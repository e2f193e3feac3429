"""Compile Triton kernels for GPUs that are not there; read registers, spills and shared memory.

``triton.compile`` needs no GPU, so a machine without one can still show that a kernel compiles for
every target, fits into shared memory and keeps its inner loop in registers. None of this replaces
a run on the hardware.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

# The type of a kernel's argument, or of each element of one that is a tuple.
ArgumentType: TypeAlias = "str | tuple[ArgumentType, ...]"

# Bytes of shared memory a block can have; Triton does not check them at compile time.
SHARED_LIMITS = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler says of one kernel on one target.

    Attributes:
        target: One of ``TARGETS``.
        registers: Registers per thread (vector registers on AMD).
        spill_bytes: Bytes of stack or scratch per thread; above 0 means that registers spill.
        shared_bytes: Shared memory per block in bytes.
        shared_limit: What the target offers per block in bytes.
        warnings: What NVIDIA's assembler says of lost speed, such as Hopper's matrix products that
            wait for each other; empty for other targets, whose products are not asynchronous.
        spills_in_loops: How many instructions of loops around matrix products load or store what
            was spilled, on NVIDIA; a spill elsewhere is paid once.
    """

    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    warnings: tuple[str, ...] = ()
    spills_in_loops: int = 0


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, ArgumentType],
    constexprs: Mapping[str, object],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> CompiledKernel:
    """Compile a Triton kernel for one target without a GPU.

    Args:
        kernel: The ``@triton.jit`` function.
        signature: Every run-time argument's type by name, such as ``"*fp16"``, ``"i32"`` or
            ``"fp32"``; pointers are taken to be 16-byte aligned, as torch's allocations are. A
            suffix, ``"i32:16"``, says that a number is a multiple of 16, as strides often are. A
            tuple, named or not, has a type for each element.
        constexprs: Every compile-time argument's value by name.
        target: One of ``TARGETS``.
        num_warps: Warps per block.
        num_stages: Stages of software pipelining.

    Returns:
        Registers, spills, shared memory and the assembler's warnings.

    Raises:
        ValueError: if the target is unknown or an argument has neither a type nor a value.
        RuntimeError: if ``TRITON_INTERPRET=1`` is set, since then there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("compile_ahead: TRITON_INTERPRET is set; run it in a process without it")
    missing = [n for n in kernel.arg_names if n not in signature and n not in constexprs]
    if missing:
        raise ValueError(f"signature: no type or value for {', '.join(missing)}")
    given = {n: "constexpr" if n in constexprs else signature[n] for n in kernel.arg_names}
    types = {n: _plain(each) for n, each in given.items()}
    aligned = {
        path: [["tt.divisibility", 16]]
        for path, text in _leaves(tuple(given.values()))
        if text.startswith("*") or text.endswith(":16")
    }
    vendor, _, arch = target.partition(":")
    gpu = GPUTarget("cuda", int(arch), 32) if vendor == "cuda" else GPUTarget("hip", arch, 64)
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constexprs), attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=gpu, options=options)
    registers, spills = _nvidia_usage(compiled) if vendor == "cuda" else _amd_usage(compiled)
    shared, limit = int(compiled.metadata.shared), SHARED_LIMITS[target]
    warnings = assembler_warnings(compiled.asm.get("ptx", ""))
    looped = _spills_in_loops(compiled.asm["cubin"]) if vendor == "cuda" and spills else 0
    return CompiledKernel(target, registers, spills, shared, limit, warnings, looped)


def assembler_warnings(ptx: str) -> tuple[str, ...]:
    """Return what NVIDIA's assembler says of lost speed in a kernel for Hopper, a line each.

    Triton throws it away. Other kernels have no asynchronous matrix products to lose.

    Args:
        ptx: The kernel as Triton hands it to the assembler.
    """
    if "wgmma" not in ptx:
        return ()
    said = _nvidia_tool("ptxas", "-v", ptx.encode(), "--gpu-name=sm_90a", "-o", os.devnull)
    return tuple(line for line in said.splitlines() if "Performance Loss" in line)


def _plain(given: ArgumentType) -> ArgumentType:
    """Return a type without what its suffix says; named tuples stay such."""
    if isinstance(given, str):
        return given.removesuffix(":16")
    elements = map(_plain, given)
    return type(given)(*elements) if hasattr(given, "_fields") else tuple(elements)


def _leaves(
    given: ArgumentType, path: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield every type inside a tuple with the path of indices that leads to it."""
    if isinstance(given, str):
        yield path, given
    else:
        for i, each in enumerate(given):
            yield from _leaves(each, (*path, i))


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    text = _nvidia_tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _spills_in_loops(cubin: bytes) -> int:
    lines = _nvidia_tool("nvdisasm", "-c", cubin).splitlines()
    labels = {line.strip(): i for i, line in enumerate(lines) if re.match(r"\.L_\w+:", line)}
    spills = set()
    for end, line in enumerate(lines):
        jump = re.search(r"\bBRA `\((\.L_\w+)\)", line)
        start = labels[f"{jump.group(1)}:"] if jump else end
        if any(re.search(r"\b[HI]?MMA\b|HGMMA|UTC\w*MMA", x) for x in lines[start:end]):
            spills |= {i for i in range(start, end) if re.search(r"\b(LDL|STL)\b", lines[i])}
    return len(spills)


def _nvidia_tool(name: str, option: str, content: bytes, *rest: str) -> str:
    """Run one of the tools that come with Triton on a file; return all that it prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.write_bytes(content)
        command = [str(tool), option, str(path), *rest]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _amd_usage(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s+(\d+)", text)
    return registers, _number(r"\.private_segment_fixed_size:\s+(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}")
    return int(found.group(1))
