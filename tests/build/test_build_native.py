"""The compiled modules: their objects' symbols, and life without them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from collavo_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"kernels-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
HIDE = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "collavo_kernels._C":
            raise {error}

sys.meta_path.insert(0, Finder())
"""
COMPUTE = """
import warnings
import torch
import collavo_kernels as ck
from collavo_kernels import _native
from collavo_kernels.info import collect, format_report

assert _native.native() is None and _native.best_isa() is None
assert {word!r} in _native.native_reason(), _native.native_reason()
said = warnings.catch_warnings(record=True).__enter__()
torch.manual_seed(0)
x = torch.randn(3, 64, requires_grad=True)
weight = ck.quantize_nf4(torch.randn(32, 64))
ck.qlora_linear(x, weight).sum().backward()
assert x.grad.isfinite().all()
q = torch.randn(1, 5, 2, 8)
out = ck.crayon_attention(q, q, q, cos=torch.ones(1, 5, 8), sin=torch.zeros(1, 5, 8))
assert out.out.shape == q.shape
ids = torch.tensor([3], dtype=torch.int32)
rows = ck.panoptic_lookup(
    torch.full((1, 8, 8), 3, dtype=torch.int32), [ids], [ids], grid=(2, 2)
)
assert rows.row_index.tolist() == [[1, 1, 1, 1]]
report = collect()
assert {{row.forward for row in report.operators if row.device == "cpu"}} == {{"reference"}}
assert {word!r} in format_report(report)
(slow,) = said  # of three operators' calls the first
assert slow.category is RuntimeWarning and {word!r} in str(slow.message), slow
assert str(slow.message).startswith("qlora_linear runs on its reference backend"), slow
print("computed")
"""


def objects(isa: str) -> list[Path]:
    """Objects of one instruction set in the last build of this checkout."""
    ninja = BUILD / "_C.ninja"
    if not ninja.exists() or shutil.which("nm") is None:
        pytest.skip("no build of this checkout here, or no nm")
    built = re.findall(r"^build (\S+): compile", ninja.read_text(), flags=re.MULTILINE)
    found = [ROOT / name for name in built if f"/{isa}/" in name]
    if not all(path.exists() for path in found):
        pytest.skip("the last build of this checkout did not finish")
    return found


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_symbol_leaves_its_instruction_set(isa: str) -> None:
    """A weak or unqualified symbol could be linked in place of the baseline's and crash there."""
    for path in objects(isa):
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "WwVvu", f"{path.name}: weak symbol {name}; see csrc/README.md"
            if kind.isupper():
                assert f"::{isa}::" in name, f"{path.name}: {name} is not in namespace {isa}"


def test_module_says_how_it_was_built() -> None:
    module = _native.native()
    if module is None:
        pytest.skip(f"no compiled module: {_native.native_reason()}")
    assert _native.best_isa() in module.isas()
    assert set(module.isas()) <= set(module.build_info()["instruction_sets"].split(","))
    assert Path(module.thread_pool_path()).exists(), "torch has an OpenMP runtime, it was not found"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ('ModuleNotFoundError("no module")', "was not built"),
        ('ImportError("undefined symbol: _Zfoo")', "undefined symbol"),
    ],
    ids=["missing", "broken"],
)
def test_works_without_the_compiled_module(error: str, word: str) -> None:
    code = HIDE.format(error=error) + COMPUTE.format(word=word)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "computed\n", result.stderr


def test_the_builds_own_words_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip hides what setup.py prints; the file that it leaves travels with the package."""
    (tmp_path / "_C.reason").write_text("no C++ compiler: no g++ on PATH\n")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.setitem(sys.modules, "collavo_kernels._C", None)
    module, reason = _native._load_native.__wrapped__()
    assert module is None
    assert "was not built (no C++ compiler: no g++ on PATH); mend that" in str(reason)
    assert "bare sources" in str(_native._load_cuda.__wrapped__()[1])


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_instruction_set_is_none_named(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLAVO_ISA", value)
    before = _native.native()
    assert _native._load_native.__wrapped__()[0] is before


def test_cuda_library_is_none_with_a_reason_or_has_a_device() -> None:
    library = _native.cuda_library()
    if library is None:
        assert _native.cuda_reason()
    else:
        assert library.collavo_cuda_device_count() > 0


def test_cuda_library_exports_only_its_launchers() -> None:
    """The static CUDA runtime's symbols must not meet those of the copy that torch loaded."""
    library = BUILD / "_cuda"
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip("the CUDA library is not built here")
    command = ["nm", "-D", "--defined-only", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert "collavo_cuda_device_count" in names
    assert not [name for name in names if name.startswith(("cuda", "__cuda"))]
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "libcuda.so" not in needed
    assert "libcudart" not in needed


def cuobjdump(*options: str) -> str:
    """What NVIDIA's tool, of which triton has a copy, says about the CUDA library."""
    library = BUILD / "_cuda"
    triton = importlib.util.find_spec("triton")
    if not library.exists() or triton is None or triton.origin is None:
        pytest.skip("the CUDA library is not built here, or no triton, whose tool reads it")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_cuda_library_has_code_for_every_processor() -> None:
    listing = cuobjdump("--list-elf", "--list-ptx")
    for expected in (r"sm_80\.cubin", r"sm_90\.cubin", r"sm_90\.ptx"):
        assert re.search(expected, listing), listing


def test_cuda_kernels_keep_everything_in_registers() -> None:
    """A stack means that registers spill to memory, or that an array is indexed at run time."""
    listing = cuobjdump("--dump-resource-usage")
    for function, stack in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", listing):
        assert stack == "0", f"{function} has a stack of {stack} bytes"
