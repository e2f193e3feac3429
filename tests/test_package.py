"""House rules (CONTRIBUTING.md) as tests, and the examples of all docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("collavo_kernels", "collavo")
FOLDERS = (*PACKAGES, "csrc", "benchmarks", "tests", "scripts", ".ci", ".github")
TEXT_SUFFIXES = (
    ".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", ".txt", ".in", ".yml", ".yaml",
    ".cff", "",
)  # fmt: skip
OPERATORS = sorted(p.parent.name for p in (ROOT / "collavo_kernels/ops").glob("*/registration.py"))
OPERATOR_FILES = {
    "README.md",
    "__init__.py",
    "inputs.py",
    "validation.py",
    "reference.py",
    "registration.py",
}
BACKENDS = {"cpu", "cuda", "library", "triton", "reference"}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 500, 60, 120


def files(*suffixes: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    found = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    found += [p for p in ROOT.iterdir() if folders is FOLDERS]
    hidden = {"__pycache__", "results", ".git"}  # .git is a file in a worktree
    found = [p for p in found if not hidden & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in found if p.is_file() and p.suffix in suffixes)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its decorators and docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_files_are_short() -> None:
    code = files(".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
    long = {name(p): n for p in code if (n := len(p.read_text().splitlines())) > MAX_FILE}
    assert not long, f"more than {MAX_FILE} lines: {long}"


def test_functions_are_short() -> None:
    long = {}
    for path in files(".py"):
        for function in functions(parsed(path)):
            kernel = any("jit" in ast.unparse(d) for d in function.decorator_list)
            if length(function) > (MAX_KERNEL if kernel else MAX_FUNCTION):
                long[f"{name(path)}:{function.name}"] = length(function)
    assert not long, f"more than {MAX_FUNCTION} lines ({MAX_KERNEL} for a kernel): {long}"


@pytest.mark.parametrize("module", ["collavo_kernels", "collavo_kernels.nn", "collavo"])
def test_public_names_have_docstrings_of_their_own(module: str) -> None:
    public = importlib.import_module(module)
    bare = []
    for attribute in public.__all__:
        value = getattr(public, attribute)
        if not callable(value):
            continue
        if not inspect.getdoc(value) or (inspect.isclass(value) and value.__doc__ is None):
            bare.append(attribute)
    assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_document_shapes_errors_and_an_example(operator: str) -> None:
    text = inspect.getdoc(getattr(importlib.import_module("collavo_kernels"), operator)) or ""
    for part in ("Args:", "Returns:", "Raises:", "Example", ">>> ", "int32", "``["):
        assert part in text, f"{operator}: its docstring has no {part!r}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_file_is_a_backend_and_a_backend_is_a_file(operator: str) -> None:
    """Whoever looks for a backend, or for the place of a new one, needs no more than ``ls``."""
    folder = ROOT / "collavo_kernels/ops" / operator
    there = {p.name for p in folder.iterdir()}
    assert not OPERATOR_FILES - there, f"{operator} lacks {sorted(OPERATOR_FILES - there)}"
    registered = importlib.import_module(f"collavo_kernels.ops.{operator}.registration").OPERATOR
    table = {backend.name for backend in registered.backends}
    assert table <= BACKENDS, f"{operator}: name {sorted(table - BACKENDS)} here"
    assert {p.stem for p in folder.iterdir() if p.stem in BACKENDS} == table
    assert (folder / "triton/launch.py").exists() == ("triton" in table)


def test_files_of_kernels_hold_kernels() -> None:
    """And launch code holds none: what a file is called is what is in it."""
    for path in files(".py", folders=("collavo_kernels",)):
        jitted = any(
            "jit" in ast.unparse(d) for f in functions(parsed(path)) for d in f.decorator_list
        )
        plain = path.stem in ("launch", "tiles", "__init__")
        if path.parent.name == "triton" or "kernels" in path.stem:
            assert jitted != plain, f"{name(path)}: {'has' if jitted else 'has no'} kernels"


def test_csrc_knows_no_torch_and_only_the_bindings_know_python() -> None:
    for path in files(".cpp", ".h", ".cu", ".cuh", folders=("csrc",)):
        for include in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text()):
            assert not re.match(r"torch|ATen|c10", include), f"{name(path)} includes {include}"
            python = re.match(r"pybind11|Python\.h", include)
            assert not python or path.stem == "bindings", f"{name(path)} includes {include}"


def test_nothing_imports_upwards() -> None:
    for path in files(".py", folders=PACKAGES):
        forbidden = ("benchmarks", "tests")
        if path.is_relative_to(ROOT / "collavo_kernels"):
            forbidden += ("collavo",)
        for node in ast.walk(parsed(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            bad = [n for n in names if n.partition(".")[0] in forbidden]
            assert not bad, f"{name(path)} imports {bad}"


def test_importing_the_kernels_is_light() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import collavo_kernels
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded & {"transformers", "triton", "peft", "bitsandbytes", "PIL", "matplotlib"}))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == ""


def test_no_environment_variable_but_the_documented_ones() -> None:
    known = {"COLLAVO_BACKEND", "COLLAVO_BUILD_CUDA", "COLLAVO_ISA"}
    sources = [*files(".py", folders=PACKAGES), ROOT / "setup.py"]
    for path in sources:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                ours = set(re.findall(r"\bCOLLAVO_[A-Z_]+\b", node.value))
                ours = {n for n in ours if f"-D{n}" not in node.value}
                assert ours <= known, f"{name(path)}: {ours - known}"
    for path in files(".cpp", ".h", ".cu", ".cuh", folders=("csrc",)):
        assert "getenv" not in path.read_text(), f"{name(path)} reads the environment"


def test_text_files_name_their_encoding() -> None:
    """The locale's is another in a container, where one run cannot read what another wrote."""
    for path in files(".py", folders=PACKAGES):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = "encoding" in {keyword.arg for keyword in node.keywords}
                text = node.func.attr in ("read_text", "write_text")
                assert named or not text, f"{name(path)}:{node.lineno}: no encoding"


