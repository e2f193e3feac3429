"""Checkpoints of the trained tensors alone: they resume like whole ones, on their own base only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_collavo import CollavoRecords, MixedRecords, make_collavo
from torch import Tensor
from transformers import TrainerCallback

from collavo import load_pretrained
from collavo.train import CollavoTrainer, CollavoTrainingArguments, load_trained, trained_only
from collavo.train.saving import SaveError
from collavo.train.stages import prepare_stage
from collavo_kernels.nn import DualQLoRALinear

Build = Callable[..., CollavoTrainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(model: Any = None, folder: str = "run", **changes: Any) -> CollavoTrainer:
        options: dict[str, Any] = {
            "stage": "cit",
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_trained_only": True,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "seed": 3,
        }
        args = CollavoTrainingArguments(output_dir=str(tmp_path / folder), **{**options, **changes})
        vl = CollavoRecords("vl", text_every=1) if args.stage == "cit" else None
        model = make_collavo() if model is None else model
        held_out = None if args.eval_strategy == "no" else CollavoRecords("image", size=3)
        train = CollavoRecords("image") if args.stage in ("cpt", "cit") else MixedRecords()
        return CollavoTrainer(model, args, train, vl, eval_dataset=held_out)

    return make


class StopAfter(TrainerCallback):
    """Ends training in the middle of the schedule, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def same(one: Any, two: Any) -> bool:
    """Whether two models hold the same bits."""
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "cpt": ("cpt", make_collavo),
    "cit": ("cit", make_collavo),
    "align": ("align", lambda: make_collavo("none", adapters=False)),
    "align-nf4": ("align", lambda: in_4_bits()),
    "instruct": ("instruct", lambda: make_collavo("none", adapters=False)),
}


def in_4_bits() -> Any:
    return make_collavo("none", adapters=False).add_dual_qlora((), quantize=True)


@pytest.mark.parametrize("kind", MODELS)
def test_resumed_equals_straight_through(build: Build, tmp_path: Path, kind: str) -> None:
    """And the run with whole checkpoints; 4-bit weights are repacked by the forward in between."""
    stage, make = MODELS[kind]
    straight = build(make(), "straight", stage=stage, save_trained_only=False)
    straight.train()
    first = build(make(), stage=stage)
    first.add_callback(StopAfter(4))
    first.train()
    assert trained_only.holds_trained_only(tmp_path / "run/checkpoint-4")
    second = build(make(), stage=stage)
    second.train(resume_from_checkpoint=True)
    assert same(straight.model, second.model)
    assert straight.state.log_history[-1]["train_loss"] != 0


def test_a_checkpoint_holds_what_is_trained_and_the_last_one_all(
    build: Build, tmp_path: Path
) -> None:
    trainer = build(stage="cit")
    trainer.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    first, last = tmp_path / "run/checkpoint-2", tmp_path / "run/checkpoint-6"
    assert load_file(first / trained_only.WEIGHTS).keys() == trained
    assert not (first / "config.json").exists()
    assert same(load_pretrained(last), trainer.model)
    again = build(stage="cit", max_steps=8)
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == 8


def other_tower(model: Any) -> None:
    next(model.model.vision_tower.parameters()).data[0] += 1e-3


def other_4_bits(model: Any) -> None:
    layer = next(m for m in model.modules() if isinstance(m, DualQLoRALinear))
    layer.weight.data.view(-1)[-1] += 1


def other_scaling(model: Any) -> None:
    layer = next(m for m in model.modules() if isinstance(m, DualQLoRALinear))
    layer.scaling["vl"] *= 0.5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (other_tower, "model.vision_tower"),
        (other_4_bits, "q_proj.weight"),
        (other_scaling, r"q_proj.lora_scaling.vl"),
        (lambda model: model.model.to(torch.bfloat16), "bfloat16"),
    ],
    ids=["tower", "4 bits", "scaling", "dtype"],
)
def test_another_base_is_refused_before_the_first_step(
    build: Build, tmp_path: Path, change: Callable[[Any], Any], name: str
) -> None:
    """One byte of one tensor is enough; a whole checkpoint would bring its own base."""
    build().train()
    model = make_collavo()
    change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = build(model)
    with pytest.raises(ValueError, match=f"checkpoint-2: belongs to another base.*{name}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert trainer.state.global_step == 0
    after = model.state_dict()
    assert all(torch.equal(value.to(after[key].dtype), after[key]) for key, value in before.items())


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["model.crayon_prompt.class_embedding.weight"]


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors["model.crayon_prompt.class_embedding.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "this run trains model.crayon_prompt.class_embedding.weight and it does not"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "it trains more and this run does"),
        (reshape_one, r"class_embedding.weight: expected .*, got torch.float32 \[3\]"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_other_trained_tensors_are_named(
    build: Build, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    build().train()
    folder = tmp_path / "run/checkpoint-2"
    tensors = load_file(folder / trained_only.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / trained_only.WEIGHTS)
    sealed = json.loads((folder / "collavo_streams.json").read_text())
    sealed["files"][trained_only.WEIGHTS] = (folder / trained_only.WEIGHTS).stat().st_size
    (folder / "collavo_streams.json").write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match=message):
        build().train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("name", [trained_only.WEIGHTS, trained_only.BASE])
def test_a_missing_or_halved_file_is_named(build: Build, tmp_path: Path, name: str) -> None:
    build().train()
    path = tmp_path / "run/checkpoint-2" / name
    if path.suffix == ".safetensors":  # what a person may have edited is read, not measured
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"{name}: expected \d+ bytes, got"):
            build().train(resume_from_checkpoint=str(path.parent))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        build().train(resume_from_checkpoint=str(path.parent))


def test_a_user_loads_a_middle_checkpoint(build: Build, tmp_path: Path) -> None:
    trainer = build()
    trainer.add_callback(StopAfter(2))
    trainer.train()
    model = make_collavo()
    prepare_stage(model, "cit")
    load_trained(model, tmp_path / "run/checkpoint-2")
    assert same(model, trainer.model)


def test_the_best_model_is_loaded_from_trained_tensors(build: Build, tmp_path: Path) -> None:
    """transformers would warn that it finds no checkpoint there, and keep the last weights."""
    trainer = build(
        max_steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run/checkpoint-2")
    stored = load_file(tmp_path / "run/checkpoint-2" / trained_only.WEIGHTS)
    own = dict(trainer.model.named_parameters())  # type: ignore[union-attr]
    assert all(torch.equal(own[name], value) for name, value in stored.items())


def test_what_cannot_be_written_is_said_before_the_first_step(build: Build, tmp_path: Path) -> None:
    (tmp_path / "run" / trained_only.WEIGHTS).mkdir(parents=True)
    trainer = build()
    with pytest.raises(SaveError, match=f"{trained_only.WEIGHTS}: expected no folder"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_offloaded_base_is_refused() -> None:
    model = torch.nn.Linear(2, 2, device="meta").requires_grad_(False)
    with pytest.raises(ValueError, match="save_trained_only: weight is offloaded"):
        trained_only.base_fingerprint(model)


def test_a_fingerprint_follows_from_the_bytes_alone() -> None:
    """Not from the order that a forward brings 4-bit weights into, nor from threads."""
    model = in_4_bits()
    prepare_stage(model, "align")
    before = trained_only.base_fingerprint(model)
    with torch.no_grad():
        model(**{k: v[None] for k, v in CollavoRecords("image")[0].items() if "crayon" not in k})
    assert trained_only.base_fingerprint(model) == before
    assert not any("multi_modal_projector" in name for name in before)
