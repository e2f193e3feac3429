"""Builds the compiled modules: one ninja file, no torch, nothing that is not in pyproject.toml.

``collavo_kernels._C`` holds the CPU kernels (see csrc/README.md for which source is compiled how
often), ``collavo_kernels._cuda`` the CUDA kernels if nvcc is found. ``COLLAVO_BUILD_CUDA=0`` leaves
them out and ``=1`` makes a missing nvcc an error. CXX, CXXFLAGS and CUDA_HOME mean what they
mean elsewhere; an empty variable is one that is not set.

A module that cannot be built is left out, and ``collavo_kernels/_C.reason`` (``_cuda.reason``) says
why to those who install, from whom pip hides what a build prints. ``python setup.py build_ext``
alone is a developer's build, and fails.
"""

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

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


class MissingTool(Exception):
    """What a module needs to be built, and this machine lacks."""


class BuildFailed(Exception):
    """What a compiler or linker said of a module."""


def on_one_line(value):
    """Return an environment variable's value, "" if it has none: a line's end would end a rule."""
    return " ".join((value or "").split())


def quoted(path):
    """Return a path as one word of a command, in quotes if it has blanks."""
    return subprocess.list2cmdline([path]) if sys.platform == "win32" else shlex.quote(path)


def find_compiler():
    """Return the C++ compiler's command, or None.

    On Windows that is only what CXX names: a g++ on PATH links against another run time there.
    """
    given = on_one_line(os.environ.get("CXX"))
    if given:  # a command with options, or a path, which may have blanks
        return quoted(given) if os.path.exists(given) else given
    names = {"darwin": ["clang++", "g++"], "win32": []}
    names = names.get(sys.platform, ["g++", "c++", "clang++"])
    found = next(filter(None, map(shutil.which, names)), None)
    return found and quoted(found)


def check_tools(compiler):
    """Raise MissingTool if a tool that the CPU module needs is missing or does not work."""
    if compiler is None:
        named = "CXX names none" if sys.platform == "win32" else "no g++, c++ or clang++ on PATH"
        raise MissingTool(f"no C++ compiler: {named}")
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            raise MissingTool(f"{package} is not installed where the package was built")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise MissingTool(f"no {header}: install Python's headers (python3-dev or python3-devel)")
    tried = run_compiler(compiler, "-std=c++17", b"#include <vector>\nint main() {}\n")
    if tried.returncode != 0:
        said = first_error(tried.stderr.decode(errors="replace"))
        raise MissingTool(f"the C++ compiler {compiler} fails: {said}")


def run_compiler(compiler, flags, source):
    """Compile a source from memory and return the finished process."""
    command = f"{compiler} {flags} -x c++ -c - -o {os.devnull}"
    return subprocess.run(command, shell=True, input=source, capture_output=True, env=in_english())


def in_english():
    """Return the environment for compilers, whose errors are then called errors everywhere."""
    return {**os.environ, "LC_ALL": "C"}


def first_error(output):
    """Return the line of a tool's output that says what is wrong: the first error, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search("error: ", line)), (lines or ["no word"])[-1])


def find_nvcc():
    """Return nvcc's path and None, or None and why there will be no CUDA kernels."""
    choice = on_one_line(os.environ.get("COLLAVO_BUILD_CUDA"))
    if choice not in ("", "0", "1"):
        raise SystemExit(f"COLLAVO_BUILD_CUDA: expected 0 or 1, got {choice!r}")
    home = Path(on_one_line(os.environ.get("CUDA_HOME")) or "/usr/local/cuda") / "bin" / "nvcc"
    nvcc = shutil.which("nvcc") or (str(home) if home.exists() else None)
    if nvcc is not None and choice != "0":
        return quoted(nvcc), None
    reason = "COLLAVO_BUILD_CUDA=0" if choice == "0" else "no nvcc on PATH or in CUDA_HOME"
    if choice == "1":
        raise SystemExit(f"COLLAVO_BUILD_CUDA=1, but {reason}")
    return None, reason


