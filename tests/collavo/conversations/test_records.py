"""Records as people write them: right, or named with file, number and id; and a run goes on."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from toy_model import ToyData, make_toy

from collavo.panoptic import PanopticMap, Skipped
from collavo.prepared import SkipLog
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset
from collavo.train.sampler import JoinedDataset, UnusableReport, join
from collavo.train.trainer import CollavoTrainer

GOOD = [{"from": "human", "value": "What"}, {"from": "gpt", "value": "yes"}]


def turns(*values: str, first: str = "human") -> list[dict[str, Any]]:
    others = {"human": "gpt", "gpt": "human"}
    spoken = []
    for value in values:
        spoken.append({"from": first, "value": value})
        first = others[first]
    return spoken


def read(tmp_path: Path, *records: Any, **kwargs: Any) -> ConversationDataset:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(list(records)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        return ConversationDataset.from_llava_json(path, **kwargs)


def words(data: ConversationDataset, index: int = 0) -> list[str]:
    return [turn["content"] for turn in data.records[index]["conversation"]]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        # A text-only record that talks about the tag, and an answer that does.
        ({"conversations": turns("Why <image>?", "the <image> tag")}, None),
        # As many as images: all are places, also where no line is theirs alone.
        ({"image": "a.png", "conversations": turns("Is <image> a cat", "no")}, ["Is  a cat", "no"]),
        ({"image": "a.png", "conversations": turns("<image>\nWhat", "no")}, ["What", "no"]),
        ({"image": "a.png", "conversations": turns("What\r\n<image>", "no")}, ["What", "no"]),
        # More than images: those on lines of their own are the places.
        (
            {"image": "a.png", "conversations": turns("<image>\nthe <image> tag", "no")},
            ["the <image> tag", "no"],
        ),
        # The model's own are never places.
        ({"image": "a.png", "conversations": turns("<image>\nWhy", "<image>")}, ["Why", "<image>"]),
        ({"image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>", "a")}, ["", "a"]),
        # As many as images or none but those on their own lines, however many images there are.
        ({"image": ["a", "b"], "conversations": turns("a <image>b<image>", "")}, ["a b", ""]),
        (
            {"image": ["a.png", "b.png"], "conversations": turns("the <image> tag", "no")},
            ["the <image> tag", "no"],
        ),
        (
            {"image": ["a.png", "b.png"], "conversations": turns("<image>\nWhy", "no")},
            ["Why", "no"],
        ),
        # No image at all, as other tools write it.
        ({"image": "", "conversations": turns("What", "no")}, ["What", "no"]),
        ({"image": None, "conversations": turns("What", "no")}, ["What", "no"]),
        ({"image": [], "conversations": turns("What", "no")}, ["What", "no"]),
        ({"image": [""], "conversations": turns("What", "no")}, ["What", "no"]),
        # Line ends of another system, and blanks around, are no words.
        ({"conversations": turns("What\r\n", " a\r\nb \n")}, ["What", "a\r\nb"]),
        # Pairs of surrogates, written one by one, are the character that they mean.
        ({"conversations": turns("\ud83d\ude00", "\ud83d\ude00")}, ["\U0001f600", "\U0001f600"]),
        # Nothing is composed, decomposed or taken out.
        ({"conversations": turns("e\u0301\u200b", "\u202e\u00e9\x00\x07")}, None),
        (
            {"conversations": [{"from": "system", "value": "Be kind"}, *GOOD]},
            ["Be kind", "What", "yes"],
        ),
    ],
)  # fmt: skip
def test_words_are_read_as_they_are(tmp_path: Path, record: Any, said: list[str] | None) -> None:
    expected = [turn["value"] for turn in record["conversations"]] if said is None else said
    data = read(tmp_path, record)
    assert words(data) == expected
    if not record.get("image") or record["image"] == [""]:
        assert data[0]["image"] == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "expected 'conversations' as a list of turns, got None"),
        ({"id": 7}, r" \(id 7\): expected 'conversations' as a list of turns"),
        ({"id": "x", "conversations": []}, r" \(id 'x'\): expected 'conversation' as a list"),
        ({"conversations": [5]}, r"conversations\[0\]: expected 'from' \(human or gpt\)"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, r"conversations\[0\]: expected 'from'"),
        ({"conversations": GOOD[:1]}, "expected an assistant's turn"),
        ({"image": 5, "conversations": GOOD}, "'image': expected an RGB image, a path or a list"),
        ({"image": ["a.png", ""], "conversations": GOOD}, "'image': expected an RGB image"),
        ({"image": {"path": "a"}, "conversations": GOOD}, "'image': expected an RGB image"),
        ({"conversations": turns("<image>\nWhat", "no")}, "expected 1 images in 'image'"),
        ({"image": "", "conversations": turns("<image>\nWhat", "no")}, "expected 1 images in"),
        (
            {"image": "a", "conversations": turns("<image>\n<image>", "no")},
            "expected 2 images in 'image', one for each <image>, got 'a'",
        ),
        ({"conversations": turns("What", "\ud83d")}, r"conversation\[1\]: expected text, got half"),
    ],
)
def test_one_bad_record_does_not_end_the_file(tmp_path: Path, record: Any, message: str) -> None:
    """It is named by file, number and id; alone in its file it is an error."""
    path = tmp_path / "chat.json"
    good = {"conversations": GOOD}
    path.write_text(json.dumps([good, record, good]))
    with pytest.warns(UserWarning, match=rf"chat\.json: 1 of 3 records are left out .*{message}"):
        data = ConversationDataset.from_llava_json(path)
    assert len(data) == 2 and len(data.skipped) == 1
    assert data.skipped[0].name.startswith(f"{path}: [1]")
    assert [data.file_name(i) for i in range(2)] == [f"{path}: [0]", f"{path}: [2]"]
    seen: list[Skipped] = []
    ConversationDataset.from_llava_json(path, on_skip=seen.append)
    assert seen == data.skipped
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=rf"chat\.json: \[0\].*{message}"):
        ConversationDataset.from_llava_json(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_of_conversations_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "chat.json"
    content = json.dumps([{"conversations": turns("What", "caf\u00e9")}], ensure_ascii=False)
    path.write_text(content, encoding=encoding)
    assert words(ConversationDataset.from_llava_json(path)) == ["What", "caf\u00e9"]


def test_a_conversation_that_the_model_begins(
    tmp_path: Path, coco_folder: Path, tiny_processor: Callable[..., Any]
) -> None:
    """Its words are learned like others; without a question its image had no place."""
    begun = {"image": "001.png", "conversations": turns("yes", "What", "no", first="gpt")}
    alone = {"image": "001.png", "conversations": turns("yes", first="gpt")}
    processor = tiny_processor()
    data = read(tmp_path, begun, alone, images=coco_folder / "images")
    batch = CrayonCollator(processor)([data[0], data[1]])
    said = [row[row != -100].tolist() for row in batch["labels"]]
    assert [processor.tokenizer.decode(one) for one in said] == [" yes</s> no</s>", " yes</s>"]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]


def test_a_tag_in_a_message_with_an_image_is_named(tiny_processor: Callable[..., Any]) -> None:
    """There images are parts of a content; a line with the tag would be learned as words."""
    talk = [{"role": "user", "content": "<image>\nWhat"}, {"role": "assistant", "content": "yes"}]
    record = {"conversation": talk, "image": Image.new("RGB", (8, 8)), "id": 5}
    with pytest.raises(ValueError, match=r"records\[0\] \(id 5\): conversation\[0\]: '<image>' on"):
        CrayonCollator(tiny_processor())([record])
    talk[0]["content"] = "What is <image>"
    CrayonCollator(tiny_processor())([record])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object_text": "perhaps"}, "expected 'object_text' as true or false, got 'perhaps'"),
        ({"image": 3.5}, "'image': expected an RGB image"),
        ({"image": Image.new("RGB", (2, 2)), "panoptic": "a.png"}, "expected a PanopticMap, a"),
        (
            {
                "conversation": [
                    {"role": "user", "content": [{"type": "image"}]},
                    {"role": "assistant", "content": "yes"},
                ]
            },
            "expected no image part in 'content', or one for each of 0 images",
        ),
    ],
)
def test_values_of_records_are_checked(change: dict[str, Any], message: str) -> None:
    talk = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match=rf"records\[0\] \(id 'a'\): .*{message}"):
        ConversationDataset([{"conversation": talk, "id": "a", **change}])


@pytest.mark.parametrize(("value", "named"), [("false", False), (1, True), (None, True)])
def test_object_text_as_other_tools_write_it(
    tiny_processor: Callable[..., Any], value: Any, named: bool
) -> None:
    """The text "false" is true to Python; None leaves it to the processor."""
    talk = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    image = Image.new("RGB", (4, 4))
    record = {"conversation": talk, "object_text": value, "image": image}
    record["panoptic"] = PanopticMap.empty(4, 4)
    processor = tiny_processor()
    batch = CrayonCollator(processor)([ConversationDataset([record])[0]])
    assert ("detailed object" in processor.tokenizer.decode(batch["input_ids"][0])) == named


def test_an_image_that_is_not_there_is_named_with_its_record(tmp_path: Path) -> None:
    data = read(tmp_path, {"id": "q", "image": "gone.png", "conversations": GOOD}, images=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"chat\.json: \[0\] \(id 'q'\): .*gone\.png: there"
    ):
        data[0]


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
    with pytest.raises(ValueError, match=r"a\.json: \[1\]: expected 16 image tokens .*, got 0"):
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
