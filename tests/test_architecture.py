"""ARCHITECTURE.md says what is true: paths, names, signatures, layers, backends, variables."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))))
SUFFIX = r"\.(?:py|md|cpp|h|cu|cuh|toml|sh|txt|json|yml)"
# Where a name that is printed without its package is looked up.
HOMES = (
    "collavo_kernels",
    "collavo_kernels.nn",
    "collavo",
    "collavo.panoptic",
    "collavo.train",
)
PACKAGES = ("collavo_kernels", "collavo")
ROOMS = {
    path.stem
    for path in (ROOT / "collavo").iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or any(path.glob("*.py")))
}


def is_path(span: str) -> bool:
    bare = re.fullmatch(rf"[\w.*-]+{SUFFIX}", span)
    return bool(bare or re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", span))


def is_public(span: str) -> bool:
    return bool(re.fullmatch(r"collavo(_kernels)?(\.\w+)+(\(\))?", span)) and not is_path(span)


def is_word(span: str) -> bool:
    """Tell a name of the code from other words: an underscore, capitals inside, or a call."""
    name = re.fullmatch(r"(\w+)((?:\.\w+)*)(\(\))?", span)
    if name is None or is_path(span) or is_public(span) or span.isupper():
        return False
    return "_" in span or span.endswith("()") or bool(re.search(r"[a-z][A-Z]", span))


def files(*patterns: str) -> list[Path]:
    found = [p for pattern in patterns for p in ROOT.glob(pattern)]
    return sorted(p for p in found if p.relative_to(ROOT).parts[0] not in ("build", ".git"))


@cache
def words_of_the_code() -> set[str]:
    """Words of the packages and of the sources."""
    code = files(*(f"{folder}/**/*.py" for folder in PACKAGES))
    code += files("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu*")
    return set(re.findall(r"\w+", "\n".join(p.read_text(encoding="utf-8") for p in code)))


def test_the_patterns_find_what_is_there() -> None:
    """Without this a slip in a pattern would leave every test below without a case."""
    for kind, least in ((is_path, 25), (is_public, 3), (is_word, 40)):
        assert sum(map(kind, SPANS)) >= least, kind.__name__
    assert len(SIGNATURES) >= 15


@pytest.mark.parametrize("path", [s for s in SPANS if is_path(s)])
def test_paths_exist(path: str) -> None:
    # A bare file name stands for files of several folders (`cpu.py` of every operator).
    pattern = path.rstrip("/") if "/" in path or (ROOT / path).exists() else f"**/{path}"
    assert files(pattern), f"ARCHITECTURE.md: there is no {path}"


@pytest.mark.parametrize("name", [s for s in SPANS if is_public(s)])
def test_public_names_import(name: str) -> None:
    parts = name.removesuffix("()").split(".")
    value: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:depth]))
        value = getattr(value, part)


@pytest.mark.parametrize("name", [s for s in SPANS if s.startswith("collavo::")])
def test_operators_are_registered(name: str) -> None:
    assert hasattr(torch.ops.collavo, name.removeprefix("collavo::"))


def test_names_are_those_of_the_code() -> None:
    """A function, class, field or option that was renamed still has its old name there."""
    foreign = set(dir(torch)) | set(dir(torch.library)) | set(dir(torch.Tensor))
    foreign |= {"autograd", "opcheck", "fullgraph", "custom_op", "register_autograd", "jvp"}
    foreign |= {"create_graph", "share_memory", "setup_context"}
    known = words_of_the_code() | foreign
    unknown = [s for s in SPANS if is_word(s) and not set(re.findall(r"\w+", s)) <= known]
    assert not unknown, f"ARCHITECTURE.md names what is nowhere in the code: {unknown}"


def printed() -> dict[str, ast.FunctionDef]:
    """Every signature of the text blocks, by the name of what has it (``Class.method``)."""
    signatures = {}
    for block in BLOCKS:
        # A signature starts in the first column, and its further lines do not.
        for name, rest in re.findall(r"^([\w.]+)(\(.*(?:\n[ ].*)*)", block, flags=re.MULTILINE):
            function = ast.parse(f"def f{rest}: ...").body[0]
            assert isinstance(function, ast.FunctionDef)
            signatures[name] = function
    return signatures


SIGNATURES = printed()


def signature_of(name: str) -> inspect.Signature:
    """Look up what a printed name is and how it is called, without ``self``."""
    owner, _, method = name.partition(".")
    homes = [importlib.import_module(home) for home in HOMES]
    value = next((getattr(home, owner) for home in homes if hasattr(home, owner)), None)
    assert value is not None, f"{owner} is in none of {', '.join(HOMES)}"
    signature = inspect.signature(getattr(value, method) if method else value)
    others = [p for p in signature.parameters.values() if p.name != "self"]
    return signature.replace(parameters=others)


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """Name, kind and default of each parameter, as the document prints them."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    rows = [(a, "POSITIONAL_OR_KEYWORD", d) for a, d in zip(given.args, defaults, strict=True)]
    options = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    rows += [(a, "KEYWORD_ONLY", d) for a, d in options]
    rows += [(given.kwarg, "VAR_KEYWORD", None)] if given.kwarg else []
    return [(a.arg, kind, "" if d is None else ast.unparse(d)) for a, kind, d in rows]


