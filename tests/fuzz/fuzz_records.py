"""Random damage to files of records: each is read right, or named with file, number and id.

    python -m tests.fuzz.fuzz_records --seconds 120 --seed 0

A case is a small file in LLaVA's format, or a COCO panoptic JSON, in which values are replaced,
spelled in other ways or gone, in some Unicode encoding or with bytes cut off. What was not touched
has to be there unchanged; what was touched is read as it says, or listed with its name.
"""

from __future__ import annotations

import copy
import json
import random
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from collavo.conversations.records import record_images
from collavo.panoptic.coco_index import CocoIndex
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset
from tests.collavo.tiny import tiny_processor
from tests.fuzz.command_line import run_for_a_time

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cut", "flipped")
JUNK: tuple[Any, ...] = (
    None, True, 5, -1, 1.5, 1e3, float("nan"), float("inf"), 10**30, "", " ", "12", "x", [], {},
    [[]], "\ud83d", "\ud83d\ude00", "<image>", "<image>\nWhat", "the <image> tag", "</s>",
    "caf\u00e9\r\n", "\x00", {"type": "image"}, ["a.png", "b.png"], ["a.png", ""],
    [None], "a/../b.png",
)  # fmt: skip
SPELLINGS = (str, float, lambda v: f" {v} ", lambda v: f"{v:07d}", lambda v: f"+{v}")


class Case(NamedTuple):
    """A file's kind, its content, which entries were touched, and how it is written."""

    kind: str
    content: Any
    touched: frozenset[int]
    encoding: str


def draw(rng: random.Random) -> Case:
    """Draw a case."""
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.5 else "utf-8"
    kind = rng.choice(["conversations", "panoptic"])
    content: Any = conversations() if kind == "conversations" else panoptic()
    touched = set()
    for _ in range(rng.randrange(4)):
        if kind == "conversations":
            touched.add(position := rng.randrange(len(content)))
            content[position] = damage(content[position], rng)
        else:
            table = rng.choice([content["images"], content["annotations"]])
            touched.add(position := rng.randrange(len(table)))
            table[position] = damage(table[position], rng)
    return Case(kind, content, frozenset(touched), encoding)


def conversations() -> list[Any]:
    """Four good records: with an image and without, of one turn and of several."""
    first = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a caf\u00e9"}]
    more = [{"from": "human", "value": "Why"}, {"from": "gpt", "value": "no <image> tag"}]
    text = [{"from": "human", "value": "Say the <image> tag"}, {"from": "gpt", "value": "<image>"}]
    return [
        {"id": "a", "image": "a.png", "conversations": first},
        {"id": 2, "image": "b.png", "conversations": [*first, *more]},
        {"id": "c", "conversations": text},
        {"id": "d", "image": "", "conversations": more},
    ]


def panoptic() -> dict[str, Any]:
    """Three good images, and a class of the file's own that none shows."""
    numbers = range(1, 4)
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in numbers],
        "annotations": [
            {
                "image_id": n,
                "file_name": f"{n}.png",
                "segments_info": [
                    {"id": 10 * n + k, "category_id": k, "iscrowd": 0} for k in (1, 2)
                ],
            }
            for n in numbers
        ],
        "categories": [
            {"id": 1, "name": "person"}, {"id": 2, "name": "sky"}, {"id": 9, "name": "drone"},
        ],
    }  # fmt: skip


def damage(entry: Any, rng: random.Random) -> Any:
    """Change one value somewhere in an entry; sometimes the entry itself."""
    entry = copy.deepcopy(entry)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            places.append((value, key))
            if isinstance(inner, dict | list):
                collect(inner)

    if not isinstance(entry, dict | list) or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(JUNK))
    collect(entry)
    if not places:
        return entry
    holder, key = rng.choice(places)
    draw = rng.random()
    if draw < 0.2:
        del holder[key]
    elif draw < 0.3 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif draw < 0.6 and type(holder[key]) is int:
        holder[key] = rng.choice(SPELLINGS)(holder[key])
    else:
        holder[key] = copy.deepcopy(rng.choice(JUNK))
    return entry


