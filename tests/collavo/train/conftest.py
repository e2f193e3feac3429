"""A tiny trainer for the tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_model import ToyData, make_toy

from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.trainer import CollavoTrainer


@pytest.fixture
def toy_trainer(tmp_path: Path) -> Callable[..., CollavoTrainer]:
    """Build a trainer of the toy model: ``toy_trainer(stage="cit", max_steps=4, ...)``."""

    def build(model: Any = None, folder: str = "run", **changes: Any) -> CollavoTrainer:
        options = {
            "stage": "cit",
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        args = CollavoTrainingArguments(output_dir=str(tmp_path / folder), **{**options, **changes})
        model = make_toy() if model is None else model
        return CollavoTrainer(model, args, ToyData("image"), ToyData("vl"))

    return build
