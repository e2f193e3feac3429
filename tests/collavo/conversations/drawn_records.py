"""Records in LLaVA's format, and files of them beside their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from collavo.conversations import ConversationDataset

GOOD = [{"from": "human", "value": "What"}, {"from": "gpt", "value": "yes"}]


def turns(*values: Any, first: str = "human") -> list[dict[str, Any]]:
    """Make turns of two speakers."""
    others = {"human": "gpt", "gpt": "human"}
    spoken = []
    for value in values:
        spoken.append({"from": first, "value": value})
        first = others[first]
    return spoken


def numbered(*numbers: int, image: str | None = None) -> list[dict[str, Any]]:
    """Make records that say their number."""
    extra = {} if image is None else {"image": image}
    return [{"id": n, **extra, "conversations": turns(f"number {n}", "yes")} for n in numbers]


def write(path: Path, records: Any) -> Path:
    """Write a list in JSON, or JSON lines by the name's end."""
    lines = [json.dumps(one) for one in records] if path.suffix == ".jsonl" else None
    path.write_text(json.dumps(records) if lines is None else "\n".join(lines))
    return path


def pictures(folder: Path, *names: str) -> Path:
    """Write small pictures into a folder."""
    for name in names:
        Image.new("RGB", (6, 4)).save(folder / name)
    return folder


def said(data: ConversationDataset, index: int = 0) -> list[Any]:
    """Return the contents of a record's messages, images as ``"<>"``."""
    shown = []
    for turn in data.records[index]["conversation"]:
        content = turn["content"]
        if not isinstance(content, str):
            content = [part.get("text", "<>") for part in content]
        shown.append(content)
    return shown


def questions(data: ConversationDataset) -> list[str]:
    """Return the first question of each record of :func:`numbered`, by its number."""
    found = []
    for record in data.records:
        content = record["conversation"][0]["content"]
        found.append(content if isinstance(content, str) else content[-1]["text"])
    return [one.removeprefix("number ") for one in found]
