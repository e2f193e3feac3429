#!/usr/bin/env python3
"""Run transformers' own model tests on stock vision-language models and on the same, patched.

  scripts/check_mixins.py [--tests FOLDER] [--family NAME ...] [--only TEST]

The tests are those that transformers ships in its source distribution (``ModelTesterMixin``); it is
fetched by pip unless --tests names the folder ``tests`` of one. It needs ``parameterized`` beside
what the tests need; those of generation are not shipped. The models are the tiny ones of this
project's tests. Prints, for each family, how many tests pass stock and patched, and each test
that fails patched alone, with its reason; ends with 1 where one has no reason in ``EXPECTED``.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
FAMILIES = ("llava", "llava_next", "vipllava", "internvl", "mistral3")
SUITE = "transformers_tests"
# What a patched model does otherwise than a stock one, and why.
_STOCK_FOLDER = "a folder or configuration of a stock model is refused, naming what to do"
_OWN_NAMES = "it is saved by the names it has, never by those of older versions"
EXPECTED = {
    "test_base_model_prefix_loads_base_weights": _STOCK_FOLDER,
    "test_can_init_all_missing_weights": _STOCK_FOLDER,
    "test_correct_missing_keys": _STOCK_FOLDER,
    "test_from_pretrained_no_checkpoint": _STOCK_FOLDER,
    "test_model_weights_reload_no_missing_tied_weights": "a tensor without a place is refused",
    "test_reverse_loading_mapping": _OWN_NAMES,
}


def fetched(version: str) -> Path:
    """Return the folder ``tests`` of a source distribution, after fetching it."""
    folder = ROOT / "build" / "mixins"
    tests = folder / f"transformers-{version}" / "tests"
    if not tests.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, "-d", folder, f"transformers=={version}"],
            check=True,
        )
        with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return tests


def mixin(tests: Path) -> Any:
    """Import ``ModelTesterMixin``; what its file imports beside it is not shipped with it."""
    package = types.ModuleType(SUITE)
    package.__path__ = [str(tests)]
    sys.modules[SUITE] = package
    for path, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent = path.split(".", maxsplit=1)[0]
        sys.modules[f"{SUITE}.{parent}"] = types.ModuleType(f"{SUITE}.{parent}")
        module: Any = types.ModuleType(f"{SUITE}.{path}")
        setattr(module, name, type(name, (), {}))
        sys.modules[f"{SUITE}.{path}"] = module
    from importlib import import_module

    return import_module(f"{SUITE}.test_modeling_common").ModelTesterMixin


def suite(name: str, base: Any, *, patched: bool) -> type[unittest.TestCase]:
    """Return the tests of one family."""
    from collavo.model.patched import patched_class
    from tests.collavo.model.tiny_families import make_family, make_inputs

    stock = type(make_family(name))
    config = make_family(name).config
    inputs = make_inputs(name, [1, 1])
    if not patched:
        inputs = {key: value for key, value in inputs.items() if not key.startswith("crayon")}
    crayon = {"decoder": {"crayon_mode": "attention", "adapters": ["vl"], "lora_rank": 2}}

    class Patched(patched_class(stock)):  # type: ignore[misc]
        """Takes the family's plain configuration, as the tests give it."""

        def __init__(self, config: Any) -> None:
            if not hasattr(config, "base"):
                config = copy.deepcopy(config)
                config.crayon = crayon
            super().__init__(config)

    Patched.__name__ = stock.__name__

    class Tester:
        """What the tests ask of a model's tester."""

        batch_size, seq_length, is_training = 2, inputs["input_ids"].shape[1], True

        def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
            return copy.deepcopy(config), copy.deepcopy(inputs)

    class Tests(base, unittest.TestCase):  # type: ignore[misc]
        all_model_classes = (Patched if patched else stock,)
        _is_composite = True
        test_resize_embeddings = True

        def setUp(self) -> None:
            self.model_tester = Tester()

    return Tests


def outcomes(tests: type[unittest.TestCase], only: str) -> dict[str, str]:
    """Run tests; returns by name "ok", "skipped" or the error's last line."""
    found: dict[str, str] = {}
    for name in unittest.TestLoader().getTestCaseNames(tests):
        if only not in name:
            continue
        result = unittest.TestResult()
        tests(name).run(result)
        wrong = [*result.failures, *result.errors]
        if wrong:
            found[name] = " ".join(wrong[0][1].strip().splitlines()[-1].split())[:200]
        else:
            found[name] = "skipped" if result.skipped else "ok"
    return found


def main() -> int:
    """Compare the families; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, help="the folder tests of a source distribution")
    parser.add_argument("--family", nargs="+", default=FAMILIES, help="of tests/collavo")
    parser.add_argument("--only", default="", help="tests whose names have this in them")
    given = parser.parse_args()
    import transformers

    base = mixin(given.tests or fetched(transformers.__version__))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    status = 0
    for name in given.family:
        stock = outcomes(suite(name, base, patched=False), given.only)
        patched = outcomes(suite(name, base, patched=True), given.only)
        counts = [sum(value == "ok" for value in each.values()) for each in (stock, patched)]
        print(f"{name}: {len(stock)} tests, {counts[0]} pass stock, {counts[1]} patched")
        for test, outcome in patched.items():
            if outcome in ("ok", "skipped") or stock[test] not in ("ok", "skipped"):
                continue
            print(f"  {test}: {outcome} ({EXPECTED.get(test, 'NOT EXPECTED')})")
            status |= test not in EXPECTED
    return status


if __name__ == "__main__":
    sys.exit(main())
