"""What is declared, what is asked for where it is used, and what the kernels do without."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from collavo_kernels import quantize_nf4
from collavo_kernels._backends import triton_reason
from collavo_kernels._requirements import (
    OLDEST_TRANSFORMERS,
    OLDEST_WITH_SEAMS,
    RequirementError,
    require,
)
from collavo_kernels.info import operators
from collavo_kernels.nn import register_attention

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = (
    "collavo needs transformers >= 5.5 and found {}; pip install 'transformers>=5.5', "
    "or use collavo_kernels alone, which works beside transformers from 4.37"
)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


BLOCKED = """
import runpy, sys
blocked = {"PIL", "accelerate", "bitsandbytes", "huggingface_hub", "peft", "tokenizers", "tqdm",
           "transformers"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
runpy.run_path("tests/dependencies/kernels_alone.py", run_name="__main__")
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules} & blocked))
"""


def test_kernels_run_without_the_packages_around_them(tmp_path: Path) -> None:
    """Every operator, forward and backward, and every module, where an import of them fails."""
    result = run(BLOCKED, str(tmp_path))
    assert result.returncode == 0, result.stderr
    for operator in ("panoptic_lookup", "qlora_linear", "crayon_attention"):
        assert f"{operator} reference\n" in result.stdout
    assert result.stdout.splitlines()[-1] == "imported:"


# Installed versions as a process sees them; argument 1: package=version, "" for none.
FAKED = """
import importlib.metadata as metadata, sys
package, _, found = sys.argv[1].partition("=")
real = metadata.version
def version(name):
    if name != package:
        return real(name)
    if not found:
        raise metadata.PackageNotFoundError(name)
    return found
metadata.version = version
if not found:
    sys.modules[package] = None
"""


def users_of_transformers() -> list[str]:
    """Return the modules of the library that import transformers, or a package of its, at once."""
    found = []
    for path in sorted((ROOT / "collavo").rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
        relative = path.relative_to(ROOT)
        if any(re.match(r"transformers|huggingface_hub", name) for name in names):
            found.append(".".join(relative.with_suffix("").parts))
    return [name for name in found if not name.startswith("collavo.demo.")]


@pytest.mark.parametrize("found", ["4.45.2", ""], ids=["older", "missing"])
def test_every_part_that_needs_transformers_says_which(found: str) -> None:
    """Whatever is imported first: the sentence, not the first name that the older one lacks."""
    code = """
import importlib, collavo, collavo.prepared.shards, collavo.cli
modules = sys.argv[2].split()
def attempt(name, get):
    try:
        get()
    except ImportError as error:
        print(f"{name}: {error}")
for name in modules:
    attempt(name, lambda: importlib.import_module(name))