def supported_isas(compiler):
    """Return name -> flags of the instruction sets this compiler knows, the baseline first."""
    isas = {"baseline": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        for name, flags in X86_ISAS.items():
            if run_compiler(compiler, flags, b"").returncode == 0:
                isas[name] = flags
    return isas


def per_isa(source):
    """Say whether a source is compiled once per instruction set (the rule is in csrc/README.md)."""
    folder = source.relative_to(CSRC).parent.as_posix()
    return folder not in (".", "common") and source.stem != "dispatch"


def cpp_edges(compiler, version):
    """Return the ninja lines that build the CPU module at BUILD/_C."""
    import pybind11

    isas = supported_isas(compiler)
    macros = [f"-DCOLLAVO_HAS_{name.upper()}" for name in isas]
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    if not headers.exists():  # isolation moves pybind11 at every build: keep headers in one place
        copy_whole(pybind11.get_include(), headers)
    isystem = f"-isystem {headers} -isystem {quoted(sysconfig.get_paths()['include'])}"
    given = on_one_line(os.environ.get("CXXFLAGS"))
    base = f"{FLAGS} {WARNINGS} {' '.join(macros)} -I{CSRC} {given}"
    lines, objects = [], []
    for source in sorted(CSRC.rglob("*.cpp")):
        for isa, isa_flags in isas.items() if per_isa(source) else [("", "")]:
            obj = BUILD / isa / source.relative_to(CSRC).with_suffix(".o")
            flags = f"{base} -DCOLLAVO_ISA={isa} {isa_flags}" if isa else base
            if source.name == "bindings.cpp":
                names = ",".join(isas)
                flags += f" {isystem} -DCOLLAVO_VERSION='\"{version}\"' "
                flags += f"-DCOLLAVO_ISA_LIST='\"{names}\"'"
            lines += [f"build {obj}: compile {source}", f"  flags = {escaped(flags)}"]
            objects.append(str(obj))
    return [*lines, f"build {BUILD / '_C'}: link {' '.join(objects)}"]


def escaped(value):
    """Return a value as ninja's files have it."""
    return value.replace("$", "$$")


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
    with open(BUILD / "lock", "w") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def copy_whole(source, target):
    """Copy a folder whole or not at all: a half of it would be taken for the whole later."""
    half = target.with_name(f"{target.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    try:
        shutil.copytree(source, half)
    except shutil.Error as error:
        raise BuildFailed(f"{target.name} cannot be copied: {error.args[0][0][2]}") from None
    half.rename(target)


def replace_file(source, target, mode=0o755):
    """Put a copy at target in one step, so that a process that runs the old one keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    shutil.copy(source, name)
    os.chmod(name, mode)
    os.replace(name, target)


class BuildKernels(build_ext):
    """Runs ninja and puts the results where setuptools expects them."""

    def build_extensions(self):
        """Build every module that can be; of the others leave the reason in the module's place."""
        for extension in self.extensions.copy():
            name = extension.name.rpartition(".")[2]
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            reason_file = target.with_name(f"{name}.reason")
            try:
                with one_build_at_a_time():
                    self._build(name)
                    replace_file(BUILD / name, target)
                reason_file.unlink(missing_ok=True)
            except (MissingTool, BuildFailed, OSError) as error:
                self._leave_out(extension, error, reason_file)

    def _build(self, name):
        compiler = find_compiler()
        if name == "_cuda" and NVCC is None:
            raise MissingTool(NO_CUDA)
        if name == "_C":
            check_tools(compiler)
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        lines = [f"builddir = {BUILD / 'log' / name}", f"cxx = {escaped(str(compiler))}"]
        lines += [f"nvcc = {escaped(str(NVCC))}", f"link_flags = {shared}", RULES]
        version = self.distribution.get_version()
        lines += cpp_edges(compiler, version) if name == "_C" else cuda_edges()
        rules = BUILD / f"{name}.ninja"
        rules.write_bytes(os.fsencode("\n".join(lines) + "\n"))
        command = [sys.executable, "-m", "ninja", "-f", str(rules)]
        output = []
        sys.stdout.flush()
        with subprocess.Popen(
            command, cwd=ROOT, env=in_english(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as ninja:
            for line in ninja.stdout:
                output.append(line.decode(errors="replace"))
                os.write(sys.stdout.fileno(), line)
        if ninja.returncode != 0:
            raise BuildFailed(f"the build failed: {first_error(''.join(output))}")

    def _leave_out(self, extension, error, reason_file):
        """Note why a module is not there; what an earlier build left would be of other sources."""
        name = reason_file.stem
        reason = on_one_line(str(error)).encode("ascii", "backslashreplace").decode()
        missing = isinstance(error, MissingTool)
        developers = "build_ext" in self.distribution.commands and not missing
        insisted = name == "_cuda" and on_one_line(os.environ.get("COLLAVO_BUILD_CUDA")) == "1"
        if developers or insisted:
            raise SystemExit(f"collavo_kernels: {reason}")
        print(f"collavo_kernels: {reason}: {MODULES[name]}")
        reason_file.with_name(Path(self.get_ext_filename(name)).name).unlink(missing_ok=True)
        reason_file.write_text(reason + "\n", encoding="utf-8")
        self.extensions.remove(extension)

    def copy_extensions_to_source(self):
        """Copy what was built, and reasons, beside the sources (editable installs)."""
        built, here = Path(self.build_lib) / "collavo_kernels", ROOT / "collavo_kernels"
        for name in MODULES:
            module = Path(self.get_ext_filename(name)).name
            for file, mode in ((module, 0o755), (f"{name}.reason", 0o644)):
                if (built / file).exists():
                    replace_file(built / file, here / file, mode)
                else:
                    (here / file).unlink(missing_ok=True)


os.chdir(ROOT)
NVCC, NO_CUDA = find_nvcc()
MODULES = {  # what an installation is without each
    "_C": "without compiled kernels (slower, same results)",
    "_cuda": "without CUDA C++ kernels; Triton serves the GPU",
}
setup(
    ext_modules=[Extension(f"collavo_kernels.{name}", sources=[]) for name in MODULES],
    cmdclass={"build_ext": BuildKernels},
)
