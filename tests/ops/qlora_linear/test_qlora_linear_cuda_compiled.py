"""The CUDA sources compiled with nvcc as the build compiles them: what its assembler reports."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
FLAGS = "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas -v"
# Of a multiprocessor.
REGISTERS = 65536
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@functools.cache
def report(source: Path, target: str) -> list[dict[str, str]]:
    """What ptxas says of every kernel of a source."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    gencode = f"arch=compute_{target},code=sm_{target}"
    command = ["nvcc", *FLAGS.split(), "-gencode", gencode, f"-I{ROOT / 'csrc'}", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command += [str(source), "-o", f"{folder}/out.cubin"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [match.groupdict() for match in REPORT.finditer(result.stdout + result.stderr)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_spills(source: Path, target: str) -> None:
    """A spill is hidden traffic in the loop that should stream weights."""
    if source.stem.endswith("_sm90a"):
        if target == "80":
            pytest.skip("for sm_90a alone")
        target = "90a"
    kernels = report(source, target)
    assert kernels or "__global__" not in source.read_text()
    for kernel in kernels:
        spilled = [int(kernel[key]) for key in ("stack", "stores", "loads")]
        assert spilled == [0, 0, 0], f"{kernel['name']} for {kernel['target']}: {spilled}"
        static = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert static is None or int(static[1]) <= 48 * 1024, kernel


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90"])
def test_two_blocks_of_decode_share_a_processor(target: str) -> None:
    """The launcher sizes shared memory and clusters for two: registers must allow them."""
    kernels = report(ROOT / "csrc/qlora_linear/cuda/decode.cu", target)
    decode = [kernel for kernel in kernels if "decodeI" in kernel["name"]]
    # Two types, one or two tiles of tokens, blocks of 32 or 128 rows.
    assert len(decode) == 8
    for kernel in decode:
        registers = -(-int(kernel["registers"]) // 8) * 8
        assert 2 * 256 * registers <= REGISTERS, kernel
