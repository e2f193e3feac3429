"""A tiny project: this one's machinery for benchmarks around a package of one function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINERY = (
    "__init__", "base", "base_worker", "comparison", "conftest", "machine", "measure", "peers",
    "registry", "report", "roofline", "timing",
)  # fmt: skip
REGISTRY = """
BENCHMARKS = {
    benchmark.op: benchmark
    for benchmark in (Benchmark("total"), Benchmark("turns", in_turns=True))
}
"""
CASES = """
from benchmarks.registry import Row

def rows(kind):
    for n in (8, 16):
        for provider in ("ours", "peer", "absent"):
            yield Row("{op}", "fwd", f"n={{n}}", provider, quick=n == 8)
"""
PROVIDERS = """
import torch
import collavo_kernels
from benchmarks.registry import Call, Unavailable

PROVIDERS = {"ours": collavo_kernels.total, "peer": torch.sum, "absent": None}

def prepare(row, device):
    if row.provider == "absent":
        raise Unavailable("not installed")
    total, x = PROVIDERS[row.provider], torch.ones(int(row.case[2:]))
    return Call(lambda: total(x), bytes=4 * len(x), error=lambda: 0.0)
"""
BENCH = "def bench_{op}(measure, row):\n    measure(row)\n"
FAST = "def total(x):\n    return x.sum()\n"
# A long way behind what any machine makes of FAST.
SLOW = "import time\n\ndef total(x):\n    time.sleep(0.002)\n    return x.sum()\n"
SETUP = """
import pathlib, sys, sysconfig
text = pathlib.Path("csrc/total.cpp").read_text()
if "broken" in text:
    sys.exit("total.cpp: this does not compile")
suffix = sysconfig.get_config_var("EXT_SUFFIX")
pathlib.Path(f"collavo_kernels/_C{suffix}").write_text("built of " + text)
"""


class Project:
    """The tiny project in a folder.

    Attributes:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in MACHINERY:
            text = (ROOT / "benchmarks" / f"{name}.py").read_text()
            text = text.replace("1 << 28", "1 << 20").replace("(512, 1024, 2048)", "(64,)")
            self.write(f"benchmarks/{name}.py", text + (REGISTRY if name == "registry" else ""))
        self.write("benchmarks/ops/__init__.py", "")
        for op in ("total", "turns"):
            self.write(f"benchmarks/ops/{op}_cases.py", CASES.format(op=op))
            self.write(f"benchmarks/ops/{op}_providers.py", PROVIDERS)
            self.write(f"benchmarks/bench_{op}.py", BENCH.format(op=op))
        self.write("collavo_kernels/__init__.py", FAST)
        self.write("collavo_kernels/info.py", "def processor_name():\n    return 'Tiny'\n")
        peak = (ROOT / "collavo_kernels" / "testing" / "peak_memory.py").read_text()
        self.write("collavo_kernels/testing.py", peak)
        self.write("csrc/total.cpp", "one\n")
        self.write("setup.py", SETUP)
        self.write(".gitignore", "/build/\n*.so\n__pycache__/\n")
        markers = "markers =\n    full: x\n    quick_gpu: x\n"
        self.write(
            "pytest.ini",
            f"[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n{markers}",
        )

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def git(self, *arguments: str) -> str:
        """Run git and return what it says."""
        who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
        result = subprocess.run(
            ["git", *who, *arguments], cwd=self.root, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    def commit(self) -> str:
        """Commit everything, and return the commit."""
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "A step")
        return self.git("rev-parse", "HEAD")

    def bench(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run its benchmarks on one thread of a CPU."""
        command = [sys.executable, "-m", "pytest", "--device=cpu", "--threads=1", *options]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True
        )
