"""Builds the compiled modules: one ninja file, no torch, nothing that is not in pyproject.toml.

``collavo_kernels._C`` holds the CPU kernels (see csrc/README.md for which source is compiled how
often), ``collavo_kernels._cuda`` the CUDA kernels if nvcc is found. ``COLLAVO_BUILD_CUDA=0`` leaves
them out and ``=1`` makes a missing nvcc an error. CXX, CXXFLAGS and CUDA_HOME mean what they
mean elsewhere.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")
BUILD = Path("build") / f"kernels-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off"
WARNINGS = "-Wall -Wextra"
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    # gcc 12 warns of its own undefined-value idiom inside its AVX-512 header.
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512cd -mavx512bw -mavx512dq -mavx512vl "
    "-mavx512vbmi -mavx512vnni -mavx512bf16 -Wno-maybe-uninitialized "
    "-Wno-uninitialized",
}
CUDA_FLAGS = "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC --expt-relaxed-constexpr"
GENCODE = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]"
GENCODE_SM90A = "-gencode arch=compute_90a,code=sm_90a"
CUDA_LINK = "-shared --cudart static --no-device-link -Xlinker --exclude-libs=ALL,-Bsymbolic"
RULES = """
rule compile
  description = c++ $out
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  description = link $out
  command = $cxx $link_flags $in -o $out
rule cuda
  description = nvcc $out
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cuda_link
  description = link $out
  command = $nvcc $link_flags $in -o $out
"""


def find_compiler():
    """Return the C++ compiler's command, or None.

    On Windows that is only what CXX names: a g++ on PATH links against another run time there.
    """
    names = {"darwin": ["clang++", "g++"], "win32": []}
    names = names.get(sys.platform, ["g++", "c++", "clang++"])
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, names)), None)


def find_nvcc():
    """Return nvcc's path, or None; says on one line why there will be no CUDA kernels."""
    choice = os.environ.get("COLLAVO_BUILD_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"COLLAVO_BUILD_CUDA: expected 0 or 1, got {choice!r}")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    nvcc = shutil.which("nvcc") or (str(home) if home.exists() else None)
    if choice == "0":
        nvcc = None
    if nvcc is None:
        reason = "COLLAVO_BUILD_CUDA=0" if choice == "0" else "no nvcc on PATH or in CUDA_HOME"
        if choice == "1":
            raise SystemExit(f"COLLAVO_BUILD_CUDA=1, but {reason}")
        print(f"collavo_kernels: {reason}: without CUDA C++ kernels; Triton serves the GPU")
    return nvcc


def supported_isas(compiler):
    """Return name -> flags of the instruction sets this compiler knows, the baseline first."""
    isas = {"baseline": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        for name, flags in X86_ISAS.items():
            command = f"{compiler} {flags} -x c++ -c - -o {os.devnull}"
            if subprocess.run(command, shell=True, input=b"", capture_output=True).returncode == 0:
                isas[name] = flags
    return isas


def per_isa(source):
    """Say whether a source is compiled once per instruction set (the rule is in csrc/README.md)."""
    folder = source.relative_to(CSRC).parent.as_posix()
    return folder not in (".", "common") and source.stem != "dispatch"


def cpp_edges(compiler, version):
    """Return the ninja lines that build the CPU module at BUILD/_C."""
    isas = supported_isas(compiler)
    macros = [f"-DCOLLAVO_HAS_{name.upper()}" for name in isas]
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    if not headers.exists():  # isolation moves pybind11 at every build: keep headers in one place
        shutil.copytree(pybind11.get_include(), headers)
    isystem = f"-isystem {headers} -isystem {sysconfig.get_paths()['include']}"
    base = f"{FLAGS} {WARNINGS} {' '.join(macros)} -I{CSRC} {os.environ.get('CXXFLAGS', '')}"
    lines, objects = [], []
    for source in sorted(CSRC.rglob("*.cpp")):
        for isa, isa_flags in isas.items() if per_isa(source) else [("", "")]:
            obj = BUILD / isa / source.relative_to(CSRC).with_suffix(".o")
            flags = f"{base} -DCOLLAVO_ISA={isa} {isa_flags}" if isa else base
            if source.name == "bindings.cpp":
                names = ",".join(isas)
                flags += f" {isystem} -DCOLLAVO_VERSION='\"{version}\"' "
                flags += f"-DCOLLAVO_ISA_LIST='\"{names}\"'"
            lines += [f"build {obj}: compile {source}", f"  flags = {flags}"]
            objects.append(str(obj))
    return [*lines, f"build {BUILD / '_C'}: link {' '.join(objects)}"]


def cuda_edges():
    """Return the ninja lines that build the CUDA library at BUILD/_cuda."""
    lines, objects = [], []
    for source in sorted(CSRC.rglob("*.cu")):
        obj = BUILD / "cuda" / source.relative_to(CSRC).with_suffix(".o")
        gencode = GENCODE_SM90A if source.stem.endswith("_sm90a") else GENCODE
        lines += [f"build {obj}: cuda {source}", f"  flags = {CUDA_FLAGS} {gencode} -I{CSRC}"]
        objects.append(str(obj))
    lines += [f"build {BUILD / '_cuda'}: cuda_link {' '.join(objects)}"]
    return [*lines, f"  link_flags = {CUDA_LINK}"]


@contextlib.contextmanager
def one_build_at_a_time():
    """Hold a lock on the build folder, where the system has such locks."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock, contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        return
    yield


def replace_file(source, target):
    """Put a copy at target in one step, so that a process that runs the old one keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    shutil.copy(source, name)
    os.chmod(name, 0o755)
    os.replace(name, target)


class BuildKernels(build_ext):
    """Runs ninja and puts the results where setuptools expects them."""

    def build_extensions(self):
        """Build every extension with one ninja run."""
        with one_build_at_a_time():
            self._ninja()
            for stale in Path(self.build_lib).glob("collavo_kernels/_cuda.*"):
                stale.unlink()
            for extension in self.extensions:
                built = BUILD / extension.name.rpartition(".")[2]
                replace_file(built, Path(self.get_ext_fullpath(extension.name)))

    def _ninja(self):
        compiler, nvcc = find_compiler(), NVCC
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        lines = [f"builddir = {BUILD}", f"cxx = {compiler}", f"nvcc = {nvcc}"]
        lines += [f"link_flags = {shared}", RULES]
        lines += cpp_edges(compiler, self.distribution.get_version())
        lines += cuda_edges() if nvcc else []
        (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "ninja", "-f", str(BUILD / "build.ninja")]
        subprocess.run(command, check=True, cwd=ROOT)

    def copy_extensions_to_source(self):
        """Copy the built modules beside the sources (editable installs); delete stale ones."""
        if "collavo_kernels._cuda" not in [extension.name for extension in self.extensions]:
            (ROOT / self.get_ext_filename("collavo_kernels._cuda")).unlink(missing_ok=True)
        for extension in self.extensions:
            name = Path(self.get_ext_filename(extension.name))
            replace_file(Path(self.build_lib) / name, ROOT / name)


def extensions():
    """List what can be built here; without a C++ compiler that is nothing, said on one line."""
    if find_compiler() is None:
        print("collavo_kernels: no C++ compiler: without compiled kernels (slower, same results)")
        return []
    names = ["_C", "_cuda"] if NVCC else ["_C"]
    return [Extension(f"collavo_kernels.{name}", sources=[]) for name in names]


os.chdir(ROOT)
NVCC = find_nvcc()
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
