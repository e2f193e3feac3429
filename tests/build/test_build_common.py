"""csrc/common: conversions against torch's, and loops on an OpenMP pool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from collavo_kernels._native import native

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("native_checks.cpp")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS = {
    "baseline": (),
    "avx2": AVX2,
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-Wno-maybe-uninitialized"),
}
VECTOR_KINDS = {"baseline": 0, "avx2": 1, "avx512": 2}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("native")

    def build(isa: str) -> Path:
        program = folder / isa
        sources = [SOURCE, ROOT / "csrc/common/parallel.cpp"]
        options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fopenmp", *FLAGS[isa]]
        command = [compiler, *options, f"-I{ROOT / 'csrc'}", *map(str, sources), "-ldl"]
        subprocess.run([*command, "-o", str(program)], check=True)
        return program

    return build


def _awkward_floats() -> torch.Tensor:
    """All bfloat16 bit patterns, their neighbourhoods' rounding ties, and random bit patterns."""
    high = torch.arange(65536, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    ties = (high[:, None] | low).flatten()
    # float16 rounds 13 bits away: the same idea one level lower, over its whole exponent range.
    half = torch.arange(0x3200, 0x4790, dtype=torch.int64)[:, None] << 16
    half = (half | torch.tensor([0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001])).flatten()
    random = torch.randint(0, 2**32, (100_000,), dtype=torch.int64)
    bits = torch.cat([ties, half, random])
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 16)])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("isa", FLAGS)
def test_conversions_equal_torch(build, isa: str) -> None:
    module = native()
    if isa != "baseline" and (module is None or isa not in module.isas()):
        pytest.skip(f"this processor does not run {isa}")
    values = _awkward_floats()
    command = [str(build(isa)), "convert"]
    output = subprocess.run(
        command, input=values.numpy().tobytes(), capture_output=True, check=True
    ).stdout
    raw = torch.frombuffer(bytearray(output), dtype=torch.uint8)
    kinds = 1 + VECTOR_KINDS[isa]
    pieces = raw.split([len(values) * 2, len(values) * 4] * kinds * 2)
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = values.to(dtype)
        for kind in range(kinds):
            narrow, wide = pieces[2 * (index * kinds + kind) :][:2]
            got = narrow.view(dtype)
            assert torch.equal(got.isnan(), expected.isnan()), (dtype, kind)
            numbers = ~expected.isnan()
            same = got.view(torch.int16)[numbers] == expected.view(torch.int16)[numbers]
            assert same.all(), (dtype, kind, values[numbers][~same][:5])
            back = wide.view(torch.float32)
            assert torch.equal(back[numbers], expected.float()[numbers]), (dtype, kind)


def test_parallel_loops(build) -> None:
    """Coverage, grain, threads, nesting and a forked child; the program prints what is wrong."""
    result = subprocess.run([build("baseline"), "parallel"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_threads_follow_torch() -> None:
    module = native()
    if module is None:
        pytest.skip("no compiled module here")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert module.num_threads() == threads
    finally:
        torch.set_num_threads(before)
