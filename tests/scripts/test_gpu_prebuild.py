"""scripts/gpu_prebuild.py: what it packs, what it leaves out, and that its calls are the tests'."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prebuild(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prebuild", ROOT / "scripts/gpu_prebuild.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tests")])
    return module


def test_the_archive_holds_what_a_launch_needs(prebuild: ModuleType, tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "KEY"
    entry.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "__grp__k.json", "k.ptx", "k.ttgir", "k.source"):
        (entry / name).write_text(name)
    prebuild.pack(tmp_path / "cache.tar.xz")
    with tarfile.open(tmp_path / "cache.tar.xz") as archive:
        assert sorted(archive.getnames()) == ["KEY/__grp__k.json", "KEY/k.cubin", "KEY/k.json"]


def test_a_wheel_is_laid_out_without_libraries_for_other_cuda(
    prebuild: ModuleType, tmp_path: Path
) -> None:
    names = ["__init__.py", *(f"libbitsandbytes_{x}.so" for x in ("cpu", "cuda118", "cuda130"))]
    with zipfile.ZipFile(tmp_path / "bitsandbytes-0.50.2-py3-none-any.whl", "w") as wheel:
        for name in names:
            wheel.writestr(f"bitsandbytes/{name}", "")
        wheel.writestr("bitsandbytes-0.50.2.dist-info/METADATA", "")
    prebuild.unpack_wheels(tmp_path, tmp_path / "site")
    found = {path.name for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert found == {*names, "METADATA"} - {"libbitsandbytes_cuda118.so"}


def test_every_table_of_cases_is_gone_through(prebuild: ModuleType) -> None:
    pytest.importorskip("triton")
    from collavo_kernels.testing.cases import crayon_attention as attention
    from collavo_kernels.testing.cases import qlora_linear as linear
    from collavo_kernels.testing.cases.panoptic_lookup import CASES, LARGE_CASES

    with_tokens = sum(bool(case.length and case.batch) for case in attention.CASES)
    dtypes = 3 * (with_tokens + len(attention.LONG_CASES) + len(linear.CASES))
    # One odd layer and four masks of one test each.
    assert len(list(prebuild.calls())) == dtypes + 5 + len(CASES) + len(LARGE_CASES)


def test_its_facts_are_those_of_this_python(prebuild: ModuleType) -> None:
    triton = pytest.importorskip("triton")
    facts = prebuild.facts()
    assert facts["triton"] == triton.__version__ and "cpython" in facts["python"]
    assert set(facts) == {"cache", "python", "torch", "triton"}
