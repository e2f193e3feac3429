"""A COCO panoptic sample to test with: one drawn here, or the photograph where its folder is given.

The photograph is image 142238 of COCO val2017, whose licence (CC BY-NC) keeps it out of this
repository; tests/data/README.md says how to hand it in. The drawing has what it has: objects that
hide each other, many of one class, a crowd, stuff, ids in no order, a JPEG beside a PNG.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from collavo.panoptic import coco_categories

Mask = npt.NDArray[np.bool_]
HEIGHT, WIDTH = 427, 640
ys, xs = np.ogrid[:HEIGHT, :WIDTH]
PERSON, BENCH, DOG, UMBRELLA, BALL, KITE = 1, 15, 18, 28, 37, 38
TREE, FENCE, SKY, GRASS = 184, 185, 187, 193
CROWD = 3  # its place in scene()
NAMES = frozenset(
    ["person", "bench", "dog", "umbrella", "sports ball", "kite", "tree", "fence", "sky", "grass"]
)


class CocoSample(NamedTuple):
    """A folder with one annotated image, and what is known of it beforehand."""

    folder: Path
    stem: str
    names: frozenset[str]
    people: int
    crowd: int

    @property
    def image(self) -> Path:
        return self.folder / "images" / f"{self.stem}.jpg"

    @property
    def png(self) -> Path:
        return self.folder / "panoptic" / f"{self.stem}.png"

    @property
    def annotations(self) -> Path:
        return self.folder / "panoptic.json"

    def segments(self) -> list[dict[str, Any]]:
        """Return the annotation's segments: id, category_id, area, bbox, iscrowd."""
        (annotation,) = json.loads(self.annotations.read_text())["annotations"]
        return list(annotation["segments_info"])


def photograph(folder: Path) -> CocoSample:
    """Describe image 142238; people are 13 and the crowd."""
    names = frozenset({"person", "sports ball", "tree", "sky", "grass"})
    return CocoSample(folder, "000000142238", names, 14, 3153362)


def disc(y: int, x: int, radius: int) -> Mask:
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def box(top: int, left: int, bottom: int, right: int) -> Mask:
    return (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)


def person(y: int, x: int, size: int) -> Mask:
    """A head over a body, and legs with grass between them."""
    legs = box(y + 5 * size, x - size, y + 9 * size, x + size) & (abs(xs - x) > size // 3)
    return disc(y, x, size) | box(y + size, x - size, y + 5 * size, x + size) | legs


def diamond(y: int, x: int, size: int) -> Mask:
    return abs(ys - y) + 2 * abs(xs - x) <= size


def scene() -> list[tuple[int, Mask]]:
    """Return category and shape of every segment, the farthest first."""
    treetops = ys + (xs * 7 % 90 - 45) ** 2 // 40 > 120
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for i in range(40):
        crowd |= disc(185 + i * 13 % 17, 15 + 16 * i, 6)
    people = [(150 + 11 * i % 70, 20 + 53 * i, 8 + i % 5) for i in range(12)]
    return [
        (SKY, box(0, 0, HEIGHT, WIDTH)),
        (TREE, treetops),
        (FENCE, box(170, 0, 215, WIDTH) & (xs % 9 < 3)),
        (PERSON, crowd),  # many heads, one segment
        (GRASS, box(205, 0, HEIGHT, WIDTH)),
        *((KITE, diamond(25 + 17 * i, 90 + 150 * i, 20)) for i in range(4)),
        (BENCH, box(300, 380, 318, 520)),  # the person before it parts it in two
        *((PERSON, person(*place)) for place in people),
        (UMBRELLA, disc(265, 130, 40) & (ys < 265)),
        (UMBRELLA, disc(240, WIDTH, 36) & (ys < 240)),  # half of it outside
        *((DOG, box(370 - 6 * i, 60 + 190 * i, 392, 100 + 190 * i)) for i in range(3)),
        (PERSON, person(280, 450, 11)),
        (BALL, disc(410, 333, 5)),
    ]


def draw(folder: Path) -> CocoSample:
    """Write the drawn sample, the same each time: a JPEG, its map and panoptic.json."""
    stem = f"{1:012d}"
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    shapes = scene()
    # An odd factor: distinct, of up to 24 bits, in no order.
    numbers = [k * 0x3779B1 % 2**24 for k in range(1, len(shapes) + 1)]
    for number, (_, mask) in zip(numbers, shapes, strict=True):
        ids[mask] = number
    infos = []
    for index, (number, (category, _)) in enumerate(zip(numbers, shapes, strict=True)):
        y, x = np.nonzero(ids == number)
        left, top = int(x.min()), int(y.min())
        bbox = [left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top]
        crowd = int(index == CROWD)
        infos.append(
            {"id": number, "category_id": category, "iscrowd": crowd, "area": len(y), "bbox": bbox}
        )
    people = sum(category == PERSON for category, _ in shapes)
    sample = CocoSample(folder, stem, NAMES, people, numbers[CROWD])
    _write(sample, ids, infos)
    return sample


def _write(sample: CocoSample, ids: npt.NDArray[np.int64], infos: list[dict[str, Any]]) -> None:
    for path in (sample.image, sample.png):
        path.parent.mkdir(parents=True)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(sample.png)
    noise = np.random.default_rng(0).integers(-20, 21, colours.shape)
    Image.fromarray(np.clip(colours + noise, 0, 255).astype(np.uint8)).save(sample.image)
    image = {"id": 1, "file_name": sample.image.name, "height": HEIGHT, "width": WIDTH}
    annotation = {"image_id": 1, "file_name": sample.png.name, "segments_info": infos}
    content = {
        "info": {"description": "a drawn scene"},
        "licenses": [],
        "images": [image],
        "annotations": [annotation],
        "categories": coco_categories(),
    }
    sample.annotations.write_text(json.dumps(content))
