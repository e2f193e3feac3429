"""Objects as text: ``(#1 horse) [0.06, 0.38, 0.27, 0.91], (#2 horse) [...]``, and back again.

Numbers and boxes come from the rows of a ``CrayonMap``, so the text and the crayon always say the
same. The parser is a strict grammar; nothing of the text is ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from collavo._arguments import expect_like
from collavo.panoptic.categories import display_name

if TYPE_CHECKING:
    from collavo.panoptic.maps import PanopticMap
    from collavo_kernels import CrayonMap

Box = tuple[float, float, float, float]

PREFIX = "The image includes "
NO_OBJECTS = "None of detailed object information for image. "

_WORD = r"[^\s()\[\],#.]+"
_NAME = rf"{_WORD}(?: {_WORD})*"
NAME_PATTERN = re.compile(_NAME)
"""What a class may be called, so that it can be read back from a text."""

_COORDINATE = r"(?:0\.[0-9][0-9]|1\.00)"
_OBJECT = re.compile(
    rf"\(#([0-9]+) ({_NAME})\) "
    rf"\[({_COORDINATE}), ({_COORDINATE}), ({_COORDINATE}), ({_COORDINATE})\]"
)
# Longest number that is read.
_DIGITS = 9
_NUMBERED = re.compile(rf"#([0-9]+) ({_NAME})")


@dataclass(frozen=True)
class Detection:
    """One object of an image: its class, its number within the class, its box.

    Args:
        name: Display name, such as ``"horse"``.
        number: 1, 2, ... per class and image; 0 for an instance beyond the largest number.
        box: ``(x1, y1, x2, y2)`` in 0..1 of the image's width and height, x2 and y2 exclusive.

    Raises:
        ValueError: if the name could not be read back from the text, the number is negative or has
            more than nine digits, or the box does not lie in 0..1 with x1 <= x2 and y1 <= y2.

    Example:
        >>> str(Detection("horse", 1, (0.06, 0.38, 0.27, 0.91)))
        '(#1 horse) [0.06, 0.38, 0.27, 0.91]'
    """

    name: str
    number: int
    box: Box

    def __post_init__(self) -> None:
        if NAME_PATTERN.fullmatch(self.name) is None:
            raise ValueError(
                f"name: expected words without ()[],.# and single spaces, got {self.name!r}"
            )
        if self.number < 0:
            raise ValueError(f"number: expected at least 0, got {self.number}")
        if self.number >= 10**_DIGITS:
            raise ValueError(f"number: expected below 10**{_DIGITS}, got {self.number}")
        x1, y1, x2, y2 = self.box
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise ValueError(f"box: expected 0 <= x1 <= x2 <= 1 and y alike, got {self.box}")

    def __str__(self) -> str:
        return f"(#{self.number} {self.name}) {format_box(self.box)}"


def detections_from_crayon(crayon: CrayonMap, image: int = 0) -> list[Detection]:
    """List the objects of one image of a crayon map, by ascending segment id.

    Every object has the number and the box of its own row. Segments that cover no pixel and
    segments of unknown class are not listed; the others keep their numbers.

    Args:
        crayon: Rows and cells of a batch.
        image: Which image of the batch.

    Raises:
        ValueError: if the batch has no such image.

    Source: paper section 3; the released code numbers and boxes by list position instead, which
        goes wrong where the list is not in the order of the ids.
    """
    expect_like("crayon", crayon, "a CrayonMap", has=("row_index",))
    count = crayon.row_index.shape[0]
    if not 0 <= image < count:
        raise ValueError(f"image: expected 0..{count - 1}, got {image}")
    return [one for owner, one in _detections(crayon) if owner == image]


def detections_by_image(crayon: CrayonMap) -> list[list[Detection]]:
    """List the objects of every image of a crayon map, as ``detections_from_crayon`` does.

    Args:
        crayon: Rows and cells of a batch.
    """
    found: list[list[Detection]] = [[] for _ in range(crayon.num_images)]
    for owner, one in _detections(crayon):
        found[owner].append(one)
    return found


def _detections(crayon: CrayonMap) -> Iterator[tuple[int, Detection]]:
    rows = zip(
        crayon.row_image.tolist(),
        crayon.row_class.tolist(),
        crayon.row_number.tolist(),
        crayon.row_area.tolist(),
        crayon.row_box.tolist(),
        strict=True,
    )
    for owner, label, number, area, box in rows:
        if label > 0 and area > 0:
            yield owner, Detection(display_name(label - 1), number, tuple(box))


def detections_from_map(panoptic: PanopticMap, *, max_number: int = 20) -> list[Detection]:
    """List the objects of a panoptic map, by ascending segment id.

    Args:
        panoptic: The map.
        max_number: Largest instance number; later instances of a class get 0.

    Example:
        >>> import torch
        >>> from collavo.panoptic import PanopticMap
        >>> ids = torch.tensor([[1, 1], [2, 2]], dtype=torch.int32)
        >>> scene = PanopticMap.from_segments(ids, [1, 2], [119, 17])
        >>> print(format_objects(detections_from_map(scene)))
        (#1 sky) [0.00, 0.00, 1.00, 0.50], (#1 horse) [0.00, 0.50, 1.00, 1.00]
    """
    from collavo_kernels import panoptic_lookup

    expect_like("panoptic", panoptic, "a PanopticMap", has=("segmentation", "segment_ids"))
    crayon = panoptic_lookup(
        [panoptic.segmentation],
        [panoptic.segment_ids],
        [panoptic.segment_classes],
        grid=(1, 1),
        max_number=max_number,
    )
    return detections_from_crayon(crayon)


def format_box(box: Sequence[float]) -> str:
    """Write a box as ``[x1, y1, x2, y2]`` with two decimals.

    Args:
        box: Four coordinates in 0..1.

    Example:
        >>> format_box((0, 0.384, 1, 0.5))
        '[0.00, 0.38, 1.00, 0.50]'
    """
    x1, y1, x2, y2 = box
    return f"[{x1:.2f}, {y1:.2f}, {x2:.2f}, {y2:.2f}]"


def format_objects(detections: Iterable[Detection], name: str | None = None) -> str:
    """Write objects as ``(#1 horse) [0.06, 0.38, 0.27, 0.91], ...``.

    Args:
        detections: The objects.
        name: Only the objects of this class; None takes all.

    Source: paper figure 5.

    Example:
        >>> cow, dog = Detection("cow", 1, (0, 0, 1, 1)), Detection("dog", 1, (0, 0, 1, 1))
        >>> format_objects([cow, dog], "dog")
        '(#1 dog) [0.00, 0.00, 1.00, 1.00]'
    """
    return ", ".join(str(one) for one in detections if name is None or one.name == name)


def format_names(detections: Iterable[Detection]) -> str:
    """Write objects without their boxes, as ``#1 horse, #2 horse``.

    Args:
        detections: The objects.

    Source: released code.

    Example:
        >>> format_names([Detection("horse", 1, (0, 0, 1, 1)), Detection("horse", 2, (0, 0, 1, 1))])
        '#1 horse, #2 horse'
    """
    return ", ".join(f"#{one.number} {one.name}" for one in detections)


def parse_objects(text: str, *, start: int = 0) -> list[Detection]:
    """Read what ``format_objects`` writes; its exact inverse for boxes of two decimals.

    Args:
        text: The whole text, nothing before or after it; the empty text has no objects.
        start: First character that is read.

    Raises:
        ValueError: naming the position, at anything that ``format_objects`` would not write.

    Example:
        >>> parse_objects("(#1 horse) [0.06, 0.38, 0.27, 0.91]")
        [Detection(name='horse', number=1, box=(0.06, 0.38, 0.27, 0.91))]
    """
    detections = []
    for match in _items(_OBJECT, text, "(#1 name) [0.00, 0.00, 1.00, 1.00]", start):
        x1, y1, x2, y2 = (float(match.group(i)) for i in range(3, 7))
        if x1 > x2 or y1 > y2:
            raise _unexpected(text, match.start(3), "x1 <= x2 and y1 <= y2")
        detections.append(Detection(match.group(2), _number(match), (x1, y1, x2, y2)))
    return detections


def parse_names(text: str, *, start: int = 0) -> list[tuple[str, int]]:
    """Read what ``format_names`` writes, as pairs of name and number.

    Args:
        text: The whole text; the empty text has no objects.
        start: First character that is read.

    Raises:
        ValueError: naming the position, at anything that ``format_names`` would not write.

    Example:
        >>> parse_names("#1 horse, #1 traffic light")
        [('horse', 1), ('traffic light', 1)]
    """
    return [(m.group(2), _number(m)) for m in _items(_NUMBERED, text, "#1 name", start)]


def object_prefix(detections: Sequence[Detection]) -> str:
    """Return what stands in front of a question: the image's objects, or that there are none.

    Args:
        detections: The objects.

    Source: paper section 4; released code.

    Example:
        >>> object_prefix([Detection("horse", 1, (0.06, 0.38, 0.27, 0.91))])
        'The image includes (#1 horse) [0.06, 0.38, 0.27, 0.91]. '
        >>> object_prefix([])
        'None of detailed object information for image. '
    """
    return f"{PREFIX}{format_objects(detections)}. " if detections else NO_OBJECTS


def split_prefix(text: str) -> tuple[list[Detection], str]:
    """Take the object prefix off a question; the inverse of ``object_prefix(objects) + question``.

    Args:
        text: A question that starts with a prefix.

    Returns:
        The objects and the question.

    Raises:
        ValueError: if the text does not start with a well-formed prefix.

    Example:
        >>> split_prefix("The image includes (#1 cow) [0.00, 0.00, 1.00, 1.00]. What is it?")
        ([Detection(name='cow', number=1, box=(0.0, 0.0, 1.0, 1.0))], 'What is it?')
    """
    if text.startswith(NO_OBJECTS):
        return [], text.removeprefix(NO_OBJECTS)
    end = text.find("]. ")
    if not text.startswith(PREFIX) or end < 0:
        raise ValueError(f"text: expected {PREFIX!r} or {NO_OBJECTS!r} at its start")
    return parse_objects(text[len(PREFIX) : end + 1]), text[end + 3 :]


def _items(pattern: re.Pattern[str], text: str, form: str, start: int) -> list[re.Match[str]]:
    matches: list[re.Match[str]] = []
    position = start
    while start < len(text):
        match = pattern.match(text, position)
        if match is None:
            raise _unexpected(text, position, repr(form))
        matches.append(match)
        position = match.end()
        if position == len(text):
            break
        if not text.startswith(", ", position):
            raise _unexpected(text, position, "', ' or the end")
        position += 2
    return matches


def _unexpected(text: str, position: int, wanted: str) -> ValueError:
    found = text[position : position + 40]
    return ValueError(f"text: expected {wanted} at character {position}, got {found!r}")


def _number(match: re.Match[str]) -> int:
    digits = match.group(1)
    if len(digits) > _DIGITS or (digits != "0" and digits.startswith("0")):
        raise _unexpected(match.string, match.start(1), "a number without leading zeros")
    return int(digits)
