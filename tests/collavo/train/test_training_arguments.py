"""The paper's hyperparameters are the defaults, and what would break the streams is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from collavo.train.arguments import CollavoTrainingArguments


def arguments(tmp_path: Path, **changes: Any) -> CollavoTrainingArguments:
    return CollavoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(("stage", "rate"), [("cpt", 1e-4), ("cit", 1e-5)])
def test_the_papers_hyperparameters_are_the_defaults(
    tmp_path: Path, stage: str, rate: float
) -> None:
    args = arguments(tmp_path, stage=stage)
    # DeepSpeed's optimizers lack what transformers divides ``min_lr`` by.
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (rate, {"min_lr_rate": 1e-6 / rate})
    assert args.optim == "adamw_torch" or args.optim == "adamw_torch_fused"
    assert (args.per_device_train_batch_size, args.num_train_epochs) == (32, 1.0)
    assert args.ddp_find_unused_parameters is True
    assert args.remove_unused_columns is False
    assert args.step_size == 32


def test_given_values_win(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=0.5, lr_scheduler_type="constant", data_seed=9)
    assert args.learning_rate == 0.5
    assert not args.lr_scheduler_kwargs
    assert args.stream_seed == 9


def test_the_command_line_parses_the_stage(tmp_path: Path) -> None:
    parser = HfArgumentParser(CollavoTrainingArguments)
    words = ["--output_dir", str(tmp_path), "--stage", "cit", "--use_cpu", "--vl_probability", "1"]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert (args.stage, args.vl_probability, args.learning_rate) == ("cit", 1.0, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft"}, "stage: expected one of 'cpt', 'cit', 'align', 'instruct', got 'sft'"),
        ({"vl_probability": -0.1}, "vl_probability: expected 0 to 1"),
        ({"ignore_data_skip": True}, "ignore_data_skip: expected False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: expected False"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is not supported"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_activation_checkpointing_is_the_kind_that_works(tmp_path: Path) -> None:
    """Re-entrant checkpointing loses the crayon; see also the explicit find-unused flag above."""
    new = "activation_checkpointing" in CollavoTrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    args = arguments(tmp_path, **{name: True})
    assert getattr(args, f"{name}_kwargs") == {"use_reentrant": False}
