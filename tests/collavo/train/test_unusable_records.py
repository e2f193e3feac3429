"""Records that cannot be used, met while training: reported, and a run goes on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from toy_model import ToyData, make_toy

from collavo.panoptic import Skipped
from collavo.prepared import SkipLog
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.sampler import JoinedDataset, UnusableReport, join
from collavo.train.trainer import CollavoTrainer


class Numbers:
    """Odd ones cannot be read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index % 2:
            raise ValueError(f"{self.file_name(index)}: odd")
        return index

    def file_name(self, index: int) -> str:
        return f"n{index}"


def test_the_next_record_stands_in_for_one_that_cannot_be_used(tmp_path: Path) -> None:
    """Of its own data set, the same one each time, in workers too; and every one is reported."""
    report = UnusableReport(tmp_path / "out" / "skipped.jsonl")

    def no_four(record: int) -> None:
        if record == 4:
            raise ValueError("four")

    joined = join(Numbers(6), Numbers(2), on_unusable=report, check=no_four)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"n1: odd; records .* are listed in .*skipped\.jsonl"):
        assert [joined[i] for i in range(8)] == [0, 2, 2, 0, 0, 0, 0, 0]
    assert joined[-1] == 0 and joined.file_name(7) == "n1"
    entries = SkipLog(tmp_path / "out" / "skipped.jsonl").entries()
    assert {(one.name, one.reason) for one in entries} == {
        ("n1", "odd"), ("n3", "odd"), ("n4", "four"), ("n5", "odd"),
    }  # fmt: skip
    assert report.summary().startswith("4 records were left out, listed in ")
    joined.check = None
    loader = DataLoader(pickle.loads(pickle.dumps(joined)), batch_size=8, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0, 2, 2, 4, 4, 0, 0, 0]]


def test_a_data_set_of_which_nothing_can_be_used_is_an_error(tmp_path: Path) -> None:
    """A folder that is not mounted must not be searched for a day."""

    class Gone(Numbers):
        def __getitem__(self, index: int) -> int:
            raise FileNotFoundError(f"{index}.png: there is no such image")

    tried: list[Skipped] = []
    joined = JoinedDataset([Gone(1000)], on_unusable=tried.append)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"100 records in a row cannot be used; the last: 2\.png"):
        joined[903]
    assert len(tried) == 100


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = UnusableReport(tmp_path / "file" / "skipped.jsonl")
    with pytest.warns(UserWarning, match="the list could not be written"):
        report(Skipped("a", "b"))


def test_check_raises_where_a_batch_would(tiny_processor: Callable[..., Any]) -> None:
    processor = tiny_processor()
    talk = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    record = {"conversation": talk, "image": Image.new("RGB", (8, 8)), "name": "a.json: [1]"}
    collator = CrayonCollator(processor, max_length=5)
    with pytest.raises(ValueError, match=r"a\.json: \[1\]: nothing of its answer is left"):
        collator.check(record)
    CrayonCollator(processor).check(record)
    batch = processor.training_batch([talk], pixels=False)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_training_and_evaluation_go_on_past_a_bad_record(tmp_path: Path) -> None:
    """A picture that has gone must end neither the run nor its evaluation at the epoch's end."""

    class Faulty(ToyData):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise FileNotFoundError("3.png: there is no such image")
            return super().__getitem__(index)

    args = CollavoTrainingArguments(
        output_dir=str(tmp_path), stage="cpt", max_steps=8, eval_strategy="steps", eval_steps=8,
        save_strategy="no", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    faulty = Faulty("image")
    trainer = CollavoTrainer(make_toy(), args, faulty, eval_dataset={"a": faulty})
    with pytest.warns(UserWarning, match="record 3: 3.png: there is no such image"):
        trainer.train()
    assert any("eval_a_loss" in log for log in trainer.state.log_history)
    assert trainer.unusable.summary().startswith("1 records were left out")
