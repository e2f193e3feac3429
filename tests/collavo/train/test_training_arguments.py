"""The paper's hyperparameters are the defaults, and what would break the streams is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.presets import PRESETS


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
        # transformers gives its smoother labels that are not shifted.
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0, got 0.1"),
        (
            {"stage": "align", "average_tokens_across_devices": False},
            "average_tokens_across_devices: expected True",
        ),
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


# Rate, projector's rate, batch, epochs, and what the folder is built with; papers and scripts.
LINEAR, MLP = ("linear", 224), ("mlp2x_gelu", 336)
RECIPES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("llava-1", "align"): (2e-3, None, 128, 1, *LINEAR, "crop", "plain"),
    ("llava-1", "instruct"): (2e-5, None, 32, 3, *LINEAR, "crop", "llava_v0"),
    ("llava-1.5", "align"): (1e-3, None, 256, 1, *MLP, "crop", "plain"),
    ("llava-1.5", "instruct"): (2e-5, None, 128, 1, *MLP, "pad", "vicuna_v1"),
    ("llava-1.5-lora", "align"): (1e-3, None, 256, 1, *MLP, "crop", "plain"),
    ("llava-1.5-lora", "instruct"): (2e-4, 2e-5, 128, 1, *MLP, "pad", "vicuna_v1"),
    ("scienceqa", "align"): (2e-3, None, 128, 1, *LINEAR, "crop", "plain"),
    ("scienceqa", "instruct"): (2e-5, None, 128, 12, *LINEAR, "crop", "v1"),
}
_BUILT = ("projector_type", "image_size", "image_mode", "template")


@pytest.mark.parametrize(("preset", "stage"), RECIPES)
def test_presets_hold_the_papers_numbers(tmp_path: Path, preset: str, stage: str) -> None:
    args = arguments(tmp_path, stage=stage, preset=preset)
    found: list[Any] = [args.learning_rate, args.projector_learning_rate, args.global_batch]
    found += [args.num_train_epochs, *(args.settings()[name] for name in _BUILT)]
    assert tuple(found) == RECIPES[preset, stage]
    assert {one for name in PRESETS for one in PRESETS[name]} == {"align", "instruct"}
    chosen = (args.lr_scheduler_type, args.warmup_steps, args.weight_decay, args.bf16)
    assert chosen == ("cosine", 0.03, 0.0, True) and args.settings()["max_length"] == 2048
    assert args.step_size == args.global_batch
    assert args.optim in ("adamw_torch", "adamw_torch_fused")
    lora = [args.settings().get(f"lora_{name}") for name in ("rank", "alpha", "dropout")]
    if preset == "llava-1.5-lora" and stage == "instruct":
        assert args.adapters == ["instruct"] and args.trained_parts == ("projector", "adapters")
    assert lora == [128, 256.0, 0.05]


def test_without_a_preset_a_stage_has_llava_1_5s_numbers(tmp_path: Path) -> None:
    for stage, adapters, preset in (
        ("align", None, "llava-1.5"),
        ("instruct", None, "llava-1.5"),
        ("instruct", ["instruct"], "llava-1.5-lora"),
    ):
        plain = arguments(tmp_path, stage=stage, adapters=adapters)
        other = arguments(tmp_path, stage=stage, preset=preset)
        for name in (*_ARGUMENTS, "adapters"):
            assert getattr(plain, name) == getattr(other, name)
        assert plain.settings()["template"] == other.settings()["template"]


_ARGUMENTS = ("learning_rate", "projector_learning_rate", "global_batch", "bf16", "warmup_steps")


def test_what_is_given_wins_over_a_preset(tmp_path: Path) -> None:
    given = {"learning_rate": 0.5, "warmup_steps": 7.0, "weight_decay": 0.1, "bf16": False}
    given |= {"num_train_epochs": 2.0, "lr_scheduler_type": "constant", "global_batch": 6}
    given |= {"projector_learning_rate": 0.0}
    args = arguments(tmp_path, stage="instruct", preset="llava-1.5-lora", **given)
    assert {name: getattr(args, name) for name in given} == given
    args = arguments(tmp_path, stage="instruct", preset="llava-1.5-lora", parts=["projector"])
    assert args.adapters is None and args.trained_parts == ("projector",)
    assert arguments(tmp_path, stage="align", fp16=True).bf16 is False
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--stage", "align", "--bf16", "false"]
    (args,) = HfArgumentParser(CollavoTrainingArguments).parse_args_into_dataclasses(words)
    assert args.bf16 is False
    (args,) = HfArgumentParser(CollavoTrainingArguments).parse_args_into_dataclasses(
        [*words[:3], "--stage", "cpt", "--bf16"]
    )
    assert args.bf16 is True


@pytest.mark.parametrize(
    ("given", "micro_batch", "micro_batches", "batch"),
    [
        ({}, 32, 8, 256),
        ({"per_device_train_batch_size": 4}, 4, 64, 256),
        ({"gradient_accumulation_steps": 4}, 64, 4, 256),
        ({"global_batch": 20}, 20, 1, 20),
        ({"global_batch": 94}, 2, 47, 94),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 3, 5, 15),
        ({"global_batch": 12, "per_device_train_batch_size": 3}, 3, 4, 12),
        ({"stage": "cpt"}, 32, 1, 32),
        ({"stage": "cpt", "gradient_accumulation_steps": 2}, 32, 2, 64),
        ({"stage": "cpt", "global_batch": 64}, 32, 2, 64),
    ],
)
def test_micro_batches_follow_from_the_global_batch(
    tmp_path: Path, given: dict[str, Any], micro_batch: int, micro_batches: int, batch: int
) -> None:
    args = arguments(tmp_path, **{"stage": "align", **given})
    found = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.global_batch)
    assert found == (micro_batch, micro_batches, batch) and args.step_size == batch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"global_batch": 10, "per_device_train_batch_size": 4}, "1 devices x 4 samples .* got 10"),
        ({"global_batch": 10, "gradient_accumulation_steps": 4}, "x 4 micro-batches, got 10"),
        ({"global_batch": 0}, "global_batch: expected at least 1, got 0"),
        ({"global_batch": -8}, "global_batch: expected at least 1, got -8"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: .* got 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps: .* got -1"),
        (
            {
                "global_batch": 8,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
            },
            "1 devices x 2 samples per device x 2 micro-batches, got 8",
        ),
        ({"preset": "llava"}, "preset: expected one of 'llava-1', .* got 'llava'"),
        ({"parts": ["head"]}, "parts: expected some of crayon, .* got 'head'"),
        ({"parts": []}, "parts: expected some of crayon, .* got none"),
        (
            {"parts": ["vision"], "projector_learning_rate": 1e-3},
            "projector_learning_rate: expected none, .* to train are vision, got 0.001",
        ),
        ({"adapters": ["a"]}, r"adapters: got \['a'\], but the parts to train are projector"),
        ({"stage": "cit", "adapters": ["a"]}, "stage 'cit' trains 'image' and 'vl'"),
        ({"stage": "cit", "preset": "llava-1"}, "for the stages 'align' or 'instruct', got stage"),
    ],
)
def test_llavas_bad_values_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"stage": "align", **given})


def test_facts_of_cpt_and_cit_are_those_of_earlier_checkpoints(tmp_path: Path) -> None:
    """A key more or less, and no checkpoint of an earlier version could be resumed."""
    facts = arguments(tmp_path, stage="cit", seed=3).stream_facts()
    assert facts == {"stage": "cit", "vl_probability": 0.5, "stream_seed": 3, "step_size": 32}
    other = arguments(tmp_path, stage="instruct", adapters=["a"]).stream_facts()
    assert other["parts"] == ["adapters", "projector"] and other["adapters"] == ["a"]