attempt("collavo.CollavoModel", lambda: collavo.CollavoModel)
if sys.modules.get("transformers"): print("transformers was imported")
"""
    modules = users_of_transformers()
    assert "collavo.model.llava" in modules and "collavo.cli.train" in modules
    result = run(FAKED + code, f"transformers={found}", " ".join(modules))
    assert result.returncode == 0, result.stderr
    sentence = SENTENCE.format(found or "none")
    expected = [f"{name}: {sentence}" for name in [*modules, "collavo.CollavoModel"]]
    assert result.stdout.splitlines() == expected


@pytest.mark.parametrize("command", ["demo", "train", "chat", "eval"])
def test_commands_that_need_transformers_say_so_in_one_line(command: str) -> None:
    code = "from collavo.cli import main\nsys.exit(main([sys.argv[2], '--help']))"
    result = run(FAKED + code, "transformers=4.57.6", command)
    assert result.returncode == 2
    assert result.stderr == f"collavo {command}: error: {SENTENCE.format('4.57.6')}\n"


def test_other_commands_need_no_transformers() -> None:
    code = "from collavo.cli import main\nsys.exit(main(['info']))"
    result = run(FAKED + code, "transformers=4.45.2")
    assert result.returncode == 0 and "transformers" in result.stdout, result.stderr


def test_an_older_peft_is_named_before_transformers_fails_at_it() -> None:
    result = run(FAKED + "import collavo.train.trainer", "peft=0.17.1")
    assert "collavo needs peft >= 0.18.1 and found 0.17.1" in result.stderr.splitlines()[-1]
    assert run(FAKED + "import collavo.configuration", "peft=").returncode == 0


def installed(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    """Let one package have another version in this process, or none."""
    real = importlib.metadata.version

    def fake(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    if version is None:
        monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    else:
        monkeypatch.delitem(sys.modules, package, raising=False)


@pytest.mark.parametrize(("version", "shown"), [("0.42.0", "0.42.0"), (None, "none")])
def test_to_bitsandbytes_names_the_version(
    monkeypatch: pytest.MonkeyPatch, version: str | None, shown: str
) -> None:
    installed(monkeypatch, "bitsandbytes", version)
    weight = quantize_nf4(torch.randn(32, 64))
    with pytest.raises(
        ImportError, match=rf"^to_bitsandbytes needs bitsandbytes >= 0.43 and found {shown}; pip"
    ):
        weight.to_bitsandbytes()


@pytest.mark.parametrize(("version", "shown"), [("4.57.6", "4.57.6"), (None, "none")])
def test_register_attention_names_the_version(
    monkeypatch: pytest.MonkeyPatch, version: str | None, shown: str
) -> None:
    installed(monkeypatch, "transformers", version)
    with pytest.raises(
        ImportError, match=rf"^register_attention needs transformers >= 5.5 and found {shown}; pip"
    ):
        register_attention()


def test_the_trainer_names_the_version_of_accelerate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from collavo import CollavoTrainingArguments

    installed(monkeypatch, "accelerate", "0.34.2")
    with pytest.raises(
        ImportError, match=r"^CollavoTrainer needs accelerate >= 1.1 and found 0.34.2; pip"
    ):
        CollavoTrainingArguments(output_dir=str(tmp_path), stage="cpt")


@pytest.mark.parametrize("operator", ["panoptic_lookup", "qlora_linear", "crayon_attention"])
def test_triton_backends_decline_by_version(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """The compiler of triton 3.3 refuses kernels, in the middle of somebody's training."""
    installed(monkeypatch, "triton", "3.3.1")
    triton_reason.cache_clear()
    try:
        backends = {backend.name: backend for backend in operators()[operator].backends}
        assert backends["triton"].unavailable() == "needs triton >= 3.6 and found 3.3.1"
    finally:
        triton_reason.cache_clear()


@pytest.mark.parametrize(
    ("found", "serves"),
    [
        ("5.5.0", True),
        ("5.5", True),
        ("5.5.0.dev0", True),  # a source checkout of the release that is wanted
        ("5.20.1+local", True),
        ("10.0", True),  # numbers, not strings
        ("5.4.0", False),
        ("4.57.6", False),
        ("5", False),
        ("unknown", False),
    ],
)
def test_versions_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, found: str, serves: bool
) -> None:
    installed(monkeypatch, "transformers", found)
    if serves:
        require("transformers", "5.5", "the test")
    else:
        with pytest.raises(RequirementError, match=f"found {re.escape(found)};"):
            require("transformers", "5.5", "the test")


def test_an_imported_source_tree_counts_by_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata are absent, or those of another installation."""
    installed(monkeypatch, "transformers", None)
    module = type(sys)("transformers")
    module.__version__ = "5.18.0.dev0"
    monkeypatch.setitem(sys.modules, "transformers", module)
    require("transformers", "5.5", "the test")


def declared() -> dict[str, str]:
    """Return the bounds of the distribution, by name as Python imports it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for line in project["dependencies"]:
        name, _, bound = line.partition(";")[0].strip().partition(">=")
        bounds[{"pillow": "PIL", "pyyaml": "yaml"}.get(name, name)] = bound
    return bounds


def test_the_declared_bounds_are_those_of_the_code() -> None:
    assert declared()["transformers"] == OLDEST_TRANSFORMERS
    project = (ROOT / "pyproject.toml").read_text()
    assert f"collavo itself needs {OLDEST_WITH_SEAMS}." in project


def test_the_tested_set_is_within_the_declared_bounds() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    for name, bound in declared().items():
        pinned = pins.get({"PIL": "pillow", "yaml": "pyyaml"}.get(name, name))
        if pinned is not None:
            assert [int(n) for n in pinned.split(".")] >= [int(n) for n in bound.split(".")], name


def test_every_imported_package_is_declared() -> None:
    """Whatever another dependency happens to bring can be gone with its next release."""
    own = {"collavo", "collavo_kernels", "benchmarks"}
    optional = {"scipy", "matplotlib", "sentencepiece", "google"}  # extras; google is protobuf
    known = own | optional | set(declared()) | set(sys.stdlib_module_names)
    for package in ("collavo", "collavo_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                unknown = {name.partition(".")[0] for name in names} - known
                assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}"
