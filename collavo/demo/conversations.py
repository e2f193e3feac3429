"""What the tiny model is taught to talk about: objects, boxes, classes, counts and captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from collavo.demo.scenes import SIZE, SNAP, THING_NAMES
from collavo.demo.storage import Scenes
from collavo.evaluation import ask_class, ask_presence
from collavo.panoptic import (
    Detection,
    build_instruction,
    class_index,
    detections_from_map,
    display_name,
    is_thing,
)

Turn = tuple[str, str]
Talk = Callable[["Viewed", random.Random], list[Turn]]

_NUMBERS = ("no", "one", "two", "three", "four")


class Viewed:
    """One scene as its teacher knows it: its objects, and what lies in any box."""

    def __init__(self, scenes: Scenes, index: int) -> None:
        self.sample = scenes[index]
        self.detections = detections_from_map(self.sample.panoptic)
        self.things = [d for d in self.detections if is_thing(class_index(d.name))]
        self.stuff = [d for d in self.detections if not is_thing(class_index(d.name))]

    def class_in(self, x1: int, y1: int, x2: int, y2: int) -> str:
        """Return the display name of the class that covers most of a pixel box."""
        panoptic = self.sample.panoptic
        inside = panoptic.ids()[y1:y2, x1:x2].flatten().bincount()
        label = panoptic.segment_classes[panoptic.segment_ids == int(inside.argmax())]
        return display_name(int(label))


def crayon_turn(view: Viewed, rng: random.Random) -> list[Turn]:
    """One crayon instruction: names, names with boxes, or the boxes of a class."""
    instruction = build_instruction(view.detections, rng=rng)
    return [(instruction.question, instruction.answer)]


def box_turns(view: Viewed, rng: random.Random, count: int) -> list[Turn]:
    """B2C questions about some of the objects."""
    chosen = rng.sample(view.things, min(count, len(view.things)))
    return [(ask_class(one.box), one.name) for one in chosen]


def region_turns(view: Viewed, rng: random.Random, count: int) -> list[Turn]:
    """B2C questions about any boxes, stuff and parts of objects included."""
    turns = []
    for _ in range(count):
        width, height = (rng.choice((2, 3)) * SNAP for _ in range(2))
        x1 = rng.randrange(0, SIZE - width + 1, SNAP)
        y1 = rng.randrange(0, SIZE - height + 1, SNAP)
        box = (x1, y1, x1 + width, y1 + height)
        turns.append((ask_class([value / SIZE for value in box]), view.class_in(*box)))
    return turns


def presence_turns(view: Viewed, rng: random.Random, count: int) -> list[Turn]:
    """C2B questions, as many about classes that are there as about others."""
    present = sorted({one.name for one in view.things})
    absent = [name for name in THING_NAMES if name not in present]
    half = min(count // 2, len(present), len(absent))
    turns = [(ask_presence(name), "yes") for name in rng.sample(present, half)]
    return turns + [(ask_presence(name), "no") for name in rng.sample(absent, half)]


def count_turns(view: Viewed, rng: random.Random, count: int) -> list[Turn]:
    """Questions for the number of objects of a class that is there."""
    names = [one.name for one in view.things]
    chosen = rng.sample(sorted(set(names)), min(count, len(set(names))))
    return [(f"How many {name} are in the image?", _NUMBERS[names.count(name)]) for name in chosen]


def caption_turn(view: Viewed) -> Turn:
    """Ask for a sentence about the scene."""

    def listed(detections: Sequence[Detection]) -> str:
        return " and ".join(f"a {one.name}" for one in detections)

    place = " and ".join(dict.fromkeys(one.name for one in view.stuff)) or "nothing"
    return "Describe the image.", f"A picture of {listed(view.things)} in front of {place}."


def base_talk(view: Viewed, rng: random.Random) -> list[Turn]:
    """Mix lists, regions and questions: what stands in for LLaVA's training."""
    draw = rng.random()
    if draw < 0.2:
        return crayon_turn(view, rng)
    if draw < 0.5:
        turns = box_turns(view, rng, 4) + region_turns(view, rng, 4)
    else:
        turns = box_turns(view, rng, 1) + presence_turns(view, rng, 6) + count_turns(view, rng, 1)
    return rng.sample(turns, len(turns))


def list_talk(view: Viewed, rng: random.Random) -> list[Turn]:
    """Crayon instructions only: what the loss on held-out scenes is taken of."""
    return crayon_turn(view, rng)


def image_talk(view: Viewed, rng: random.Random) -> list[Turn]:
    """CPT and Image-CIT: crayon instructions and B2C."""
    return crayon_turn(view, rng) if rng.random() < 0.5 else box_turns(view, rng, 4)


def vl_talk(view: Viewed, rng: random.Random) -> list[Turn]:
    """VL-CIT: C2B, counts, captions and, as LLaVA's instruction data has them, regions."""
    turns = presence_turns(view, rng, 6) + count_turns(view, rng, 1) + region_turns(view, rng, 2)
    if rng.random() < 0.3:
        turns.append(caption_turn(view))
    return rng.sample(turns, len(turns))


class Talks(Dataset[dict[str, Any]]):
    """Conversations about scenes; which one is a pure function of the seed and the index.

    Args:
        scenes: The scenes.
        talk: Makes the turns.
        seed: Of every draw.
        rounds: How often every scene occurs, with other draws each time.
    """

    def __init__(self, scenes: Scenes, talk: Talk, seed: int, rounds: int = 1) -> None:
        self.scenes = scenes
        self.talk = talk
        self.seed = seed
        self.rounds = rounds
        self._views: dict[int, Viewed] = {}

    def __len__(self) -> int:
        return len(self.scenes) * self.rounds

    def turns(self, index: int) -> list[Turn]:
        """Return the questions and answers of one conversation."""
        scene = index % len(self.scenes)
        if scene not in self._views:
            self._views[scene] = Viewed(self.scenes, scene)
        return self.talk(self._views[scene], random.Random(f"{self.seed}/{index}"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one training record.

        Args:
            index: 0..len-1.
        """
        sample = self.scenes[index % len(self.scenes)]
        messages = []
        for question, answer in self.turns(index):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return {
            "image": sample.image,
            "panoptic": sample.panoptic,
            "conversation": messages,
            "object_text": False,
        }
