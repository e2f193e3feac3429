"""Conversations about drawn scenes in LLaVA's format, and the questions that scores are made of."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from collavo import writing
from collavo.demo.conversations import Turn, Viewed, presence_turns
from collavo.demo.llava.parts import PATCH
from collavo.demo.scenes import SIZE
from collavo.demo.storage import Scenes
from collavo.evaluation import ObjectQuestion

DESCRIBE = "Describe the image."


def caption(view: Viewed) -> str:
    """Return the sentence that describes a scene: its classes, each once, by the alphabet.

    Args:
        view: The scene.
    """
    things = " and ".join(f"a {name}" for name in sorted({one.name for one in view.things}))
    stuff = " and ".join(sorted({one.name for one in view.stuff})) or "nothing"
    return f"A picture of {things} in front of {stuff}."


def place_turns(view: Viewed) -> list[Turn]:
    """Ask for the highest and the lowest object, where one is higher, or lower, than all others.

    Args:
        view: The scene.
    """
    found: list[Turn] = []
    for place, edge, sign in (("top", 1, 1.0), ("bottom", 3, -1.0)):
        order = sorted(view.things, key=lambda one: sign * one.box[edge])
        gap = abs(order[1].box[edge] - order[0].box[edge]) if len(order) > 1 else 0.0
        if gap * SIZE >= PATCH - 0.5:
            found.append((f"Which object is at the {place} of the image?", order[0].name))
    return found


def turns(view: Viewed, rng: random.Random) -> list[Turn]:
    """Draw a conversation: the caption, questions for classes and for places, in any order.

    Args:
        view: The scene.
        rng: Of the draws.
    """
    drawn = [(DESCRIBE, caption(view)), *presence_turns(view, rng, 4), *place_turns(view)]
    return rng.sample(drawn, len(drawn))


class Talker:
    """Makes LLaVA's records of scenes; each is a pure function of the seed and its number.

    Args:
        scenes: The scenes.
        words: What each patch of each scene shows, as one word a patch: a scene for a reader.
        seed: Of the draws.
    """

    def __init__(self, scenes: Scenes, words: Sequence[str], seed: int) -> None:
        self.views = [Viewed(scenes, index) for index in range(len(scenes))]
        self.names = [scenes.file_name(index) for index in range(len(scenes))]
        self.words = words
        self.seed = seed

    def captions(self) -> list[dict[str, Any]]:
        """Return what ``align`` learns from: every scene with its caption."""
        return [
            record(f"caption-{i}", [("<image>\n" + DESCRIBE, caption(view))], self.names[i])
            for i, view in enumerate(self.views)
        ]

    def about_images(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return conversations about scenes that are seen.

        Args:
            numbers: Of the conversations; the scenes come in turn.
        """
        return [self._about(number, "image") for number in numbers]

    def about_words(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return conversations about scenes that are written down, without any image.

        Args:
            numbers: Of the conversations; the scenes come in turn.
        """
        return [self._about(number, "text") for number in numbers]

    def _about(self, number: int, kind: str) -> dict[str, Any]:
        scene = number % len(self.views)
        asked = turns(self.views[scene], random.Random(f"{self.seed}/{kind}/{number}"))
        head = "<image>" if kind == "image" else self.words[scene]
        asked[0] = (f"{head}\n{asked[0][0]}", asked[0][1])
        image = self.names[scene] if kind == "image" else None
        return record(f"{kind}-{number}", asked, image)


def record(name: str, asked: Sequence[Turn], image: str | None) -> dict[str, Any]:
    """Return a record in LLaVA's format.

    Args:
        name: Its id.
        asked: Questions and answers.
        image: Path of its image from the folder of images; None for text alone.
    """
    values = [
        (who, text) for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    made: dict[str, Any] = {"id": name}
    if image is not None:
        made["image"] = image
    return made | {"conversations": [{"from": who, "value": text} for who, text in values]}


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a list of records as LLaVA's JSON.

    Args:
        path: The file.
        records: The records.
    """
    writing.write_file(path, json.dumps(list(records)).encode())


def place_questions(scenes: Scenes) -> list[ObjectQuestion]:
    """Ask for the object of every quarter of every scene that has exactly one.

    Args:
        scenes: Held-out scenes.
    """
    return [
        ObjectQuestion("b2c", index, answer, question, answer)
        for index in range(len(scenes))
        for question, answer in place_turns(Viewed(scenes, index))
    ]


def caption_questions(scenes: Scenes) -> list[ObjectQuestion]:
    """Ask for the description of every scene; the answer is its caption.

    Args:
        scenes: Held-out scenes.
    """
    return [
        ObjectQuestion("b2c", index, "", DESCRIBE, caption(Viewed(scenes, index)))
        for index in range(len(scenes))
    ]
