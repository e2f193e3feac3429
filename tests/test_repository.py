"""The repository: what lies at its root, and files that only a service or a tool reads."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from collavo_kernels import __version__
from collavo_kernels._native import native

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"benchmarks", "collavo", "collavo_kernels", "csrc", "setup.py", "tests", "README.md"}
EXPECTED_BY_TOOLS = {
    ".ci", ".clang-format", ".github", ".gitignore", ".pre-commit-config.yaml", "ARCHITECTURE.md",
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "SECURITY.md",
    "constraints.txt", "pyproject.toml", "scripts",
}  # fmt: skip
WORKFLOW = ROOT / ".github/workflows/ci.yml"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def ignored(name: str) -> bool:
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def test_the_root_holds_nothing_else() -> None:
    """A file that a run has left here would be committed with the next change: one once was."""
    found = {path.name for path in ROOT.iterdir() if path.name != ".git"}
    found = {name for name in found if not ignored(name)}
    # PKG-INFO and setup.cfg are what a source distribution adds.
    unknown = found - PARTS - EXPECTED_BY_TOOLS - {"PKG-INFO", "setup.cfg"}
    assert not unknown, f"not expected at the root: {sorted(unknown)}"
    assert not PARTS - found, f"missing: {sorted(PARTS - found)}"


def test_the_version_stands_in_one_place() -> None:
    table = project()["project"]
    assert "version" not in table and table["dynamic"] == ["version"]
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == __version__
    module = native()
    if module is not None:
        assert module.build_info()["version"] == __version__, "built before the version changed"


def test_the_version_is_read_without_importing_the_package(tmp_path: Path) -> None:
    """The build has no torch, and an import of collavo_kernels would ask for it."""
    (tmp_path / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == __version__


def test_changelog_has_the_common_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert lines[0] == "# Changelog"
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    for line in versions[1:]:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", line), line
    kinds = {line for line in lines if line.startswith("### ")}
    known = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    assert kinds <= {f"### {kind}" for kind in known}
    # Between releases the version is that of the next one, which the text names.
    released = any(line.startswith(f"## [{__version__}]") for line in versions)
    assert released or f"To be {__version__}" in "\n".join(lines)


def test_citation_names_the_package_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["license"] == project()["project"]["license"]
    assert citation["repository-code"] == project()["project"]["urls"]["Repository"]
    assert "version" not in citation, "the version stands in collavo_kernels/__init__.py"
    (paper,) = citation["references"]
    assert paper["title"].startswith("CoLLaVO") and "2402.11248" in paper["url"]
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert names == ["Byung-Kwan Lee", "Beomchan Park", "Chae Won Kim", "Yong Man Ro"]


def test_hooks_have_the_pinned_versions() -> None:
    """A hook of another version would format what .ci/run then refuses."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        (requirement,) = hook["additional_dependencies"]
        tool, version = requirement.split("==")
        assert hook["entry"].split()[0] == tool
        assert version == pins()[tool], hook["id"]


def workflow() -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text()))


def steps() -> Iterator[dict[str, Any]]:
    for job in workflow()["jobs"].values():
        yield from job["steps"]


def test_workflow_runs_where_the_package_is_said_to() -> None:
    jobs = workflow()["jobs"]
    checks, wheel = (jobs[name]["strategy"]["matrix"] for name in ("checks", "wheel"))
    assert checks["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
    assert [system.partition("-")[0] for system in wheel["os"]] == ["macos", "windows"]
    for version in checks["python"]:
        assert f"Programming Language :: Python :: {version}" in project()["project"]["classifiers"]
    assert [step["run"] for step in jobs["checks"]["steps"] if "run" in step] == [".ci/run"]
    assert workflow()["permissions"] == {"contents": "read"}


def test_workflow_pins_its_actions() -> None:
    """A tag can be moved to other code; a commit cannot."""
    lines = re.findall(r"uses:\s*(.*)", WORKFLOW.read_text())
    assert len(lines) == sum("uses" in step for step in steps())
    for line in lines:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def commands() -> list[str]:
    found = [line for step in steps() for line in step.get("run", "").splitlines()]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_workflow_commands_exist(command: str) -> None:
    program, *words = shlex.split(command)
    if "/" in program:
        assert os.access(ROOT / program, os.X_OK), f"{program} is no executable file here"
    else:
        assert program in ("pip", "pytest", "python")
    for word in words:
        if "/" in word and not word.startswith("dist/"):  # dist/ is what an earlier step builds
            assert (ROOT / word).exists(), word
    if "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    for flag, value in itertools.pairwise(words):
        if flag == "-c":
            assert (ROOT / value).is_file(), value


def test_ci_run_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for arguments in (["--fast"], ["--coco-sample", str(tmp_path / "none")], ["--coco-sample"]):
        command = ["bash", str(ROOT / ".ci/run"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and "usage: .ci/run" in result.stderr, arguments
    assert not list(tmp_path.iterdir())


def test_a_coco_sample_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A mistyped folder must not look like a test that was skipped for want of the photograph."""
    test = ROOT / "tests/ops/panoptic_lookup/test_panoptic_lookup_coco.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    command += ["--coco-sample", str(tmp_path / "nowhere")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "--coco-sample: expected" in result.stdout and "000000142238.jpg" in result.stdout