UNFINISHED = r"\b(TODO|FIXME|XXX|HACK)\b|\bplaceholder (function|implementation)\b|\bfor now\b"
PLACES = r"(?<![\w.])/(work|root|home|mnt|Users)/\w"
OUTSIDE = r"\.\./shared\b|\bROOT\.parent\b"


@pytest.mark.parametrize(
    ("pattern", "folders", "why"),
    [
        (UNFINISHED, FOLDERS, "unfinished work belongs in an issue"),
        (PLACES, FOLDERS, "a path of somebody's machine"),
        (OUTSIDE, FOLDERS, "a folder beside the checkout, which a clone does not have"),
        (
            r"\b(pickle\.loads?|torch\.load)\((?!.*weights_only=True)",
            PACKAGES,
            "reads code from a file",
        ),
        (r"(?<![\w.])eval\(", PACKAGES, "runs a string"),
        (r"# type: ignore(?!\[)", FOLDERS, "says nothing about what it ignores"),
    ],
)
def test_words_that_do_not_belong_here(pattern: str, folders: tuple[str, ...], why: str) -> None:
    found = []
    for path in files(*TEXT_SUFFIXES, folders=folders):
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{name(path)}:{number}: {line.strip()}")
    assert not found, f"{why}: " + "; ".join(found)


def test_users_never_meet_an_assert() -> None:
    for path in files(".py", folders=PACKAGES):
        if "testing" in path.parts:
            continue
        lines = [n.lineno for n in ast.walk(parsed(path)) if isinstance(n, ast.Assert)]
        assert not lines, f"{name(path)}: assert at lines {lines}"


def test_links_lead_somewhere() -> None:
    for path in files(".md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        targets += re.findall(r'(?:src|srcset|href)="([^"#]+)"', text)
        for target in targets:
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{name(path)}: {target}"


def _modules_with_examples() -> list[str]:
    found = []
    for path in files(".py", folders=PACKAGES):
        if ">>> " in path.read_text():
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found.append(module.removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("module", _modules_with_examples())
def test_examples_in_docstrings_run(module: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testmod(importlib.import_module(module), optionflags=options)
    assert results.failed == 0
    left = [path.name for path in tmp_path.iterdir()]
    assert not left, f"who runs the examples of {module} finds {left} in the current folder"
