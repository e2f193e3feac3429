"""All records are looked at once: pictures that are there, answers that fit; results are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_records import GOOD, numbered, pictures, questions, turns, write
from forked import forked
from PIL import Image

from collavo.conversations import ConversationDataset, inspection
from collavo.prepared import SkipLog
from collavo.processing import OverlongError, chat_template
from collavo.train.collator import CrayonCollator

read = ConversationDataset.from_llava_json


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the records that are looked at, in this process."""
    seen: list[int] = []
    look = inspection._look

    def counted(store: Any, inspector: Any, rows: Any) -> Any:
        seen.append(len(rows))
        return look(store, inspector, rows)

    monkeypatch.setattr(inspection, "_look", counted)
    return seen


def test_pictures_that_come_and_go(tmp_path: Path, looks: list[int]) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    records = [
        {"id": name, "image": f"{name}.png", "conversations": GOOD} for name in ("a", "cut", "late")
    ]
    path = write(tmp_path / "chat.json", [*records, *numbered(4, image="b.png")])
    with pytest.warns(UserWarning, match=r"chat\.json: 2 of 4 records are left out and listed in"):
        data = read(path, images=tmp_path)
    assert [one.name for one in data.skipped] == [
        f"{path}: [1] (id 'cut')",
        f"{path}: [2] (id 'late')",
    ]
    assert "the image is unreadable or truncated" in data.skipped[0].reason
    assert "late.png: there is no such image" in data.skipped[1].reason
    log = tmp_path / ".collavo" / "chat.json" / "skipped.jsonl"
    assert SkipLog(log).entries() == data.skipped
    # What was missing is looked for again, and nothing else is.
    pictures(tmp_path, "late.png")
    looks.clear()
    with pytest.warns(UserWarning, match="1 of 4 records are left out"):
        data = read(path, images=tmp_path)
    assert sum(looks) == 2 and len(data) == 3
    pictures(tmp_path, "cut.png")
    assert len(read(path, images=tmp_path)) == 4
    looks.clear()
    assert len(read(path, images=tmp_path)) == 4 and not looks and not log.exists()
    # One that goes is a fault when it is read.
    (tmp_path / "a.png").unlink()
    data = read(path, images=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"chat\.json: \[0\] \(id 'a'\): .*a\.png: there is"
    ):
        data[0]
    assert not looks


def test_settings_have_results_of_their_own(
    tmp_path: Path, looks: list[int], tiny_processor: Callable[..., Any]
) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "chat.json", numbered(1, image="a.png"))
    settings: list[dict[str, Any]] = [
        {}, {"processor": tiny_processor()}, {"processor": tiny_processor(grid=(2, 2))},
        {"processor": tiny_processor(), "max_length": 500},
        {"processor": tiny_processor(), "image_order": "keep"},
        {"processor": tiny_processor(), "image_order": "random"},
        {"processor": tiny_processor(), "image_order": "random", "seed": 1},
    ]  # fmt: skip
    for _ in range(2):
        for each in settings:
            assert len(read(path, images=tmp_path, **each)) == 1
    assert len(looks) == len(settings)
    with pytest.raises(ValueError, match="there is no such image"):
        read(path, images=tmp_path / "other")


def test_lengths_are_those_of_batches(
    tmp_path: Path, tiny_processor: Callable[..., Any], looks: list[int]
) -> None:
    """With the tokens of images; what is cut counts as it is left."""
    pictures(tmp_path, "a.png")
    talks = [turns("What", "yes"), turns("Is there a yes no", "no " * 9, "What", "yes " * 30)]
    records = [{"image": image, "conversations": talk} for talk in talks for image in ("a.png", "")]
    path = write(tmp_path / "chat.json", records)
    processor = tiny_processor(padding_side="right")
    whole = read(path, images=tmp_path, processor=processor).lengths
    assert whole is not None
    for limit in (None, int(whole[3]) - 1):
        collator = CrayonCollator(processor, max_length=limit)
        data = read(path, images=tmp_path, processor=processor, max_length=limit)
        masks = [collator([data[i]])["attention_mask"] for i in range(len(data))]
        assert data.lengths is not None and data.lengths.dtype == np.int32
        assert data.lengths.tolist() == [int(mask.sum()) for mask in masks]
        assert data.with_image.tolist() == [True, False, True, False]
        assert data.num_cut == (0 if limit is None else 2)
    again = read(path, images=tmp_path, processor=processor, max_length=limit)
    assert again.num_cut == 2 and again.lengths is not None and data.lengths is not None
    assert again.lengths.tolist() == data.lengths.tolist() and len(looks) == 2


