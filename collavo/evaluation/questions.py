"""Questions about objects, made from panoptic maps: Class2Binary (C2B) and Box2Class (B2C).

C2B asks whether an image has any object of a class, B2C which object is in a box. The paper's
printed C2B questions all have the answer yes, which a model that always says yes would get right:
here every positive has a negative, and recall and specificity are reported beside accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from collavo._arguments import expect_like
from collavo.panoptic.categories import NUM_THINGS, class_index, display_name, is_thing
from collavo.panoptic.coco import CocoPanopticDataset
from collavo.panoptic.text import Detection, detections_from_map, format_box
from collavo.processing.box_frames import box_in_frame

Kind = Literal["c2b", "b2c"]


@dataclass(frozen=True)
class ObjectQuestion:
    """One question about one image, with its answer.

    Args:
        kind: ``"c2b"`` or ``"b2c"``.
        image: Position of the image in the data set.
        name: Display name of the class that is asked for (C2B) or that is the answer (B2C).
        text: What the user asks.
        answer: ``"yes"``, ``"no"`` or the class's display name.
    """

    kind: Kind
    image: int
    name: str
    text: str
    answer: str


def ask_presence(name: str) -> str:
    """Return the C2B question about a class.

    Args:
        name: The class's display name.

    Source: paper section 1 ("is there any ... in the image").

    Example:
        >>> ask_presence("horse")
        'Is there any horse in the image?'
    """
    return f"Is there any {name} in the image?"


def ask_class(box: Sequence[float]) -> str:
    """Return the B2C question about a box.

    Args:
        box: x1, y1, x2, y2 in 0..1.

    Source: paper section 1 ("which object is in the box ...").

    Example:
        >>> ask_class((0.06, 0.38, 0.27, 0.91))
        'Which object is in the box [0.06, 0.38, 0.27, 0.91]?'
    """
    return f"Which object is in the box {format_box(box)}?"


def things(samples: CocoPanopticDataset, index: int) -> list[Detection]:
    """List the countable objects of one image that cover at least one pixel.

    Args:
        samples: A COCO panoptic data set.
        index: Position of the image.
    """
    found = detections_from_map(samples.panoptic_map(index))
    return [one for one in found if is_thing(class_index(one.name))]


def class_questions(
    samples: CocoPanopticDataset,
    *,
    limit: int | None = None,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
) -> list[ObjectQuestion]:
    """Make C2B questions: one per thing class in an image, and one negative for each.

    Args:
        samples: A COCO panoptic data set.
        limit: Only the first so many images; None takes all.
        candidates: Display names that negatives are drawn from; None takes all 80 things.
        seed: Of the negatives.

    Returns:
        Positives and negatives in turn, by image. An image that shows nearly all candidates may
        have fewer negatives than positives.

    Raises:
        ValueError: if a candidate is no COCO thing.
    """
    names = [display_name(i) for i in range(NUM_THINGS)] if candidates is None else list(candidates)
    for name in names:
        if not is_thing(class_index(name)):
            raise ValueError(f"candidates: expected names of things, got {name!r}")
    questions: list[ObjectQuestion] = []
    for index in _images(samples, limit):
        present = list(dict.fromkeys(one.name for one in things(samples, index)))
        absent = [name for name in names if name not in present]
        rng = random.Random(f"{seed}/{index}")
        rng.shuffle(absent)
        answers = [(name, "yes") for name in present]
        answers += [(name, "no") for name in absent[: len(present)]]
        questions += [
            ObjectQuestion("c2b", index, name, ask_presence(name), answer)
            for name, answer in answers
        ]
    return questions


def box_questions(
    samples: CocoPanopticDataset, *, limit: int | None = None, box_frame: str = "image"
) -> list[ObjectQuestion]:
    """Make B2C questions: one per thing in an image.

    Args:
        samples: A COCO panoptic data set.
        limit: Only the first so many images; None takes all.
        box_frame: What boxes are fractions of, as of the model's ``CollavoProcessor``.

    Raises:
        ValueError: if there is no such frame.
    """
    questions = []
    for index in _images(samples, limit):
        height, width = samples.panoptic_map(index).size
        for one in things(samples, index):
            text = ask_class(box_in_frame(one.box, height, width, box_frame))
            questions.append(ObjectQuestion("b2c", index, one.name, text, one.name))
    return questions


def _images(samples: CocoPanopticDataset, limit: int | None) -> range:
    expect_like("samples", samples, "a CocoPanopticDataset", has=("panoptic_map", "__len__"))
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least one image, got {limit}")
    return range(len(samples) if limit is None else min(limit, len(samples)))
