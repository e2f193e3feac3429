"""What steps and batches of text alone must not do: move what is for images, or let one wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_llava_stages import Calls, changed, make_trainer, part_of, with_adapters
from test_patched_training import make_patched
from tiny_collavo import MixedRecords, make_collavo

from collavo.train.trainer import CollavoTrainer


def test_adapters_of_image_tokens_stand_still(tmp_path: Path) -> None:
    """Their gradients are zero there, and momentum and weight decay would move them."""
    model = make_patched(adapters=("mine", "other"), image_adapters=("mine",), lora_rank=4).model
    trainer = make_trainer(
        model, tmp_path, adapters=["mine", "other"], weight_decay=0.1, num_train_epochs=3
    )
    calls = Calls(trainer)
    trainer.add_callback(calls)
    trainer.train()
    kinds = [trainer.schedule.kind(step) for step in range(9)]
    assert kinds.index("image") < len(kinds) - 1 - kinds[::-1].index("text")
    for kind, before, after in zip(kinds, calls.steps, calls.steps[1:], strict=False):
        moved = {part_of(name) for name in changed(before, after)}
        assert moved == ({"other"} if kind == "text" else {"projector", "adapters", "other"})


def launched_by(monkeypatch: pytest.MonkeyPatch, **flags: bool) -> None:
    """Let accelerate have set something up, as a launcher or a file can."""
    real = CollavoTrainer.create_accelerator_and_postprocess

    def create(self: CollavoTrainer) -> None:
        real(self)
        for name, value in flags.items():
            setattr(self, name, value)

    monkeypatch.setattr(CollavoTrainer, "create_accelerator_and_postprocess", create)


def test_deepspeed_is_refused_where_such_steps_would_move_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a gradient that is not there for zero, and steps where nobody can drop one."""
    launched_by(monkeypatch, is_deepspeed_enabled=True)
    with pytest.raises(ValueError, match=r"^deepspeed: .* would move projector in steps without"):
        make_trainer(make_collavo(adapters=False), tmp_path)
    make_trainer(make_collavo(adapters=False), tmp_path, MixedRecords(8))
    model = with_adapters(make_collavo(adapters=False))
    make_trainer(model, tmp_path, parts=["adapters"], adapters=["mine"])


def test_fsdp_evaluates_records_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes gather the tower's layers together, so none may have no image alone."""
    launched_by(monkeypatch, is_fsdp_enabled=True)
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)

    def build(held_out: Any) -> CollavoTrainer:
        args = make_trainer(make_collavo(adapters=False), tmp_path).args
        model, data = make_collavo(adapters=False), MixedRecords(8)
        return CollavoTrainer(model, args, data, eval_dataset=held_out)

    with pytest.raises(ValueError, match="eval_dataset: expected records with images or without"):
        build(MixedRecords(6, text_every=2))
    build({"image": MixedRecords(4), "text": MixedRecords(4, text_every=1)})
