"""``collavo labels`` on folders of processors: what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conversations import MARKED_CHATML, WRONG_CHATML, characters
from PIL import Image

from collavo.cli import labels, main
from tests.collavo.processing import golden_llava, tiny_llavas
from tests.collavo.tiny import tiny_processor

RECORDS = [
    {
        "id": "one",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "a horse"},
            {"from": "human", "value": "Is it red?"},
            {"from": "gpt", "value": "yes,\nred"},
        ],
    },
    {
        "id": 2,
        "conversations": [
            {"from": "human", "value": "Is it red?"},
            {"from": "gpt", "value": "no"},
        ],
    },
    {"id": 3, "conversations": [{"from": "human", "value": "Is it red?"}]},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(RECORDS))
    return path


def saved(processor: Any, folder: Path, template: str | None = None) -> str:
    if template is not None:
        processor.chat_template = template
    processor.save_pretrained(folder)
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main(["labels", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_conversation_with_its_targets_marked(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(golden_llava.processor("spm_legacy", "v1"), tmp_path / "model")
    status, out, err = run(capsys, "--model", folder, "--data", data)
    assert (status, err) == (0, "")
    assert f"{data}: [0] (id 'one'): " in out
    assert "1 image of 4 tokens" in out
    assert "<s> A chat between a curious user" in out
    assert (
        "USER: <image> x 4 ↵\nWhat is it? ASSISTANT:[[ a horse</s>]] USER: Is it red? "
        "ASSISTANT:[[ yes,↵\nred</s>]]\n" in out
    )
    assert "nothing else: 1 of 1" in out
    assert "leaves out 'a horse</s>'" in out
    assert "\x1b" not in out
    status, out, _ = run(capsys, "--model", folder, "--data", data, "--sample", "1")
    assert status == 0
    assert out.count("[[") == 1
    assert "[[ no</s>]]" in out


def test_a_whole_data_set(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny_llavas.llava(), tmp_path / "model")
    status, out, _ = run(capsys, "--model", folder, "--data", data, "--all", "--template", "v1")
    assert status == 0
    assert out.startswith(f"{data}, 2 conversations, LlavaProcessor, template v1\n")
    assert "nothing else: 2 of 2" in out
    numbers = dict(re.findall(r"^(\w+) +([\d,]+)(?:  |$)", out, re.MULTILINE))
    assert numbers | {"tokens": "", "targets": ""} == {
        "tokens": "", "targets": "", "images": "1", "cut": "0", "skipped": "1",
    }  # fmt: skip
    assert "    [2] (id 3): expected a question with an answer" in out
    table = out[out.index("trained wrongly") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1, "columns are aligned"
    assert [line[:11] for line in table[1:]] == [
        "answers and", "{% generati", "everything ", "copy of inp"
    ]  # fmt: skip
    assert "everything after the last 'ASSISTANT:'" in table[3]
    longest = out[out.index("longest, in tokens") :].splitlines()[1:]
    assert [line.split("  ")[-1] for line in longest] == ["[0] (id 'one')", "[1] (id 2)"]


def test_what_cannot_be_done_is_said(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny_llavas.llava_next(), tmp_path / "model")
    status, out, _ = run(capsys, "--model", folder, "--data", data, "--all")
    assert status == 0
    assert "cannot be done: the chat template has no {% generation %} block" in out
    assert "1 image taken as blank, 336 pixels square; --images reads sizes" in out
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    more = ("--all", "--images", tmp_path)
    assert "taken as blank" not in run(capsys, "--model", folder, "--data", data, *more)[1]


def test_a_failing_property_has_status_1_and_names_the_records(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(characters(), tmp_path / "model", WRONG_CHATML)
    status, out, _ = run(capsys, "--model", folder, "--data", data, "--all")
    assert status == 1
    assert "nothing else: 0 of 2" in out
    assert "\n    [0] (id 'one'): expected the targets to be answer 1, 'a horse<|im_end|>'" in out
    assert "\n    [1] (id 2): " in out
    status, out, _ = run(capsys, "--model", folder, "--data", data)
    assert status == 1
    assert "[[What is it?<|im_end|>]]" in out


def test_a_length_cuts_behind_answers(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(characters(), tmp_path / "model", MARKED_CHATML)
    more = ("--max-length", "60", "--sample", "0")
    status, out, _ = run(capsys, "--model", folder, "--data", data, *more)
    assert status == 0
    assert re.search(r"\(id 'one'\): \d\d tokens, cut from \d\d\d?, 8 targets\n", out)
    assert out.count("[[") == 1
    status, out, _ = run(capsys, "--model", folder, "--data", data, "--max-length", "45", "--all")
    assert status == 0
    assert "nothing of its answer is left within max_length=45" not in out
    assert "longest, in tokens before cutting" in out


class Terminal:
    """Standard output as a terminal has it."""

    def __init__(self) -> None:
        self.text = ""
        self.encoding = "utf-8"

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_colours_in_a_terminal_unless_they_are_not_wanted(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(golden_llava.processor("spm_legacy", "v1"), tmp_path / "model")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def printed() -> str:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        arguments = labels_arguments("--model", folder, "--data", str(data))
        assert labels.run(arguments) == 0
        return terminal.text

    text = printed()
    # The ground ends with the line and starts again on the next.
    assert "ASSISTANT:\x1b[30;42m yes,↵\x1b[0m\n\x1b[30;42mred</s>\x1b[0m" in text
    assert "\x1b[2m<s>\x1b[0m A chat" in text
    assert "\x1b[35m<image> x 4\x1b[0m" in text
    assert "[[" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed()
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" in printed()
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed()


def labels_arguments(*words: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    labels.add_arguments(parser)
    return parser.parse_args(words)


def test_no_code_of_a_folder_is_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(saved(characters(), tmp_path / "model", MARKED_CHATML))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}
    (folder / "processor_config.json").write_text(json.dumps(own))
    status, _, err = run(capsys, "--model", folder, "--data", data)
    assert status == 2
    assert err.startswith(f"collavo labels: error: {folder}: its processor cannot be read (")
    assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--model", "EMPTY"], "expected a processor or a tokenizer, got none of"),
        (["--model", "BARE"], "expected a chat template, got none"),
        (["--model", "DAMAGED"], "its processor cannot be read ("),
        (["--data", "gone.json"], "gone.json: there is no such file"),
        (["--data", "OBJECT"], "expected a list of records, got dict"),
        (["--data", "UNANSWERED", "--all"], "expected a conversation with an answer, got none"),
        (["--data", "UNANSWERED"], "[0] (id 3): it is left out: expected a question"),
        (["--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--template", "vicuna"], "expected one of demo, eval, paper, plain, v0"),
        (["--sample", "3"], "--sample: expected the number of one of 3 records, got 3"),
        (["--sample", "-1"], "--sample: expected a number from 0, got -1"),
        (["--max-length", "0"], "max_length: expected at least 1, got 0"),
        (["--max-length", "9"], "nothing of its answer is left within max_length=9"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    folders = {name: tmp_path / name for name in ("EMPTY", "BARE", "DAMAGED")}
    for folder in folders.values():
        folder.mkdir()
    saved(characters(), folders["BARE"])
    (folders["DAMAGED"] / "tokenizer.json").write_text("{")
    (tmp_path / "OBJECT").write_text('{"id": 1}')
    (tmp_path / "UNANSWERED").write_text(json.dumps(RECORDS[2:]))
    given = {
        "--model": saved(tiny_processor(), tmp_path / "model"),
        "--data": str(data),
    }
    given |= {words[0]: words[1]}
    names = [*folders, "OBJECT", "UNANSWERED"]
    flat = [str(tmp_path / one) if one in names else one for pair in given.items() for one in pair]
    status, out, err = run(capsys, *flat, *words[2:])
    assert (status, out) == (2, "")
    assert err.startswith("collavo labels: error: ")
    assert said in err
    assert err.count("\n") == 1
