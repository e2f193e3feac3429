"""``--base REF``: the packages of another commit, in a process of their own, to take turns with.

Two versions of ``collavo_kernels`` cannot register their operators in one process. The commit's
files are unpacked into ``build/base/tree`` with ``git archive``, which leaves nothing registered in
git, and ``base_worker.py`` runs there: this tree's benchmarks with that tree's packages, so that an
older commit, whose benchmarks may look otherwise, does the same work on the same inputs.

Only files that differ are written, so that the build there is incremental. Where the commit has the
same C++ sources as this tree the modules that are built here are copied instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import torch

from benchmarks.registry import Row, Unavailable

ROOT = Path(__file__).resolve().parents[1]
# Of the commit these are not needed, and its benchmarks would hide this tree's.
LEFT_OUT = ("benchmarks", "tests")
# What a build and a run leave beside the commit's files.
LEAVINGS = ("build", "__pycache__", "collavo_kernels.egg-info")
KEPT = (":!benchmarks/results", ":!benchmarks/plots", ":!benchmarks/RESULTS.md")


class BaseError(Exception):
    """The base cannot be measured; one line says why."""


@dataclass(frozen=True)
class Commit:
    """A commit: as it was asked for, and its names in full and short."""

    ref: str
    sha: str
    short: str


def resolve(ref: str, root: Path = ROOT) -> Commit:
    """Return the commit of a branch, tag or hash; raises ``BaseError``."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.decode().strip()).resolve() != root.resolve():
        raise BaseError(f"--base {ref}: {root} is not a git checkout")
    names = []
    for options in (["--verify"], ["--short"]):
        found = _git(root, "rev-parse", *options, "--end-of-options", f"{ref}^{{commit}}")
        if found.returncode:
            raise BaseError(
                f"--base {ref}: no such commit here; expected a branch, a tag or a hash "
                "('git fetch' gets what a shallow clone lacks)"
            )
        names.append(found.stdout.decode().split()[-1])
    return Commit(ref, *names)


def require_committed(root: Path = ROOT) -> None:
    """Raise ``BaseError`` where this tree is not what its commit says; kept results may differ."""
    status = _git(root, "status", "--porcelain", "--", ".", *KEPT)
    changed = status.stdout.decode().splitlines()
    if changed:
        raise BaseError(
            f"--base with --save-results: a row names a commit, and {len(changed)} files have "
            f"changes that are not committed ({changed[0][3:]}, ...); commit them, or do not save"
        )


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except OSError as error:
        raise BaseError(f"--base needs git: {error}") from error


def unpack(commit: Commit, root: Path, tree: Path) -> None:
    """Make the tree hold the commit's files, and touch no file that has not changed."""
    archive = _git(root, "archive", "--format=tar", commit.sha)
    if archive.returncode:
        raise BaseError(f"--base {commit.ref}: git archive: {_last_line(archive.stderr)}")
    wanted: set[Path] = set()
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        for member in files:
            if not member.isfile() or PurePosixPath(member.name).parts[0] in LEFT_OUT:
                continue
            path, stream = tree / member.name, files.extractfile(member)
            wanted.add(path)
            content = stream.read() if stream else b""
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    for path in _files(tree):
        if path not in wanted:
            path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are no build's or run's leavings."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and path.suffix != ".so" and not set(LEAVINGS) & set(parts):
            yield path