def test_an_image_behind_the_cut_is_none(
    tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    """A step of images, or a stage that trains a projector alone, must not get a batch of words."""
    pictures(tmp_path, "a.png")
    late = turns("Is there a yes no", "yes", "<image>\nWhat", "yes " * 30)
    records = [{"image": "a.png", "conversations": talk} for talk in (turns("What", "yes"), late)]
    path = write(tmp_path / "chat.json", records)
    processor = tiny_processor(chat_template=chat_template("v1"))
    options: dict[str, Any] = {"images": tmp_path, "processor": processor}
    whole = read(path, **options)
    assert whole.with_image.tolist() == [True, True] and whole.lengths is not None
    limit = int(whole.lengths.max()) - 1
    for _ in range(2):  # the second time from what was kept
        data = read(path, **options, max_length=limit)
        assert data.with_image.tolist() == [True, False]
    collator = CrayonCollator(processor, max_length=limit)
    assert "pixel_values" not in collator([data[1]])


def test_what_becomes_of_a_conversation_that_is_too_long(
    tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    talks = [
        turns("What", "yes"),
        turns("What", "yes", "What", "no " * 80),
        turns("no " * 80, "no"),
    ]
    path = write(tmp_path / "chat.json", [{"conversations": talk} for talk in talks])
    processor = tiny_processor()
    seen: list[Any] = []
    limit: dict[str, Any] = {"processor": processor, "max_length": 60, "on_skip": seen.append}
    # Cut behind its last whole answer; one that has none left is a fault.
    data = read(path, **limit)
    assert (len(data), data.num_cut) == (2, 1)
    assert [one.name for one in seen] == [f"{path}: [2]"] and "60" in seen[0].reason
    seen.clear()
    data = read(path, overlong="skip", **limit)
    assert (len(data), data.num_cut) == (1, 0)
    assert [one.name for one in seen] == [f"{path}: [1]", f"{path}: [2]"]
    with pytest.raises(OverlongError, match=r"chat\.json: \[1\]: .*60"):
        read(path, overlong="raise", **limit)
    with pytest.raises(ValueError, match=r"chat\.json: \[2\]: .*60"):
        read(path, on_fault="raise", **limit)


def test_what_the_template_refuses_is_a_fault(
    tmp_path: Path, tiny_processor: Callable[..., Any]
) -> None:
    talks = [turns("What", "yes"), turns("What", "yes", "Is", "no")]
    path = write(tmp_path / "chat.json", [{"conversations": talk} for talk in talks])
    refuses = "{% if messages | length > 2 %}{{ raise_exception('two turns') }}{% endif %}"
    rest = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.warns(
        UserWarning, match=r"\[1\]: the chat template does not take it \(two turns\)"
    ):
        data = read(path, processor=tiny_processor(chat_template=refuses + rest))
    assert len(data) == 1


def test_processes_find_what_one_does(
    tmp_path: Path, tiny_processor: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path, "a.png")
    records = numbered(*range(1000), image="a.png")
    for number in (3, 700):
        records[number]["image"] = "gone.png"
    path = write(tmp_path / "chat.json", records)
    processor = tiny_processor()
    seen: list[Any] = []
    found = [
        read(
            path,
            images=tmp_path,
            processor=processor,
            workers=workers,
            cache=tmp_path / str(workers),
            on_skip=seen.append,
            progress=workers == 2,
        )
        for workers in (0, 2)
    ]
    assert found[0].lengths is not None and found[1].lengths is not None
    assert np.array_equal(found[0].lengths, found[1].lengths)
    assert questions(found[0]) == questions(found[1]) and len(found[0]) == 998
    assert seen[:2] == seen[2:]
    bars = capsys.readouterr().err
    assert "reading chat.json: 100%" in bars and "checking records: 100%" in bars


def test_a_process_with_threads_and_a_loader_worker_look_at_records(tmp_path: Path) -> None:
    """Forks have no threads of a pool that their parent used; daemons have no children."""
    import torch

    torch.ones(300, 300) @ torch.ones(300, 300)
    pictures(tmp_path, "a.png")
    path = write(tmp_path / "chat.json", numbered(*range(600), image="a.png"))
    assert len(read(path, images=tmp_path, workers=2)) == 600
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def work() -> None:
        answers.put(len(read(path, images=tmp_path, workers=2, cache=tmp_path / "other")))

    process = context.Process(target=work, daemon=True)
    process.start()
    assert answers.get(timeout=60) == 600
    process.join()


def test_a_kill_leaves_nobody_behind(tmp_path: Path) -> None:
    """Workers of a killed process end too, so the next can open the file."""
    pictures(tmp_path, "a.png")
    path = write(tmp_path / "chat.json", numbered(*range(2000), image="a.png"))

    def begin() -> None:
        look = inspection.read_image_size

        def slowly(one: Any) -> tuple[int, int]:
            time.sleep(0.02)
            return look(one)

        inspection.read_image_size = slowly  # type: ignore[assignment]
        child = os.fork()
        if child == 0:
            read(path, images=tmp_path, workers=2)
            os._exit(0)
        time.sleep(1.5)
        os.kill(child, 9)
        os.waitpid(child, 0)

    assert forked(begin)[0] == 0
    start = time.monotonic()
    assert len(read(path, images=tmp_path, workers=0)) == 2000
    assert time.monotonic() - start < 15


def test_all_faulty_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.json", numbered(1, 2, image="gone.png"))
    with pytest.raises(ValueError, match=r"chat\.json: \[0\] \(id 1\): .*gone\.png: there is no"):
        read(path, images=tmp_path)


def test_headers_alone_are_read(tmp_path: Path) -> None:
    """Pixels of six hundred thousand pictures would take an hour."""
    Image.new("RGB", (3000, 3000)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    data = read(write(tmp_path / "chat.json", numbered(1, image="a.png")), images=tmp_path)
    with pytest.raises(ValueError, match=r"\[0\] \(id 1\): .*the image is unreadable or truncated"):
        data[0]


def test_each_file_lists_its_own(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", [*numbered(1), {"id": "x"}])
    two = write(tmp_path / "two.json", [{"id": "y"}, *numbered(2)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = read([one, two])
    assert len(caught) == 1 and "one.json, " in str(caught[0].message)
    assert caught[0].filename == __file__
    for path, name in ((one, "x"), (two, "y")):
        lines = (tmp_path / ".collavo" / path.name / "skipped.jsonl").read_text().splitlines()
        assert [name in json.loads(line)["file"] for line in lines] == [True]
    assert len(data.skipped) == 2
