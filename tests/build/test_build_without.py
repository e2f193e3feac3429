"""What an installation says where something is missing for the build, and paths with blanks.

pip hides what a build prints, so a reason has to travel with the package: the operators' first slow
call and ``collavo info`` give it.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))"
INCLUDE = """
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *a, **k: {{**paths(*a, **k), "include": {}}}
"""
MODULE = '#include <Python.h>\nextern "C" PyObject* PyInit__C() { return nullptr; }\n'
PYPROJECT = '[project]\nname = "toy"\nversion = "1"\n[tool.setuptools]\npackages = []\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package of one source, in a folder as people name theirs."""
    for module in ("pybind11", "ninja", "setuptools"):
        pytest.importorskip(module)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path / "mes modèles $x & 'co'"
    (folder / "csrc").mkdir(parents=True)
    (folder / "csrc/bindings.cpp").write_text(MODULE)
    (folder / "collavo_kernels").mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def install(
    tree: Path, before: str = "", command: str = "build", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Build as pip does, after lines of Python that take something away."""
    code = f"import os, runpy, sys, sysconfig\nsys.argv[:] = ['setup.py', {command!r}]\n{before}\n"
    code += "runpy.run_path('setup.py', run_name='__main__')\n"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "COLLAVO_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def built(tree: Path, name: str) -> Path:
    (folder,) = (tree / "build").glob("lib*")
    return folder / "collavo_kernels" / name


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        ("sys.modules['pybind11'] = None", {}, "pybind11 is not installed where"),
        ("sys.modules['ninja'] = None", {}, "ninja is not installed where"),
        (INCLUDE.format("'/none'"), {}, "no /none/Python.h: install"),
        ("os.environ['PATH'] = ''", {"CXX": ""}, "no C++ compiler: no g++, c++ or clang++ on PATH"),
        ("", {"CXX": "no-such-compiler"}, "the C++ compiler no-such-compiler fails: "),
        ("", {"CXX": "false"}, "the C++ compiler false fails: no word"),
        ("", {"CXX": "g++ -no-such"}, "the C++ compiler g++ -no-such fails: "),
        ("", {"CXXFLAGS": "-include none.h"}, "the build failed: "),
        # A disk that is full; a limit on the size of files stands in for it.
        (LIMIT, {}, "pybind11-"),
    ],
)
def test_what_is_missing_leaves_a_reason_in_the_package(
    tree: Path, before: str, environment: dict[str, str], reason: str
) -> None:
    result = install(tree, before, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert built(tree, "_C.reason").read_text().startswith(reason)
    assert f"collavo_kernels: {reason}" in result.stdout
    assert built(tree, "_cuda.reason").read_text() == "COLLAVO_BUILD_CUDA=0\n"
    assert not built(tree, "_C" + EXTENSION_SUFFIXES[0]).exists()


def test_a_module_of_an_earlier_build_does_not_stay(tree: Path) -> None:
    """It would be of other sources than the Python code beside it."""
    module = "_C" + EXTENSION_SUFFIXES[0]
    assert install(tree).returncode == 0
    assert built(tree, module).exists() and not built(tree, "_C.reason").exists()
    assert install(tree, CXX="false").returncode == 0
    assert not built(tree, module).exists() and built(tree, "_C.reason").exists()
    assert install(tree).returncode == 0
    assert built(tree, module).exists() and not built(tree, "_C.reason").exists()


def test_a_compiler_and_headers_in_folders_with_blanks(tree: Path) -> None:
    """A Python or a toolchain under ``Program Files`` or ``My environments`` is nothing odd."""
    away = tree / "un préfixe"
    away.mkdir()
    (away / "include").symlink_to(sysconfig.get_paths()["include"])
    found = script(away / "bin/g++", f'exec {shutil.which("g++")} "$@"')
    before = INCLUDE.format(repr(str(away / "include")))
    path = f"{found.parent}{os.pathsep}{os.environ['PATH']}"
    for environment in ({"CXX": "", "PATH": path}, {"CXX": str(found), "LC_ALL": "C"}):
        shutil.rmtree(tree / "build", ignore_errors=True)
        result = install(tree, before, **environment)
        assert built(tree, "_C" + EXTENSION_SUFFIXES[0]).exists(), result.stdout + result.stderr


def test_a_broken_nvcc_costs_the_cuda_kernels_alone(tree: Path) -> None:
    (tree / "csrc/kernels.cu").write_text("")
    home = tree / "cuda home"
    script(home / "bin/nvcc", "echo 'nvcc fatal error: unsupported host' >&2; exit 1")
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = install(tree, COLLAVO_BUILD_CUDA="", PATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert built(tree, "_C" + EXTENSION_SUFFIXES[0]).exists()
    assert "nvcc fatal error: unsupported host" in built(tree, "_cuda.reason").read_text()
    insisted = install(tree, COLLAVO_BUILD_CUDA="1", PATH=path)
    assert insisted.returncode != 0
    assert "nvcc fatal error: unsupported host" in insisted.stderr


def test_empty_variables_are_unset_ones(tree: Path) -> None:
    """An empty ``CUDA_HOME`` would make ``bin/nvcc`` of the working directory the compiler."""
    script(tree / "bin/nvcc", "exit 1")
    nothing = dict.fromkeys(("CXX", "CXXFLAGS", "CUDA_HOME", "COLLAVO_BUILD_CUDA"), " ")
    before = "import shutil\nwhich = shutil.which\n"
    before += "shutil.which = lambda name: None if name == 'nvcc' else which(name)"
    result = install(tree, before, **nothing)
    assert built(tree, "_C" + EXTENSION_SUFFIXES[0]).exists(), result.stdout + result.stderr
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert built(tree, "_cuda.reason").read_text() == "no nvcc on PATH or in CUDA_HOME\n"
