"""LLaVA's records: each is read as it means, or a fault that names file, number and id."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_records import GOOD, pictures, said, turns, write

from collavo.conversations import ConversationDataset
from collavo.panoptic import Skipped
from collavo.train.collator import CrayonCollator


def read(folder: Path, *records: Any, **kwargs: Any) -> ConversationDataset:
    pictures(folder, "a.png", "b.png")
    path = write(folder / "chat.json", list(records))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        return ConversationDataset.from_llava_json(path, **{"images": folder, **kwargs})


IMAGE = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("image", "question", "first", "keep"),
    [
        ("a.png", "<image>\nWhat", ["<>", "What"], ["<>", "What"]),
        ("a.png", "What\n<image>", ["<>", "What"], ["What", "<>"]),
        # Within a line; LLaVA's code leaves both blanks.
        ("a.png", "In <image> it", ["<>", "In  it"], ["In", "<>", "it"]),
        # Line ends of another system, and blanks beside a place.
        ("a.png", " What\r\n<image>\r\n", ["<>", "What"], ["What", "<>"]),
        ("a.png", "<image>", ["<>"], ["<>"]),
        # No place: it goes first, and the words are not touched.
        ("a.png", "What ", ["<>", "What"], ["<>", "What"]),
        (["a.png"], "<image>\nWhat", ["<>", "What"], ["<>", "What"]),
        # As many as images: all are places. Else those on lines of their own.
        (["a.png", "b.png"], "a <image>b<image>", ["<>", "<>", "a b"], ["a", "<>", "b", "<>"]),
        (["a.png", "b.png"], "<image>\n<image>", ["<>", "<>"], ["<>", "<>"]),
        (
            "a.png",
            "<image>\nthe <image> tag",
            ["<>", "the <image> tag"],
            ["<>", "the <image> tag"],
        ),
        # Without an image it is text, on a line of its own too; no blank is taken off.
        (None, "<image>\nWhat ", "<image>\nWhat ", "<image>\nWhat "),
        ("", "What", "What", "What"),
        ([], "<image>", "<image>", "<image>"),
        ([""], "What", "What", "What"),
        # Content as parts, as other tools write it: their places are those, and tags are text.
        ("a.png", [text("What"), IMAGE], ["<>", "What"], ["What", "<>"]),
        ("a.png", [text("a"), IMAGE, text("b")], ["<>", "a\nb"], ["a", "<>", "b"]),
        ("a.png", [text("a <image>"), IMAGE], ["<>", "a <image>"], ["a <image>", "<>"]),
        ("a.png", [text("<image>"), text("b")], ["<>", "b"], ["<>", "b"]),
        (None, [text("a"), text("b")], "a\nb", "a\nb"),
    ],
)
def test_images_have_places(
    tmp_path: Path, image: Any, question: Any, first: Any, keep: Any
) -> None:
    record = {"image": image, "conversations": [*turns(question, " <image> "), *GOOD]}
    if not isinstance(question, str):
        record["conversations"][0] = {"role": "user", "content": question}
    # What the model says, and turns without an image, are as they are in the file.
    rest = [" <image> ", "What", "yes"]
    data = read(tmp_path, record)
    assert said(data) == [first, *rest]
    assert said(read(tmp_path, record, image_order="keep")) == [keep, *rest]
    count = first.count("<>") if isinstance(first, list) else 0
    assert data.with_image.tolist() == [count > 0] and len(data[0]["image"]) == count


def test_an_image_of_a_later_turn_stays_in_it(tmp_path: Path) -> None:
    record = {"image": "a.png", "conversations": turns(" Hello ", "Hi", "This: <image>", "Nice")}
    assert said(read(tmp_path, record)) == [" Hello ", "Hi", ["<>", "This:"], "Nice"]
    assert said(read(tmp_path, record, image_order="keep"))[2] == ["This:", "<>"]
    # The paper's draw is of the first question alone.
    for seed in range(8):
        assert said(read(tmp_path, record, image_order="random", seed=seed))[2] == ["<>", "This:"]


def test_the_order_of_the_paper_is_drawn_by_seed_and_number(tmp_path: Path) -> None:
    records = [{"id": i, "image": "a.png", "conversations": turns("<image>\nWhat", "no")}
               for i in range(400)]  # fmt: skip
    drawn = {}
    for seed in (0, 1):
        data = read(tmp_path, *records, image_order="random", seed=seed)
        drawn[seed] = [said(data, i)[0] == ["What", "<>"] for i in range(400)]
        assert {tuple(said(data, i)[0]) for i in range(400)} == {("What", "<>"), ("<>", "What")}
        assert [said(data, i)[0] == ["What", "<>"] for i in range(400)] == drawn[seed]
        # Of 400 fair draws, within five standard deviations.
        assert abs(sum(drawn[seed]) - 200) < 50
    assert drawn[0] != drawn[1]
    # A record's draw is its own: it does not depend on which others are taken.
    part = {"datasets": [{"json_path": "chat.json", "sampling_strategy": "end:100"}]}
    (tmp_path / "part.yaml").write_text(json.dumps(part))
    last = ConversationDataset.from_llava_json(
        tmp_path / "part.yaml", images=tmp_path, image_order="random", seed=1
    )
    assert [said(last, i)[0] == ["What", "<>"] for i in range(100)] == drawn[1][300:]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # Nobody asked for the first answer; the last question has none.
        (turns("Welcome", "What", "no", first="gpt"), ["What", "no"]),
        (turns("What", "no", "Sure?"), ["What", "no"]),
        # An empty answer is one: its stop token is learned.
        (turns("What", "", "Sure?", "yes"), ["What", "", "Sure?", "yes"]),
        ([{"from": "system", "value": "Be kind"}, *GOOD], ["Be kind", "What", "yes"]),
        ([{"from": "system", "value": "S"}, *turns("Hi", "What", "no", first="gpt")],
         ["S", "What", "no"]),
        ([{"role": "user", "content": "What"}, {"role": "assistant", "content": "no"}],
         ["What", "no"]),
        # Pairs of surrogates, written one by one, are the character that they mean.
        (turns("\ud83d\ude00", "\ud83d\ude00"), ["\U0001f600", "\U0001f600"]),
        # Nothing is composed, decomposed or taken out.
        (turns("e\u0301\u200b", "\u202e\u00e9\x00\x07"), ["e\u0301\u200b", "\u202e\u00e9\x00\x07"]),
        (turns("What\r\n", " a\r\nb \n"), ["What\r\n", " a\r\nb \n"]),
    ],
)  # fmt: skip
def test_turns_that_can_be_learned(tmp_path: Path, record: Any, expected: list[str]) -> None:
    data = read(tmp_path, {"id": [1, None], "model": "", "video": "", "conversations": record})
    assert said(data) == expected
    assert data.file_name(0) == f"{tmp_path / 'chat.json'}: [0] (id [1, None])"


def test_a_question_without_an_answer_takes_its_image_along(tmp_path: Path) -> None:
    record = {"image": ["a.png", "b.png"], "conversations": turns("<image>1", "no", "<image>2")}
    data = read(tmp_path, record)
    assert said(data) == [["<>", "1"], "no"] and data.records[0]["image"] == ["a.png"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "expected 'conversations' as a list of turns, got None"),
        ({"id": 7}, r" \(id 7\): expected 'conversations' as a list of turns"),
        ({"id": "x", "conversations": []}, r" \(id 'x'\): expected a question with an answer"),
        ({"conversations": [5]}, r"conversations\[0\]: expected 'from' \(human or gpt\)"),
        ({"conversations": turns("What", 5)}, r"conversations\[1\]: expected 'from' .* got {'from"),
        ({"conversations": turns("What", None)}, r"conversations\[1\]: expected 'from'"),
        (
            {"conversations": [{"from": "bing", "value": ""}]},
            r"conversations\[0\]: expected 'from'",
        ),
        ({"conversations": [{"from": ["gpt"], "value": ""}]}, r"conversations\[0\]: expected 'f"),
        ({"conversations": [{"from": "human", "content": ""}]}, r"conversations\[0\]: expected 'f"),
        ({"conversations": GOOD[:1]}, "expected a question with an answer in 'conversations'"),
        ({"conversations": turns("Hi", first="gpt")}, "expected a question with an answer"),
        ({"conversations": [*GOOD[:1], *GOOD]}, r"conversations\[1\]: expected the assistant's t"),
        ({"conversations": [*GOOD, *GOOD[1:]]}, r"conversations\[2\]: expected the user's turn"),
        ({"conversations": [GOOD[1], *GOOD[1:]]}, r"conversations\[1\]: expected the user's turn"),
        (
            {"conversations": [*GOOD, {"from": "system", "value": ""}, *GOOD]},
            r"conversations\[2\]: expected the user's turn, .* got the system's",
        ),
        ({"image": 5, "conversations": GOOD}, "'image': expected a path or a list of paths, got 5"),
        ({"image": False, "conversations": GOOD}, "'image': expected a path or a list of paths"),
        ({"image": ["a.png", ""], "conversations": GOOD}, "'image': expected a path or a list"),
        ({"image": {"path": "a"}, "conversations": GOOD}, "'image': expected a path or a list"),
        ({"image": "\ud83d.png", "conversations": GOOD}, "'image': expected text, got half of a"),
        (
            {"image": "a.png", "conversations": turns("<image>\n<image>", "no")},
            "expected 2 images in 'image', one for each <image>, got 1",
        ),
        (
            {"image": ["a.png", "b.png"], "conversations": turns("<image>\nWhich", "no")},
            "expected 1 images in 'image', one for each <image>, got 2",
        ),
        (
            {"image": "a.png", "conversations": [{"role": "user", "content": [IMAGE, IMAGE]}]},
            "expected 2 images in 'image', one for each image part, got 1",
        ),
        (
            {"conversations": [{"role": "user", "content": [IMAGE]}, GOOD[1]]},
            "expected 1 images in 'image', one for each image part, got 0",
        ),
        (
            {"conversations": [GOOD[0], {"role": "assistant", "content": [IMAGE]}]},
            r"conversations\[1\]: expected 'content' as text, or a list of .* in a question",
        ),
        (
            {"conversations": [{"role": "user", "content": [{"type": "video"}]}, GOOD[1]]},
            r"conversations\[0\]: expected 'content' as text",
        ),
        ({"video": "a.mp4", "conversations": GOOD}, "expected images, got 'video', which is not"),
        (
            {"conversations": turns("What", "\ud83d")},
            r"conversations\[1\]: expected text, got half",
        ),
        ({"image": "../a.png", "conversations": GOOD}, r"expected the name of a file within its f"),
        ({"image": "/a.png", "conversations": GOOD}, r"expected the name of a file within its fol"),
        ({"image": "a\0.png", "conversations": GOOD}, r"expected the name of a file within its f"),
        ({"image": "gone.png", "conversations": GOOD}, "gone.png: there is no such image"),
        ({"image": "chat.json", "conversations": GOOD}, "chat.json: the image is unreadable"),
    ],
)
def test_one_bad_record_does_not_end_the_file(tmp_path: Path, record: Any, message: str) -> None:
    """It is named by file, number and id; alone in its file it is an error."""
    pictures(tmp_path, "a.png", "b.png")
    good = {"conversations": GOOD}
    path = write(tmp_path / "chat.json", [good, record, good])
    with pytest.warns(UserWarning, match=rf"chat\.json: 1 of 3 records are left out .*{message}"):
        data = ConversationDataset.from_llava_json(path, images=tmp_path)
    assert len(data) == 2 and len(data.skipped) == 1
    assert data.skipped[0].name.startswith(f"{path}: [1]")
    assert [data.file_name(i) for i in range(2)] == [f"{path}: [0]", f"{path}: [2]"]
    seen: list[Skipped] = []
    ConversationDataset.from_llava_json(path, images=tmp_path, on_skip=seen.append)
    assert seen == data.skipped
    with pytest.raises(ValueError, match=rf"chat\.json: \[1\].*{message}"):
        ConversationDataset.from_llava_json(path, images=tmp_path, on_fault="raise")
    write(path, [record])
    with pytest.raises(ValueError, match=rf"chat\.json: \[0\].*{message}"):
        ConversationDataset.from_llava_json(path, images=tmp_path)


def test_a_conversation_that_the_model_begins(
    tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    """Nobody asked for what it says first, so it is not learned; the image has its place."""
    record = {"image": "a.png", "conversations": turns("yes", "What", "no", first="gpt")}
    processor = tiny_processor()
    batch = CrayonCollator(processor)([read(tmp_path, record)[0]])
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert processor.tokenizer.decode(learned) == " no</s>"
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16]


def test_templates_with_images_first_see_the_words_as_before(
    tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    """What CIT trains on does not depend on where a question has its image."""
    talks = [turns(question, "no") for question in ("<image>\nWhat", "What\n<image>", "What")]
    records = [{"image": "a.png", "conversations": talk} for talk in talks]
    data = read(tmp_path, *records)
    batch = CrayonCollator(tiny_processor())([data[i] for i in range(3)])
    assert all(batch["input_ids"][0].equal(row) for row in batch["input_ids"])
