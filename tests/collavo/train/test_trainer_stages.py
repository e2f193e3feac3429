"""Each stage trains exactly what it should; the idle adapter stays still to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_model import make_toy
from transformers import TrainerCallback

from collavo.train.trainer import CollavoTrainer

Build = Callable[..., CollavoTrainer]


def snapshot(trainer: CollavoTrainer) -> dict[str, Tensor]:
    """Every parameter and every tensor of the optimizer's state, by name."""
    model: Any = trainer.model
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state: Any = {} if trainer.optimizer is None else trainer.optimizer.state
    for name, parameter in model.named_parameters():
        for key, value in state.get(parameter, {}).items():
            tensors[f"state of {name}: {key}"] = torch.as_tensor(value).clone()
    return tensors


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    names = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    return {name.removeprefix("state of ").split(":")[0] for name in names}


class Watch(TrainerCallback):
    """Keeps a snapshot per optimizer step, and checks that no flag is toggled."""

    def __init__(self, trainer: CollavoTrainer) -> None:
        self.trainer, self.steps = trainer, [snapshot(trainer)]
        self.flags: list[list[bool]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(snapshot(self.trainer))
        self.flags.append([p.requires_grad for p in kwargs["model"].parameters()])


def adapter(name: str) -> set[str]:
    return {f"lora_a.{name}.weight", f"lora_b.{name}.weight"}


def test_cpt_trains_the_crayon_alone(toy_trainer: Build) -> None:
    trainer = toy_trainer(stage="cpt", max_steps=3)
    before = snapshot(trainer)
    trainer.train()
    assert changed(before, snapshot(trainer)) == {"crayon.weight"}


def test_cit_moves_the_drawn_adapter_and_never_the_other(toy_trainer: Build) -> None:
    """Weight decay and momentum are on: they would move the idle adapter if it had a gradient.

    Two micro-batches per step, gradient clipping (transformers' default) and an image adapter that
    also acts on batches without images.
    """
    trainer = toy_trainer(max_steps=12, gradient_accumulation_steps=2)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    kinds = [trainer.schedule.kind(step) for step in range(12)]
    assert {"image", "vl"} == set(kinds)
    for kind, before, after in zip(kinds, watch.steps, watch.steps[1:], strict=False):
        # VL samples have no image here, so the crayon has no gradient in VL steps.
        expected = adapter(kind) | ({"crayon.weight"} if kind == "image" else set())
        assert changed(before, after) == expected
    assert all(flags == watch.flags[0] for flags in watch.flags)


def test_the_idle_adapter_acts_in_the_forward_pass(toy_trainer: Build) -> None:
    """Frozen is not switched off: another idle adapter gives other gradients to the drawn one."""
    results = []
    for scale in (1.0, 2.0):
        model = make_toy()
        model.lora_b["vl"].weight.data.mul_(scale)
        toy_trainer(model, vl_probability=0.0, max_steps=1).train()
        results.append(model.lora_a["image"].weight.detach().clone())
    assert not torch.equal(*results)


def test_the_optimizer_holds_no_bytes_and_nothing_frozen(toy_trainer: Build) -> None:
    trainer = toy_trainer()
    groups: Any = trainer.create_optimizer().param_groups
    held = {id(p) for group in groups for p in group["params"]}
    model: Any = trainer.model
    names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    assert names == {"crayon.weight"} | adapter("image") | adapter("vl")


def test_accumulated_micro_batches_are_one_big_batch(toy_trainer: Build) -> None:
    """2 x 2 samples and 4 samples: the same step up to the order of float32 sums."""
    weights = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = make_toy()
        toy_trainer(
            model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        ).train()
        weights.append(torch.cat([p.flatten().double() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_float32_adapters(toy_trainer: Build) -> None:
    trainer = toy_trainer(bf16=True, max_steps=4, vl_probability=0.0)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    assert after["lora_a.image.weight"].dtype == torch.float32
    assert adapter("image") | {"crayon.weight"} <= changed(before, after)


def test_the_log_says_which_kinds_ran(toy_trainer: Build) -> None:
    trainer = toy_trainer(max_steps=6, logging_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    counts = [trainer.schedule.counts(0, 3), trainer.schedule.counts(3, 6)]
    assert [{"image": x["image_steps"], "vl": x["vl_steps"]} for x in logs] == counts


def test_models_that_lack_what_a_stage_trains_are_refused(toy_trainer: Build) -> None:
    model = make_toy()
    model.adapters = ()
    with pytest.raises(ValueError, match=r"the model has no 'image'; call model\.add_dual_qlora"):
        toy_trainer(model)
    model = make_toy()
    model.crayon_parameters = lambda: []  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="stage 'cpt' trains the crayon"):
        toy_trainer(model, stage="cpt")
    with pytest.raises(ValueError, match=r"expected a CoLLaVO model .* got Linear"):
        toy_trainer(torch.nn.Linear(2, 2))
