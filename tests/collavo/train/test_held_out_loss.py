"""The loss on held-out records is the mean over their tokens, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_collavo import IMAGE_TOKEN, CollavoRecords, MixedRecords, collate, make_collavo
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from toy_model import ToyData
from transformers import Trainer

from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.trainer import CollavoTrainer

Record = dict[str, Tensor]


class Uneven(Dataset[Record]):
    """Records with 1, 4, 7 ... targets, some of text alone: batches' means are far apart."""

    def __init__(self, size: int = 5) -> None:
        self.records = CollavoRecords("image", size, text_every=2)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = dict(self.records[index])
        if "pixel_values" not in record:  # that class counts its even records as text
            record["labels"][-1 - (3 * index) % 8 :] = record["input_ids"][-1 - (3 * index) % 8 :]
        record["labels"][: -1 - (3 * index) % 8] = -100
        return record


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., CollavoTrainer]:
    def make(held_out: Any, stage: str = "align", **changes: Any) -> CollavoTrainer:
        model = make_collavo("projection", quantize=False, adapters=stage == "cit")
        args = CollavoTrainingArguments(
            output_dir=str(tmp_path / "run"), stage=stage, use_cpu=True, disable_tqdm=True,
            report_to="none", global_batch=2, **{"save_strategy": "no", "max_steps": 2, **changes},
        )  # fmt: skip
        train: Any = CollavoRecords("image") if stage == "cpt" else MixedRecords()
        return CollavoTrainer(model, args, train, data_collator=collate, eval_dataset=held_out)

    return make


def by_hand(model: Any, records: Dataset[Record]) -> float:
    """Sum the losses of all targets, a record at a time, and divide once."""
    total, count = 0.0, 0
    model.eval()
    for index in range(len(records)):  # type: ignore[arg-type]
        batch = collate([records[index]])
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
        targets = batch["labels"][0, 1:]
        total += float(F.cross_entropy(logits[0, :-1], targets, reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize("stage", ["align", "instruct", "cpt"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_it_is_the_mean_over_tokens(
    build: Callable[..., CollavoTrainer], stage: str, batch_size: int
) -> None:
    """The last batch has one record of one target; transformers weighs it like a full batch's."""
    records = Uneven()
    kinds = {"pixel_values" in records[i] for i in range(len(records))}
    counts = [int((records[i]["labels"][1:] != -100).sum()) for i in range(len(records))]
    assert kinds == {True, False} and len(set(counts)) > 3
    trainer = build(records, stage, per_device_eval_batch_size=batch_size)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(by_hand(trainer.model, records), rel=1e-6)


def test_it_is_reported_while_training(build: Callable[..., CollavoTrainer]) -> None:
    """Of several sets by name, and after the steps that it stands at."""
    records = Uneven()
    trainer = build({"one": records}, eval_strategy="steps", eval_steps=2)
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if "eval_one_loss" in log]
    assert logged["step"] == 2
    assert logged["eval_one_loss"] == pytest.approx(by_hand(trainer.model, records), rel=1e-6)


def test_a_model_without_logits_keeps_its_own_loss(toy_trainer: Any) -> None:
    """As transformers takes it."""
    trainer, data = toy_trainer(per_device_eval_batch_size=3), ToyData("image", 4)
    stock = Trainer(trainer.model, trainer.args)
    assert trainer.evaluate(data)["eval_loss"] == stock.evaluate(data)["eval_loss"] > 0


def test_the_image_token_is_no_target() -> None:
    """The records above are what they are said to be."""
    for record in (Uneven()[i] for i in range(5)):
        assert not ((record["labels"] == IMAGE_TOKEN).any())
