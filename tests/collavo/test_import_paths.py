"""What can be imported, from where, and in which order."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collavo.configuration import CollavoConfig
from collavo.train.arguments import CollavoTrainingArguments

ROOT = Path(__file__).resolve().parents[2]
# What was written down before the packages were ordered by subject, and what people import.
PATHS = {
    "collavo": [
        "CollavoConfig",
        "CollavoForConditionalGeneration",
        "CollavoModel",
        "CollavoProcessor",
        "CollavoTextConfig",
        "CollavoTrainer",
        "CollavoTrainingArguments",
        "apply_to_llava",
        "convert_state_dict",
        "load_pretrained",
        "register_attention",
    ],
    "collavo.cli": ["COMMANDS", "main"],
    "collavo.cli.train": ["add_arguments", "run"],
    "collavo.configuration": ["CollavoConfig", "CollavoTextConfig"],
    "collavo.convert": ["convert_state_dict", "resize_position_embedding", "unpack_wqkv"],
    "collavo.evaluation": ["answer_questions", "box_questions"],
    "collavo.loading": ["load_folder", "load_pretrained", "read_tensors", "weight_files"],
    "collavo.modeling": ["CollavoForConditionalGeneration", "CollavoModel"],
    "collavo.panoptic": [
        "CachedSegmenter",
        "CocoPanopticDataset",
        "PanopticMap",
        "PrepareReport",
        "PrepareSettings",
        "PreparedDataset",
        "PreparedSample",
        "SampleStream",
        "SkipLog",
        "TransformersSegmenter",
        "draw_scene",
        "prepare_folder",
        "save_scene",
        "write_panoptic_png",
    ],
    "collavo.panoptic.coco": ["find_panoptic_map", "read_image", "read_image_size"],
    "collavo.panoptic.maps": ["PanopticMap", "read_panoptic_colours"],
    "collavo.panoptic.text": ["detections_from_map", "format_objects"],
    "collavo.processing": ["IGNORE_INDEX", "CollavoProcessor", "make_image_processor"],
    "collavo.processing.processor": ["CollavoProcessor", "make_image_processor"],
    "collavo.train": [
        "CollavoTrainer",
        "CollavoTrainingArguments",
        "ConversationDataset",
        "CrayonCollator",
        "CrayonInstructionDataset",
        "StepSchedule",
    ],
    "collavo.train.arguments": ["CollavoTrainingArguments"],
    "collavo.train.checkpoint": [],
    "collavo.train.collator": ["CrayonCollator"],
    "collavo.train.dataset": ["ConversationDataset", "CrayonInstructionDataset"],
    "collavo.train.sampler": ["StepSampler"],
    "collavo.train.schedule": ["StepSchedule"],
    "collavo.train.sharding": [],
    "collavo.train.stages": ["drop_idle_gradients", "prepare_stage"],
    "collavo.train.trainer": ["CollavoTrainer"],
    "collavo_kernels.nn": [
        "CrayonAttention",
        "CrayonInputs",
        "CrayonPrompt",
        "DualQLoRALinear",
        "load_peft_adapter",
        "register_attention",
        "save_peft_adapter",
    ],
    "collavo_kernels.nn.peft_exchange": ["load_peft_adapter", "save_peft_adapter"],
}
MOVED = {
    "collavo.panoptic": ["collavo.prepared", "collavo.pictures"],
    "collavo.modeling": ["collavo.model.llava"],
    "collavo.convert": ["collavo.conversion"],
    "collavo_kernels.nn.peft_exchange": ["collavo_kernels.nn"],
}
PUBLIC = tuple(f"collavo_kernels{part}" for part in ("", ".info", ".nn", ".testing"))


@pytest.mark.parametrize("path", PATHS)
def test_names_are_where_they_were(path: str) -> None:
    module = importlib.import_module(path)
    missing = [name for name in PATHS[path] if not hasattr(module, name)]
    assert not missing, f"{path} has lost {missing}"


@pytest.mark.parametrize("path", MOVED)
def test_a_moved_name_is_one_thing(path: str) -> None:
    """The same object under both paths: an isinstance or a pickle does not depend on which."""
    old = importlib.import_module(path)
    homes = [importlib.import_module(home) for home in MOVED[path]]
    moved = [(home, name) for home in homes for name in PATHS[path] if hasattr(home, name)]
    assert moved
    for home, name in moved:
        assert getattr(old, name) is getattr(home, name), name


def test_panoptic_answers_for_all_that_left_it() -> None:
    for home in ("collavo.prepared", "collavo.pictures"):
        assert set(importlib.import_module(home).__all__) <= set(PATHS["collavo.panoptic"])


@pytest.mark.parametrize(
    "path", ["collavo.processing.processing", "collavo.modelling", "collavo.panoptic.prepared_data"]
)
def test_a_path_that_never_was_is_no_module(path: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(path)


@pytest.mark.parametrize("path", ["collavo", "collavo.panoptic", "collavo.train"])
def test_a_module_that_answers_for_others_knows_its_own_limits(path: str) -> None:
    """A ``__getattr__`` that answers for anything would hide every slip of the pen."""
    module = importlib.import_module(path)
    with pytest.raises(AttributeError, match=rf"module '{path}' has no attribute 'Procesor'"):
        _ = module.Procesor


def test_what_is_saved_names_no_module(tiny_processor: Callable[..., Any], tmp_path: Path) -> None:
    """Modules may move: folders name classes, and a run's arguments lie where they always did."""
    CollavoConfig(architectures=["CollavoForConditionalGeneration"]).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.json")}
    assert {"config.json", "processor_config.json"} <= set(texts)
    assert not [name for name, text in texts.items() if "collavo." in text]
    assert CollavoTrainingArguments.__module__ == "collavo.train.arguments"  # training_args.bin


