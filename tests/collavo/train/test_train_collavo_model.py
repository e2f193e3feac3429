"""The trainer with the real model: 4-bit weights, both crayon modes, the package's operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_vision
from tiny_collavo import IMAGE_TOKEN, VOCABULARY, CollavoRecords, make_collavo
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from collavo import apply_to_llava, load_pretrained
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.trainer import CollavoTrainer
from collavo_kernels.nn import DualQLoRALinear


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., CollavoTrainer]:
    def make(
        model: Any, folder: str = "run", *, vl_text_every: int = 0, **changes: Any
    ) -> CollavoTrainer:
        options: dict[str, Any] = {
            "stage": "cit",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        args = CollavoTrainingArguments(output_dir=str(tmp_path / folder), **{**options, **changes})
        vl = CollavoRecords("vl", text_every=vl_text_every)
        return CollavoTrainer(model, args, CollavoRecords("image"), vl)

    return make


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def parts_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Sort the changed tensors into crayon, image, vl, and whatever should not be there."""
    found = set()
    for name in before:
        if not torch.equal(before[name], after[name]):
            words = set(name.split("."))
            lora = words & {"image", "vl"} if words & {"lora_A", "lora_B"} else set()
            found |= lora or ({"crayon"} if "crayon" in name else {name})
    return found


@pytest.mark.parametrize("mode", ["projection", "attention"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stage": "cpt"}, {"crayon"}),
        ({"vl_probability": 0.0}, {"crayon", "image"}),
        ({"vl_probability": 1.0}, {"crayon", "vl"}),
        # Text alone: the crayon's gradient is zero, and its weight decays.
        ({"vl_probability": 1.0, "vl_text_every": 1}, {"crayon", "vl"}),
        ({"vl_probability": 1.0, "vl_text_every": 1, "weight_decay": 0.0}, {"vl"}),
    ],
    ids=["cpt", "image", "vl", "vl-text-decay", "vl-text"],
)
def test_what_is_trained(
    build: Callable[..., CollavoTrainer], mode: str, options: dict[str, Any], expected: set[str]
) -> None:
    model = make_collavo(mode)
    before = state(model)
    build(model, **options).train()
    assert parts_changed(before, state(model)) == expected


def reaches_the_loss(name: str) -> bool:
    """Whether a crayon parameter can matter: behind the last layer's attention no text token looks.

    There, what is added to an image token's output, gate and up projections stays in that token.
    """
    return "layers.1." not in name or "crayon_qkv" in name


def test_every_crayon_factor_of_the_projection_mode_is_trained(
    build: Callable[..., CollavoTrainer],
) -> None:
    """Each projection's own A_seg and B_seg, in every layer, and both query tables."""
    model = make_collavo("projection")
    before = state(model)
    build(model, stage="cpt", weight_decay=0.0).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(model.crayon_parameters())) == 22
    after = state(model)
    moved = {name for name in trained if not torch.equal(before[name], after[name])}
    assert moved == {name for name in trained if reaches_the_loss(name)}


def test_resumed_equals_straight_through_and_loads_as_saved(
    build: Callable[..., CollavoTrainer], tmp_path: Path
) -> None:
    """Bytes of the 4-bit weights included; the checkpoint is a model folder like any other."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "vl_text_every": 1}
    straight = make_collavo()
    build(straight, **options).train()
    resumed = make_collavo()
    for parameter in resumed.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    build(resumed, "again", **options).train(resume_from_checkpoint=str(checkpoint))
    one, two = straight.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded = CollavoForConditionalGeneration.from_pretrained(checkpoint.with_name("checkpoint-6"))
    assert all(torch.equal(value, one[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("mode", ["projection", "attention"])
def test_activation_checkpointing_changes_nothing(
    build: Callable[..., CollavoTrainer], mode: str
) -> None:
    """Recomputed layers see the same crayon tables: the gradients are equal to the bit."""
    new = "activation_checkpointing" in CollavoTrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if new else "gradient_checkpointing"
    trained = []
    for enabled in (False, True):
        model = make_collavo(mode)
        build(model, **{option: enabled}).train()
        trained.append(state(model))
    assert not parts_changed(*trained)


def test_bfloat16_trains_all_parts(build: Callable[..., CollavoTrainer]) -> None:
    model = make_collavo()
    before = state(model)
    trainer = build(model, bf16=True, max_steps=6, logging_steps=1)
    trainer.train()
    assert parts_changed(before, state(model)) == {"crayon", "image", "vl"}
    assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("mode", ["projection", "attention"])
@pytest.mark.parametrize("stage", ["cpt", "cit"])
def test_a_bfloat16_model_trains_its_own_parts_in_float32(
    build: Callable[..., CollavoTrainer], tmp_path: Path, mode: str, stage: str
) -> None:
    """A step of 1e-5 is lost in a bfloat16 weight of 0.1; it must arrive, and survive the file."""
    model = make_collavo(mode).to(torch.bfloat16)
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    trainer = build(model, stage=stage, learning_rate=1e-5, vl_probability=0.0, weight_decay=0.0)
    trainer.train()
    trainer.save_model()
    for name, parameter in model.named_parameters():
        if "crayon" in name and reaches_the_loss(name):
            # Two steps of Adam; in bfloat16 a weight of 0.2 would move by 4e-4 or not at all.
            assert 0 < float((parameter.detach() - before[name]).abs().max()) < 3e-5
    assert {p.dtype for p in model.crayon_parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    loaded = CollavoForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)


def patched_llava() -> Any:
    torch.manual_seed(6)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tiny_vision(),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    model: Any = LlavaForConditionalGeneration(config)
    apply_to_llava(model, adapters=("image", "vl"), lora_rank=4, quantize="nf4")
    return model


def test_a_patched_llava_is_trained_and_resumed(build: Callable[..., CollavoTrainer]) -> None:
    """transformers saves a LLaVA model under old names, which Trainer's resume would not find."""

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = patched_llava()
    trainer = build(straight, **options)
    before = state(straight)
    trainer.train()
    assert parts_changed(before, state(straight)) == {"crayon", "image", "vl"}
    resumed = patched_llava()
    folder = Path(str(trainer.args.output_dir)) / "checkpoint-3"
    build(resumed, "again", **options).train(resume_from_checkpoint=str(folder))
    expected = state(straight)
    assert all(torch.equal(value, expected[name]) for name, value in state(resumed).items())
    trainer.save_model()
    loaded = state(load_pretrained(str(trainer.args.output_dir)))
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())


@pytest.mark.parametrize("patched", [False, True])
def test_a_loaded_adapters_scaling_is_resumed(
    build: Callable[..., CollavoTrainer], patched: bool
) -> None:
    """The resumed model may be made from the folder that the adapter was not loaded into."""

    def make() -> Any:
        return patched_llava() if patched else make_collavo()

    def scalings(model: torch.nn.Module) -> list[dict[str, float]]:
        return [m.scaling for m in model.modules() if isinstance(m, DualQLoRALinear)]

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight, resumed = make(), make()
    for each in scalings(straight):
        each["vl"] = 0.3
    trainer = build(straight, **options)
    trainer.train()
    folder = Path(str(trainer.args.output_dir)) / "checkpoint-2"
    build(resumed, "again", **options).train(resume_from_checkpoint=str(folder))
    assert scalings(resumed) == scalings(straight)
    expected = state(straight)
    assert all(torch.equal(value, expected[name]) for name, value in state(resumed).items())
