"""setup.py on a small tree of its own: what it compiles, what it rebuilds, how it fails."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = """
#include <pybind11/pybind11.h>
#include "toy/toy.h"
PYBIND11_MODULE(_C, m) { m.def("level", &collavo::toy::level); }
"""
HEADER = """
#pragma once
#include "common/cpu_features.h"
namespace collavo::toy {
COLLAVO_DECLARE_PER_ISA(int level())
int level(int isa);
}
"""
DISPATCH = """
#include "toy.h"
namespace collavo::toy {
int level(int isa) { COLLAVO_RETURN_PER_ISA(isa, level()); }
}
"""
KERNEL = """
#include "toy.h"
namespace collavo::toy::COLLAVO_ISA {
#if defined(__AVX512BF16__)
int level() { return 2; }
#elif defined(__AVX2__)
int level() { return 1; }
#else
int level() { return 0; }
#endif
}
"""
PYPROJECT = '[project]\nname = "toy"\nversion = "1"\n[tool.setuptools]\npackages = []\n'


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("pybind11", "ninja", "setuptools"):
        pytest.importorskip(module)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("tree")
    (folder / "collavo_kernels").mkdir()
    (folder / "csrc/toy").mkdir(parents=True)
    (folder / "csrc/common").mkdir()
    for name in ("cpu_features.h", "cpu_features.cpp"):
        shutil.copy(ROOT / "csrc/common" / name, folder / "csrc/common")
    shutil.copy(ROOT / "setup.py", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "csrc/bindings.cpp").write_text(BINDINGS)
    (folder / "csrc/toy/toy.h").write_text(HEADER)
    (folder / "csrc/toy/dispatch.cpp").write_text(DISPATCH)
    (folder / "csrc/toy/cpu.cpp").write_text(KERNEL)
    # A torch that cannot be imported: the build must not need one.
    (folder / "fake").mkdir()
    (folder / "fake/torch.py").write_text("raise ImportError('the build imports torch')\n")
    return folder


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(tree / "fake"), "COLLAVO_BUILD_CUDA": "0"}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )


def levels(tree: Path) -> list[int]:
    code = """
import importlib.util, glob
spec = importlib.util.spec_from_file_location("_C", glob.glob("collavo_kernels/_C.*")[0])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for isa in range(3):
    try:
        print(module.level(isa))
    except ValueError:
        print(-1)
assert module.level(-1) in (0, 1, 2)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True
    )
    return [int(line) for line in result.stdout.split()]


def test_builds_each_instruction_set_and_only_once(tree: Path) -> None:
    stale = tree / "collavo_kernels" / ("_cuda" + _suffix())
    stale.write_text("from a build with nvcc")
    result = build(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "COLLAVO_BUILD_CUDA=0: without CUDA C++ kernels" in result.stdout
    assert not stale.exists(), "a stale CUDA library would be packed into a CPU-only wheel"
    assert levels(tree) in ([0, 1, 2], [0, 1, -1], [0, -1, -1])  # by processor and compiler
    assert "no work to do" in build(tree).stdout


def test_a_changed_header_rebuilds_what_includes_it(tree: Path) -> None:
    assert build(tree).returncode == 0
    header = tree / "csrc/toy/toy.h"
    header.write_text(header.read_text() + "// changed\n")
    output = build(tree).stdout
    assert "toy/cpu.o" in output
    assert "common/cpu_features.o" not in output


def test_a_failed_build_keeps_the_old_module(tree: Path) -> None:
    assert build(tree).returncode == 0
    kernel = tree / "csrc/toy/cpu.cpp"
    kernel.write_text(KERNEL + "#error broken\n")
    result = build(tree)
    kernel.write_text(KERNEL)
    assert result.returncode != 0
    assert "broken" in result.stdout + result.stderr
    assert levels(tree)[0] == 0


def test_a_wrong_cuda_choice_is_refused(tree: Path) -> None:
    result = build(tree, COLLAVO_BUILD_CUDA="yes")
    assert result.returncode != 0
    assert "COLLAVO_BUILD_CUDA: expected 0 or 1, got 'yes'" in result.stderr


def test_without_a_compiler_nothing_is_built_and_a_line_says_so(tree: Path) -> None:
    (tree / "empty").mkdir(exist_ok=True)
    result = build(tree, PATH=str(tree / "empty"), CXX="")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" in result.stdout


def test_on_windows_only_a_named_compiler_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI machines have a MinGW g++ on PATH, whose modules no Python from python.org can load."""
    parsed = ast.parse((ROOT / "setup.py").read_text())
    needed = ("find_compiler", "on_one_line", "quoted")
    functions = [n for n in parsed.body if getattr(n, "name", "") in needed]
    found = {"os": os, "shlex": shlex, "shutil": shutil, "subprocess": subprocess}
    found["sys"] = SimpleNamespace(platform="win32")
    exec(compile(ast.Module(functions, []), "setup.py", "exec"), found)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert found["find_compiler"]() is None
    monkeypatch.setenv("CXX", "clang++")
    assert found["find_compiler"]() == "clang++"
    found["sys"].platform = "linux"
    monkeypatch.delenv("CXX")
    assert found["find_compiler"]() == "/usr/bin/g++"


def test_cuda_sources_compile(tree: Path) -> None:
    """Into a second library that exports its launchers; with nvcc only."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    source = tree / "csrc/common/device.cu"
    shutil.copy(ROOT / "csrc/common/device.cu", source)
    result = build(tree, COLLAVO_BUILD_CUDA="1")
    source.unlink()
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tree / "collavo_kernels" / ("_cuda" + _suffix())).exists()


def test_setup_imports_only_what_the_build_requires() -> None:
    parsed = ast.parse((ROOT / "setup.py").read_text())
    names = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"pybind11", "setuptools"}


def _suffix() -> str:
    from importlib.machinery import EXTENSION_SUFFIXES

    return EXTENSION_SUFFIXES[0]