def build(commit: Commit, root: Path, tree: Path, *, cuda: bool) -> str:
    """Give the tree its compiled modules, and say how."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    here, there = (folder / "collavo_kernels" for folder in (root, tree))
    if _sources(root) == _sources(tree):
        for old in there.glob("*.so"):
            old.unlink()
        modules = [here / f"{name}{suffix}" for name in ("_C", "_cuda")]
        for module in filter(Path.is_file, modules):
            shutil.copy2(module, there)
        return "its csrc is this tree's: the modules built here serve both"
    log = tree.parent / "build.log"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, **({} if cuda else {"COLLAVO_BUILD_CUDA": "0"})}
    with log.open("wb") as stream:
        done = subprocess.run(command, cwd=tree, env=environment, stdout=stream, stderr=stream)
    if done.returncode:
        raise BaseError(
            f"--base {commit.ref}: its modules do not build: {_last_line(log.read_bytes())} "
            f"(all of it: {log})"
        )
    return "its csrc is another: built"


def _sources(folder: Path) -> dict[str, bytes]:
    """Return what the compiled modules are made of."""
    paths = [path for path in (folder / "csrc").rglob("*") if path.is_file()]
    paths = [*filter(lambda path: path.suffix != ".md", paths), folder / "setup.py"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def share_cores(threads: int) -> None:
    """Let this process and those it starts run on as many cores as it has threads.

    Both sides then have the same cores; they never run at the same time.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-threads:])


class Base:
    """The process that times the other commit; use it as a context, or close it.

    Args:
        commit: What to measure.
        kind: ``cpu`` or ``cuda``.
        device: Where it runs.
        root: The checkout whose registry and history are used.

    Attributes:
        note: How its modules came to be.

    Raises:
        BaseError: where it cannot be built or started, in one line.
    """

    def __init__(self, commit: Commit, kind: str, device: torch.device, root: Path = ROOT) -> None:
        self.commit = commit
        folder = root / "build" / "base"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locked(folder / "lock"))
            tree = folder / "tree"
            unpack(commit, root, tree)
            self.note = build(commit, root, tree, cuda=kind == "cuda")
            self._log = folder / "worker.log"
            errors = stack.enter_context(self._log.open("w"))
            self._process = self._start(kind, device, tree, root, errors)
            stack.callback(self._stop)
            self._greet(tree)
            self._stack = stack.pop_all()

    def _locked(self, path: Path) -> contextlib.ExitStack:
        """Return what holds the folder against other runs, where the system has such locks."""
        stack = contextlib.ExitStack()
        lock = stack.enter_context(path.open("w"))
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                stack.close()
                raise BaseError(
                    f"--base {self.commit.ref}: another run uses {path.parent}; wait for its end"
                ) from error
        return stack

    def _start(
        self, kind: str, device: torch.device, tree: Path, root: Path, errors: TextIO
    ) -> subprocess.Popen[str]:
        paths = [str(tree), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Without -P the current folder would come before the tree.
        command = [sys.executable, "-P", "-m", "benchmarks.base_worker", "--kind", kind]
        command += ["--device", str(device), "--threads", str(torch.get_num_threads())]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            text=True,
        )

    def _greet(self, tree: Path) -> None:
        package = Path(self._answer()["package"])
        if not package.resolve().is_relative_to(tree.resolve()):
            raise BaseError(
                f"--base {self.commit.ref}: expected its packages, but {package} was imported"
            )

    def prepare(self, row: Row) -> None:
        """Make the other side ready for a row; raises ``Unavailable`` where it cannot have it."""
        answer = self._ask({"op": row.op, "row": row.name})
        reason = answer.get("unavailable") or answer.get("error")
        if reason:
            raise Unavailable(f"at {self.commit.short}: {reason}")

    def stretch(self, seconds: float) -> list[float]:
        """Return seconds per call of the row, measured for that long."""
        answer = self._ask({"seconds": seconds})
        if "times" not in answer:
            raise BaseError(f"--base {self.commit.ref}: {answer.get('error', answer)}")
        return [float(each) for each in answer["times"]]

    def close(self) -> None:
        """End the process and let the folder go."""
        self._stack.close()

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        line = stdout.readline() if stdout else ""
        if not line.endswith("\n"):
            self._process.wait()
            raise BaseError(
                f"--base {self.commit.ref}: its process ended: "
                f"{_last_line(self._log.read_bytes())} (all of it: {self._log})"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