def write(case: Case, path: Path) -> None:
    """Write the case's file."""
    text = json.dumps(case.content, ensure_ascii=case.encoding in ("cut", "flipped"))
    codec = "utf-8" if case.encoding in ("cut", "flipped") else case.encoding
    errors = "replace" if codec == "latin-1" else "surrogatepass"
    data = bytearray(text.encode(codec, errors))
    if case.encoding == "cut":
        del data[len(data) // 2 :]
    elif case.encoding == "flipped":
        data[len(data) // 3] ^= 0x84
    path.write_bytes(data)


def check(case: Case) -> None:
    """Read the case's file and compare with what it says.

    Raises:
        AssertionError: saying what differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        write(case, path)
        try:
            if case.kind == "conversations":
                check_conversations(case, path)
            else:
                check_panoptic(case, path)
        except ValueError as error:
            assert str(error).startswith(str(path)), f"the file is not named: {error}"
            whole = case.encoding in ("latin-1", "cut", "flipped")
            assert whole or len(case.touched) == 4, f"a good file is refused: {error}"


def check_conversations(case: Case, path: Path) -> None:
    """Good records are there, and of the others all that was read is what they say."""
    skipped: list[Any] = []
    data = ConversationDataset.from_llava_json(path, on_skip=skipped.append)
    if case.encoding in ("latin-1", "flipped"):
        return  # it is JSON still, and says something else
    out = {_number_in(one.name, path, case) for one in skipped}
    assert out <= case.touched, f"good records are left out: {skipped}"
    read = {_number_in(data.file_name(i), path, case): data.records[i] for i in range(len(data))}
    assert out | read.keys() == set(range(len(case.content))), "a record is lost"
    for number, record in read.items():
        turns = case.content[number]["conversations"]
        said = [_text(turn["value"]) for turn in turns]
        for text, turn, message in zip(said, turns, record["conversation"], strict=True):
            assert message["content"] in (text.strip(), text.replace("<image>", "").strip()), text
            if turn["from"] in ("gpt", "assistant"):
                assert message["content"] == text.strip(), f"the answer {text!r} was changed"
        if not record_images(record)[0]:
            _collator().check(record)


def _number_in(name: str, path: Path, case: Case) -> int:
    """Return the number in a record's name, which has to hold its file and its id too."""
    found = re.fullmatch(re.escape(str(path)) + r": \[(\d+)\]( \(id .*\))?", name)
    assert found is not None, f"{name!r} is no record's name"
    entry = case.content[int(found[1])]
    assert bool(found[2]) == (isinstance(entry, dict) and "id" in entry), f"{name!r} lacks its id"
    return int(found[1])


@cache
def _collator() -> CrayonCollator:
    return CrayonCollator(tiny_processor())


def _text(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def check_panoptic(case: Case, path: Path) -> None:
    """Good images are there with their segments, and numbers mean what they spell."""
    index = CocoIndex.read(path, skip_faults=True)
    if case.encoding in ("latin-1", "flipped"):
        return
    expected = {n: [10 * n + 1, 10 * n + 2] for n in range(1, 4)}
    read = {one.image_id: index.segments(one) for one in index.records}
    for number, segments in expected.items():
        if number - 1 not in case.touched:
            ids, classes = read[number]
            assert ids.tolist() == segments and classes.tolist() == [0, 119], f"image {number}"
    for one in index.records:
        entries = [e for e in case.content["images"] if isinstance(e, dict)]
        assert any(_number(e.get("id")) == one.image_id for e in entries), (
            f"image {one} is no one's"
        )
    assert len(read) + len(index.skipped) >= 3, "an image is lost"


def _number(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def main() -> int:
    """Run random cases for a time and print the faults."""
    return run_for_a_time(__doc__, draw, check)


if __name__ == "__main__":
    raise SystemExit(main())