@pytest.mark.parametrize("name", SIGNATURES)
def test_printed_signatures_are_those_of_the_code(name: str) -> None:
    signature, function = signature_of(name), SIGNATURES[name]
    none = inspect.Parameter.empty
    real = [
        (p.name, p.kind.name, "" if p.default is none else repr(p.default))
        for p in signature.parameters.values()
    ]
    assert parameters(function) == real, f"ARCHITECTURE.md prints another signature of {name}"
    if function.returns is not None:
        annotation = str(signature.return_annotation)
        assert ast.unparse(function.returns) == annotation, f"{name} returns {annotation}"


def table(header: str) -> list[list[str]]:
    """Cells of the rows of the table whose header line begins so."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_table_of_backends_is_each_operators_own() -> None:
    rows = table("| operator | backends in order")
    modules = sorted(p.parent.name for p in files("collavo_kernels/ops/*/registration.py"))
    assert sorted(quoted(row[0])[0] for row in rows) == modules
    for row in rows:
        name = quoted(row[0])[0]
        operator = importlib.import_module(f"collavo_kernels.ops.{name}.registration").OPERATOR
        assert quoted(row[1]) == [backend.name for backend in operator.backends], name
        by_name = [b.name for b in operator.backends if b.opt_in]
        assert re.findall(r"`(\w+)` \(by name only", row[1]) == by_name, name


def test_operators_stand_apart_and_below_the_modules() -> None:
    """An operator imports no other operator, and what lies under them imports neither."""
    for path in files("collavo_kernels/*.py", "collavo_kernels/ops/*/**/*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts
        if path.name in ("__init__.py", "__main__.py", "info.py") and len(own) == 2:
            continue  # the package's public face, and the report on all of it
        mine = f"collavo_kernels.ops.{own[2]}" if own[1] == "ops" else "none"
        imports = re.findall(
            r"^ *(?:from|import) (collavo_kernels\.\w+(?:\.\w+)?)", path.read_text(), re.M
        )
        above = [n for n in imports if re.match(r"collavo_kernels\.(nn|ops)\b", n) and n != mine]
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_rooms_import_lower_floors_only() -> None:
    """As the document's table has them."""
    floor = {room: int(row[0]) for row in table("| floor | rooms") for room in quoted(row[1])}
    assert set(floor) == ROOMS, "the table's rooms are not those of collavo/"
    for path in files("collavo/**/*.py"):
        room = path.relative_to(ROOT / "collavo").with_suffix("").parts[0]
        if room.startswith("_"):
            continue
        for target in imported_rooms(path) - {room}:
            allowed = floor[target] < floor[room]
            assert allowed, f"{path.relative_to(ROOT)} imports {target}, which is not below {room}"


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "collavo":
            names = [f"collavo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        rooms |= {n.split(".")[1] for n in names if n.startswith("collavo.")}
    # ``from collavo import X`` may name a public object; only rooms are of interest.
    return rooms & ROOMS


def environment_reads(path: Path) -> set[str]:
    """Names that a Python file reads from the environment, by a literal or a module's constant."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def named(node: ast.expr) -> set[str]:
        value = constants.get(node.id) if isinstance(node, ast.Name) else None
        value = node.value if isinstance(node, ast.Constant) else value
        return {value} if isinstance(value, str) else set()

    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            getter = ast.unparse(node.func) in ("os.environ.get", "os.getenv")
            names |= named(node.args[0]) if getter else set()
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            names |= named(node.slice) if ast.unparse(node.value) == "os.environ" else set()
    return names


def test_the_table_of_environment_variables_is_complete() -> None:
    """What packages and build read, and what tests, benchmarks and scripts read of ours."""
    documented = {name for row in table("| variable | read by") for name in quoted(row[0])}
    reads = environment_reads(ROOT / "setup.py")
    for path in files(*(f"{package}/**/*.py" for package in PACKAGES)):
        reads |= environment_reads(path)
    for path in files("tests/**/*.py", "benchmarks/**/*.py", "scripts/**/*.py"):
        reads |= {n for n in environment_reads(path) if n.startswith("COLLAVO_")}
    for path in [*files("scripts/*.sh"), ROOT / ".ci/run"]:
        reads |= set(re.findall(r"\$\{([A-Z_]+):-", path.read_text(encoding="utf-8")))
    assert reads == documented, f"missing: {reads - documented}, gone: {documented - reads}"