# Operators can be registered once per process, so each module has a process; of the kernels, none
# has anything before. What is loaded above the line is not ours and is loaded once.
FIRST_OF_THE_KERNELS = """
import os, sys, traceback
import torch
failed = []
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(module)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(module)
sys.exit(", ".join(failed) or 0)
"""
# The kernels import nothing of collavo, so they stay while collavo is forgotten each time.
FIRST_OF_COLLAVO = """
import importlib, sys, traceback
failed = []
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.partition(".")[0] == "collavo"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except Exception:
        traceback.print_exc()
        failed.append(module)
sys.exit(", ".join(failed) or 0)
"""


def modules(package: str) -> Iterator[str]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name != "__main__.py":
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            yield name.removesuffix(".__init__")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "code"),
    [("collavo_kernels", FIRST_OF_THE_KERNELS), ("collavo", FIRST_OF_COLLAVO)],
    ids=["collavo_kernels", "collavo"],
)
def test_every_module_can_be_imported_first(package: str, code: str) -> None:
    """A user, or a worker that unpickles, begins anywhere; a circle shows from some places."""
    if "os.fork" in code and not hasattr(os, "fork"):
        pytest.skip("this system has no os.fork")
    names = list(modules(package))
    assert len(names) > 40
    command = [sys.executable, "-c", code, *names]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file imports from ``collavo_kernels``; name "" for a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def is_public(module: str, name: str) -> bool:
    if not name:
        return module in PUBLIC
    if f"{module}.{name}" in PUBLIC:
        return True
    return module in PUBLIC and name in importlib.import_module(module).__all__


def test_only_public_names_of_the_kernels_are_used() -> None:
    """What ``collavo`` needs, others will need too: it is exported, documented and kept."""
    found = 0
    for path in sorted((ROOT / "collavo").rglob("*.py")):
        for module, name in imported(path):
            if module.partition(".")[0] == "collavo_kernels":
                found += 1
                assert is_public(module, name), f"{path.relative_to(ROOT)}: {module} {name}"
    assert found > 20
