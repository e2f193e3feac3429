"""Files of records: JSON of any size, JSON lines, mixtures; what is no list is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_records import GOOD, numbered, questions, said, turns, write

from collavo.conversations import ConversationDataset, files
from collavo.conversations.files import read_entries
from collavo.conversations.mixture import read_sources

read = ConversationDataset.from_llava_json


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"chat{suffix}"
    records = [{"conversations": turns("What", f"caf\u00e9 {n} \u2028 \U0001f600")} for n in "ab"]
    lines = [json.dumps(one, ensure_ascii=False) for one in records]
    content = "\r\n\r\n".join(lines) if suffix == ".jsonl" else f" [{','.join(lines)}]\r\n"
    path.write_bytes(content.encode(encoding))
    data = read(path)
    assert [said(data, i)[1] for i in range(2)] == [
        "caf\u00e9 a \u2028 \U0001f600",
        "caf\u00e9 b \u2028 \U0001f600",
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 17, 64, 1 << 20])
def test_a_list_is_the_same_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """A number, a literal, an escape or a character of several bytes may be cut."""
    values: list[Any] = [
        123456, -1.5e10, True, None, float("-inf"), "a\\\"\ud83d\ude00b", [], {}, 0,
        {"k": [1, {"caf\u00e9": "\U0001f600]}," * 9}]}, "", 7,
    ]  # fmt: skip
    path = tmp_path / "list.json"
    monkeypatch.setattr(files, "_CHUNK", chunk)
    for ascii_only in (True, False):
        # In characters of their own a lone pair is no UTF-8.
        content = json.dumps(values, ensure_ascii=ascii_only, indent=1)
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        if chunk < 4 and not ascii_only:
            continue  # the encoding is told by the first four bytes
        expected = json.loads(path.read_bytes())
        assert [entry.value for entry in read_entries(path)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"conversations": []}', "expected a list of records, got dict; name a file of JSON line"),
        ('{"a": 1}\n{"a": 2}', "expected a list of records, got dict; name a file of JSON lines"),
        ('"text"', "expected a list of records, got str"),
        ("null", "expected a list of records, got NoneType"),
        ("", "expected a list of records, got an empty file"),
        ("[]", "expected records, got none"),
        ("nothing", r"not a JSON file \(Expecting value: character 0, in the file\)"),
        ('[{"a": 1}, {"a": 2', r"not a JSON file \(.*: character \d+, in \[1\]\)"),
        ('[{"a": 1}', r"not a JSON file \(Expecting ',' delimiter: character 9, behind \[0\]"),
        ('[{"a": 1} {"a": 2}]', "not a JSON file .*Expecting ',' delimiter: character 10"),
        ('[{"a": 1},]', r"not a JSON file \(Expecting value: character 10, in \[1\]\)"),
        ('[{"a": 1}] x', r"not a JSON file \(Extra data: character 11"),
        ('[{"a": "x}, {"a": "y"}, ' + '{"a": 1}, ' * 9 + "]", r"not a JSON file \(.*, in \[0\]\)"),
        ("[" * 100_000, r"not a JSON file \(.*recursion.*, in \[0\]\)"),
        ("[" + "9" * 5000 + "]", r"not a JSON file \(.*, in \[0\]\)"),
        (b'[{"a": "\xff\xfe\xe9"}]', "expected JSON in UTF-8, .*, got other bytes at byte 8 "),
    ],
)
def test_what_is_no_list_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"chat\.json: {message}"):
        read(path)
    assert content == "[]" or [one.name for one in tmp_path.iterdir()] == ["chat.json"]


def test_a_broken_list_is_not_read_to_its_end(tmp_path: Path) -> None:
    """A gigabyte behind a forgotten comma must not be held in memory first."""
    path = tmp_path / "chat.json"
    path.write_text('[{"a": 1 "b": 2}, ' + "0, " * 3_000_000 + "0]")
    taken: list[int] = []
    with pytest.raises(ValueError, match=r"Expecting ',' delimiter: character 9, in \[0\]"):
        list(read_entries(path, lambda chunk: taken.append(len(chunk))))
    assert sum(taken) <= 2 << 20


def test_a_file_that_is_not_there_and_a_folder_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"chat\.json: there is no such file"):
        read(tmp_path / "chat.json")
    path = write(tmp_path / "chat.json", numbered(1))
    with pytest.raises(FileNotFoundError, match=r"images: there is no folder .*pictures"):
        read(path, images=tmp_path / "pictures")


def test_a_bad_line_is_one_records_fault(tmp_path: Path) -> None:
    lines = [json.dumps(one) for one in numbered(0, 1, 2)]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([lines[0], "", lines[1][:-1], lines[2], '["a"]', ""]))
    seen: list[Any] = []
    data = read(path, on_skip=seen.append)
    assert questions(data) == ["0", "2"]
    assert [one.name for one in seen] == [f"{path}: [1]", f"{path}: [3]"]
    assert seen[0].reason.startswith("expected an object in JSON on this line, got '{")


def test_a_byte_that_is_no_text_is_counted_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b'["' + b"a" * 1_800_000 + b'\xe9"]')  # beyond what is read at once
    with pytest.raises(ValueError, match="got other bytes at byte 1800002 "):
        read(path)


def test_a_list_by_the_name_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(numbered(4, 5), indent=2))
    with pytest.raises(
        ValueError, match=r"chat\.jsonl: \[0\]: .*name a file that is one list \.jso"
    ):
        read(path)


def test_several_files_with_weights(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", numbered(*range(10)))
    two = write(tmp_path / "two.jsonl", numbered(*range(10, 14)))
    whole = read([one, (two, 2)])
    assert questions(whole) == [*map(str, range(10)), *map(str, [*range(10, 14)] * 2)]
    assert whole.file_name(11) == f"{two}: [1] (id 11)"
    parts = {seed: questions(read([(one, 0.5), (two, 1.25)], seed=seed)) for seed in range(4)}
    for drawn in parts.values():
        first = [int(n) for n in drawn if int(n) < 10]
        assert len(set(first)) == len(first) == 5 and first == sorted(first)
        assert drawn[5:9] == ["10", "11", "12", "13"] and len(drawn) == 10
    assert len({tuple(drawn) for drawn in parts.values()}) > 1
    assert questions(read([(one, 0.5), (two, 1.25)], seed=3)) == parts[3]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(10)),
        (None, range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("end:0", []),
        ("first:25%", range(3)),  # rounded up
        ("end:200%", range(10)),
        ("first: 99", range(10)),
        (0, []),
        ("random:4", 4),
        ("random:40%", 4),
        ("40%", 4),
    ],
)
def test_mixtures_in_yaml(tmp_path: Path, strategy: Any, expected: Any) -> None:
    """LLaVA-NeXT's; parts are counted with faulty records, as there."""
    records = numbered(*range(10))
    records[2] = {"id": 2}
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "all.json", records)
    write(tmp_path / "more.json", numbered(50))
    entry = {"json_path": "data/all.json", "sampling_strategy": strategy}
    if strategy is None:
        del entry["sampling_strategy"]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps({"datasets": [entry, {"json_path": "more.json"}]}))
    seen: list[Any] = []
    found = questions(read(mixture, on_skip=seen.append, seed=5))
    assert found.pop() == "50"
    if isinstance(expected, int):
        assert len(found) + len(seen) == expected and found == sorted(set(found))
        assert found == questions(read(mixture, on_skip=seen.append, seed=5))[:-1]
        others = [questions(read(mixture, on_skip=seen.append, seed=seed)) for seed in range(4)]
        assert len({tuple(one) for one in others}) > 1
    else:
        assert found == [str(n) for n in expected if n != 2]
        assert len(seen) == (2 in expected)


