"""Random damage to files of records: each is read right, or named with file, number and id.

    python -m tests.fuzz.fuzz_records --seconds 120 --seed 0

A case is a small file in LLaVA's format, a list or lines, read in chunks of some size and with
images in some order, or a COCO panoptic JSON, in which values are replaced, spelled in other ways
or gone, in some Unicode encoding or with bytes cut off. What was not touched has to be there
unchanged; what was touched is read as it says, or listed with its name.
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
from unittest import mock

from PIL import Image

from collavo.conversations import files
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
    [None], "a/../b.png", "human", "gpt", "system",
    [{"type": "image"}], [{"type": "text", "text": ""}],
    [{"type": "text", "text": "<image>"}, {"type": "image"}],
)  # fmt: skip
SPELLINGS = (str, float, lambda v: f" {v} ", lambda v: f"{v:07d}", lambda v: f"+{v}")


class Case(NamedTuple):
    """A file's kind, its content, which entries were touched, and how it is written and read."""

    kind: str
    content: Any
    touched: frozenset[int]
    encoding: str
    lines: bool = False
    order: Any = "first"
    chunk: int = 1 << 20


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
    lines = kind == "conversations" and encoding not in ("cut", "flipped") and rng.random() < 0.3
    order = rng.choice(["first", "keep", "random"])
    # The first bytes tell the encoding.
    chunk = rng.choice([4, 7, 16, 64, 1 << 20])
    return Case(kind, content, frozenset(touched), encoding, lines, order, chunk)


def conversations() -> list[Any]:
    """Six good records: with images and without, of one turn and of several, in both spellings."""
    first = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a caf\u00e9"}]
    more = [{"from": "human", "value": "Why"}, {"from": "gpt", "value": "no <image> tag"}]
    text = [{"from": "human", "value": "Say the <image> tag"}, {"from": "gpt", "value": "<image>"}]
    return [
        {"id": "a", "image": "a.png", "conversations": first},
        {"id": 2, "image": "b.png", "conversations": [*first, *more]},
        {"id": "c", "conversations": text},
        {"id": "d", "image": "", "conversations": more},
        {
            "id": "e",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "One <image> "}, {"from": "gpt", "value": " 1 "},
                {"from": "human", "value": " two\n<image>\n?"}, {"from": "gpt", "value": ""},
                {"from": "human", "value": " no answer"},
            ],
        },
        {
            "id": "f",
            "image": "a.png",
            "conversations": [
                {"role": "system", "content": "S"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "u"}, {"type": "image"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "v"}]},
            ],
        },
    ]  # fmt: skip


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
    ascii_only = case.encoding in ("cut", "flipped")
    if case.lines:
        text = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in case.content)
    else:
        text = json.dumps(case.content, ensure_ascii=ascii_only)
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
        path = Path(folder) / ("records.jsonl" if case.lines else "records.json")
        write(case, path)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (2, 2)).save(Path(folder) / name)
        try:
            if case.kind == "conversations":
                check_conversations(case, path)
            else:
                check_panoptic(case, path)
        except ValueError as error:
            assert str(error).startswith(str(path)), f"the file is not named: {error}"
            whole = case.encoding in ("latin-1", "cut", "flipped")
            assert whole or len(case.touched) == len(case.content), (
                f"a good file is refused: {error}"
            )


def check_conversations(case: Case, path: Path) -> None:
    """Good records are there, and of the others all that was read is what they say."""
    skipped: list[Any] = []
    with mock.patch.object(files, "_CHUNK", case.chunk):
        data = ConversationDataset.from_llava_json(
            path, images=path.parent, image_order=case.order, seed=5, on_skip=skipped.append
        )
    again = ConversationDataset.from_llava_json(
        path, images=path.parent, image_order=case.order, seed=5, on_skip=lambda one: None
    )
    assert list(again.records) == list(data.records), "a second time reads something else"
    assert again.skipped == data.skipped, "a second time leaves out something else"
    if case.encoding in ("latin-1", "flipped"):
        return  # it is JSON still, and says something else
    out = {_number_in(one.name, path, case) for one in skipped}
    assert out <= case.touched, f"good records are left out: {skipped}"
    read = {_number_in(data.file_name(i), path, case): data.records[i] for i in range(len(data))}
    assert out | read.keys() == set(range(len(case.content))), "a record is lost"
    for number, record in read.items():
        check_record(case.content[number], record, case.order)
        if not record_images(record)[0]:
            _collator().check(record)


def check_record(entry: Any, record: Any, order: str) -> None:
    """Compare a record with what its entry says, turn by turn."""
    said = [
        (turn["from"], turn["value"]) if "value" in turn and "from" in turn
        else (turn["role"], turn["content"])
        for turn in entry["conversations"]
    ]  # fmt: skip
    roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role, _ in said]
    skip = [i for i in range(2) if roles[i : i + 1] == ["assistant"] and "user" not in roles[:i]]
    kept = [i for i in range(len(said)) if i not in skip]
    if roles[kept[-1]] == "user":
        kept.pop()
    messages = record["conversation"]
    assert [message["role"] for message in messages] == [roles[i] for i in kept], "turns are lost"
    images = record["image"]
    given = entry.get("image")
    named = [one for one in (given if isinstance(given, list) else [given]) if one]
    assert images == named[: len(images)], f"{images} are not the images of {given}"
    assert images == named or roles[-1] == "user", "an image is lost"
    places = 0
    for (role, value), message in zip((said[i] for i in kept), messages, strict=True):
        words = _plain(value)
        content = message["content"]
        if isinstance(content, str):
            assert content == words, f"{value!r} was changed to {content!r}"
            continue
        assert role in ("human", "user"), "an image in an answer"
        kinds = [part["type"] for part in content]
        places += kinds.count("image")
        left = "".join(part.get("text", "") for part in content)
        texts = {words, words.replace("<image>", "")}
        texts.add("".join(x for x in words.splitlines(True) if x.strip() != "<image>"))
        assert _bare(left) in {_bare(text) for text in texts}, f"{value!r} was changed to {left!r}"
        if order == "first":
            assert kinds in (["image"] * kinds.count("image"), sorted(kinds)), (
                "images are not first"
            )
    assert places == len(images), "not every image has its place"


def _plain(value: Any) -> str:
    """Return the words of a turn, places left out."""
    if isinstance(value, str):
        return _text(value)
    return "\n".join(_text(part["text"]) for part in value if part["type"] == "text")


def _bare(text: str) -> str:
    return "".join(text.split())


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