def test_braces_stand_for_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a1", "b1", "a2", "b2"):
        write(tmp_path / f"{name}.json", numbered(int(name[1])))
    assert questions(read(tmp_path / "{a,b}1.json")) == ["1", "1"]
    assert len(read(str(tmp_path / "{a,b}{1,2}.json"))) == 4
    mixture = tmp_path / "mixture.yml"
    mixture.write_text('datasets:\n  - json_path: "{a,b}2.json"\n    sampling_strategy: first:1\n')
    assert questions(read(mixture)) == ["2", "2"]
    # A file of that very name is that file.
    assert len(read(write(tmp_path / "{a,b}1.json", numbered(7, 8, 9)))) == 3
    # As LLaVA-NeXT has them, names may start from the working folder.
    (tmp_path / "lists").mkdir()
    mixture = mixture.rename(tmp_path / "lists" / "mixture.yml")
    monkeypatch.chdir(tmp_path)
    assert questions(read(mixture)) == ["2", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a.json", "expected a list 'datasets', got None"),
        ("datasets: {}", "expected a list 'datasets', got {}"),
        ("datasets: []", r"expected a list 'datasets', got \[\]"),
        ("datasets: [a.json]", r"datasets\[0\]: expected 'json_path' as a file's name, got 'a.js"),
        ("datasets: [{json_path: 5}]", r"datasets\[0\]: expected 'json_path' as a file's name"),
        (
            "datasets: [{json_path: a.json, sampling_strategy: half}]",
            r"datasets\[0\]: expected 'sampling_strategy' as all, first:N, .* got 'half'",
        ),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:-1'}]", r"datasets\[0\]: expec"),
        (
            "datasets: [{json_path: a.json, sampling_strategy: false}]",
            r"datasets\[0\]: expected 's",
        ),
        ("datasets: [", "not a YAML file"),
        ("made: 2024-99-99", "not a YAML file"),  # a date to YAML, and none to Python
        ("datasets: !!python/object:os.system {}", "not a YAML file"),
    ],
)
def test_mixtures_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"mixture\.yaml: {message}"):
        read(path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    for given, message in (
        ([], "path: expected a file of records or a list of them, got none"),
        ([("a.json", 0)], "path: expected the weight of a.json as a number above 0, got 0"),
        ([("a.json", "2")], "path: expected the weight of a.json as a number above 0, got '2'"),
        ([("a.json", float("nan"))], "expected the weight of a.json as a number above 0, got nan"),
        ([("a.json", float("inf"))], "expected the weight of a.json as a number above 0, got inf"),
        ([("a.json", 1e300)], "path: expected a weight of a.json of at most 1000, got 1e"),
        ([["a.json", 1]], "path: expected a file, or a pair of a file and its weight"),
        (5, "path: expected a file, or a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sources(given)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"mixture\.yaml: there is no such file"):
        read(tmp_path / "mixture.yaml")


@pytest.mark.parametrize("argument", ["image_order", "on_fault", "overlong"])
def test_choices_are_named(tmp_path: Path, argument: str) -> None:
    path = write(tmp_path / "chat.json", [{"conversations": GOOD}])
    with pytest.raises(ValueError, match=f"{argument}: expected one of .*, got 'last'"):
        read(path, **{argument: "last"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length: expected with a processor"):
        read(path, max_length=5)


def test_columns_go_with_records(tmp_path: Path) -> None:
    """A sampler that splits by kind reads these, not the records."""
    data = read(write(tmp_path / "chat.json", numbered(3, 4)))
    assert data.lengths is None and data.with_image.dtype == np.bool_ and data.num_cut == 0
    held = ConversationDataset([{"conversation": record} for record in [data[0]["conversation"]]])
    assert held.with_image.tolist() == [False] and held.lengths is None


def test_a_fingerprint_differs_where_other_records_come(tmp_path: Path) -> None:
    """By it a run knows again what it was trained on; where a file lies is nothing to it."""
    one, two = (write(tmp_path / f"{n}.json", numbered(n, n + 1)) for n in (1, 2))
    (tmp_path / "moved").mkdir()
    moved = write(tmp_path / "moved" / "1.json", numbered(1, 2))
    settings: list[tuple[Any, dict[str, Any]]] = [
        (one, {}), (two, {}), ([one, two], {}), ([two, one], {}), ([(one, 2)], {}),
        (one, {"image_order": "keep"}), (one, {"image_order": "random"}),
        (one, {"image_order": "random", "seed": 1}),
    ]  # fmt: skip
    prints = [read(path, **options).fingerprint() for path, options in settings]
    assert len(set(prints)) == len(prints)
    assert read(one, seed=1).fingerprint() == read(moved).fingerprint() == prints[0]
    assert ConversationDataset([]).fingerprint() is None
