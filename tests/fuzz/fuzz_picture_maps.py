"""Random trees of folders and JSON files: every picture gets its own map, none, or an error.

Names repeat over folders, JSON files list them with or without folders, sizes differ, and some
names lead out of their folder. What belongs to what is told here by the ends of strings.

    python -m tests.fuzz.fuzz_picture_maps --seconds 120 --seed 0
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from collavo.panoptic import (
    CocoPanopticDataset,
    category_id_from_index,
    find_panoptic_map,
    write_panoptic_png,
)

_FOLDERS = ("train", "val", "coco", "")
_BASES = ("001.png", "002.png", "12.png")
_SIZES = ((4, 6), (4, 6), (4, 6), (5, 6))
_OUTSIDE = ("../x.png", "/etc/x.png", "a/../../x.png", "val/..", "C:\\x.png", "..\\x.png", "", ".")


class Tree:
    """A COCO panoptic folder, and pictures of another data set beside it.

    Attributes:
        root: Of all.
        names: File names of the COCO images and of their PNGs, as the JSON has them.
        sizes: Height and width of each.
        pictures: Paths of the other data set's pictures, below ``root/vl``, with their sizes.
    """

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root = root
        self.names = sorted({self._name(draw) for _ in range(draw.randint(1, 4))})
        draw.shuffle(self.names)
        self.sizes = [draw.choice(_SIZES) for _ in self.names]
        paths = {f"{draw.choice(['x', 'coco'])}/{self._name(draw)}" for _ in range(4)}
        self.pictures = {path: draw.choice(_SIZES) for path in sorted(paths)}
        self.own = draw.random() < 0.2
        self._write(draw)

    def _name(self, draw: random.Random) -> str:
        parts = [draw.choice(_FOLDERS) for _ in range(draw.choice((0, 0, 1, 2)))]
        return "/".join([part for part in parts if part] + [draw.choice(_BASES)])

    def _write(self, draw: random.Random) -> None:
        images, annotations = [], []
        for number, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            image, png = self.images / name, self.root / "maps" / name
            for path in (image, png):
                path.parent.mkdir(parents=True, exist_ok=True)
            _picture(image, size)
            write_panoptic_png(png, torch.full(size, 7, dtype=torch.int32))
            listed = {"file_name": draw.choice((name, f"./{name}", name.replace("/", "\\")))}
            info = {"id": 7, "category_id": category_id_from_index(number)}
            images.append({"id": number, **listed})
            annotations.append({"image_id": number, "segments_info": [info], **listed})
        content = {"images": images, "annotations": annotations}
        (self.root / "coco.json").write_text(json.dumps(content))
        for path, size in self.pictures.items():
            (self.root / "vl" / path).parent.mkdir(parents=True, exist_ok=True)
            if not (self.root / "vl" / path).exists():
                _picture(self.root / "vl" / path, size)
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
        records = [{"image": path, "conversations": turns} for path in self.pictures]
        (self.root / "vl.json").write_text(json.dumps(records))

    @property
    def images(self) -> Path:
        """Folder of the COCO images; sometimes one of the other data set's."""
        return self.root / ("vl/coco" if self.own else "images")

    def size(self, path: str) -> tuple[int, int]:
        """Return height and width of a picture, which may be one of the COCO images."""
        with Image.open(self.root / "vl" / path) as picture:
            return picture.height, picture.width


def _picture(path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size[::-1], (9, 9, 9)).save(path)


def _shared(one: str, other: str) -> int:
    count = 0
    for first, second in zip(one.split("/")[::-1], other.split("/")[::-1], strict=False):
        if first != second:
            break
        count += 1
    return count


def check_png(tree: Tree, draw: random.Random) -> str:
    """One PNG with the JSON: the entry that ends as most of its path does."""
    path = tree.root / "maps" / draw.choice(tree.names)
    if draw.random() < 0.5:  # moved, or one that the JSON does not know
        moved = tree.root / draw.choice(("copy", "maps")) / tree._name(draw)
        moved.parent.mkdir(parents=True, exist_ok=True)
        if not moved.exists():
            write_panoptic_png(moved, torch.full((4, 6), 7, dtype=torch.int32))
        path = moved
    text = path.as_posix()
    # How much they share; then whether that is all of the name.
    ranks = {name: (_shared(name, text), text.endswith(f"/{name}")) for name in tree.names}
    best = [name for name in tree.names if ranks[name][0] and ranks[name] == max(ranks.values())]
    others = [
        parent / name
        for name in best
        for parent in path.parents
        if not ranks[name][1] and (parent / name).exists()
    ]
    expected = tree.names.index(best[0]) if len(best) == 1 and not others else None
    try:
        found = int(find_panoptic_map(path, tree.root / "coco.json").segment_classes[0])
    except ValueError as error:
        assert expected is None, f"{text} of {tree.names}: refused: {error}"
        return "PNG refused"
    assert found == expected, f"{text} of {tree.names}: got entry {found}, expected {expected}"
    return "PNG found"


def check_data_set(tree: Tree, draw: random.Random) -> str:
    """Pictures of another data set, with and without the folder that the JSON describes."""
    from collavo.cli.train_crayon import datasets

    folder = draw.choice((None, None, "coco", "x", "coco/val"))
    expected, clash = expected_maps(tree, folder)
    args = SimpleNamespace(
        vl_data=[tree.root / "vl.json"], vl_images=tree.root / "vl", vl_coco_images=folder
    )
    training = SimpleNamespace(stage="cit", vl_probability=0.5, stream_seed=0, process_index=0)
    samples = CocoPanopticDataset(tree.images, tree.root / "maps", tree.root / "coco.json")
    told = f"{list(tree.pictures)}, {folder}, of {tree.names}"
    empty = folder is not None and not any(path.startswith(f"{folder}/") for path in tree.pictures)
    unlike = [path for path, number in expected.items() if tree.sizes[number] != tree.size(path)]
    try:
        with redirect_stdout(io.StringIO()):  # the first process says how many have a map
            _, data = datasets(args, training, samples, 20)  # type: ignore[arg-type]
    except ValueError as error:
        named = [str(tree.root / "vl" / path) in str(error) for path in clash or unlike]
        assert empty or (all(named) if clash else any(named)), f"{told}: refused: {error}"
        return "data set refused"
    assert not (clash or empty or unlike), f"{told}: expected to be refused for {clash or unlike}"
    vl_data: Any = data
    for index, path in enumerate(tree.pictures):
        (panoptic,) = vl_data[index]["panoptic"]
        found = None if panoptic is None else int(panoptic.segment_classes[0])
        number = expected.get(path)
        assert found == number, f"{told}: {path} has map {found}, expected {number}"
    return "data set"


def expected_maps(tree: Tree, folder: str | None) -> tuple[dict[str, int], list[str]]:
    """Return the entry of every picture that has one, or two pictures that claim one."""
    claims: dict[str, list[str]] = {}
    for path in tree.pictures:
        if folder is not None and not path.startswith(f"{folder}/"):
            continue
        rest = path if folder is None else path.removeprefix(f"{folder}/")
        full = (tree.root / "vl" / path).as_posix()
        least = 1 if folder is None else rest.count("/") + 1
        ends = [n for n in tree.names if full.endswith(f"/{n}") and n.count("/") + 1 >= least]
        if ends:
            claims.setdefault(max(ends, key=len), []).append(path)
    found = {}
    for name, paths in claims.items():
        own = [path for path in paths if tree.own and path == f"coco/{name}"]
        if len(paths) > 1 and not own:
            return {}, paths[:2]
        found[(own or paths)[0]] = tree.names.index(name)
    return found, []


def check_names(tree: Tree, draw: random.Random) -> str:
    """A name that leads out of its folder is refused, or listed among what is skipped."""
    path = tree.root / "coco.json"
    content = json.loads(path.read_text())
    (tree.root / "x.png").write_bytes((tree.images / tree.names[0]).read_bytes())
    entry = draw.choice(content[draw.choice(("images", "annotations"))])
    entry["file_name"] = draw.choice(_OUTSIDE)
    path.write_text(json.dumps(content))
    folders = (tree.images, tree.root / "maps", path)
    try:
        CocoPanopticDataset(*folders)
    except ValueError as error:
        assert "file_name" in str(error), error
    else:
        raise AssertionError(f"{entry['file_name']!r} was taken")
    left = CocoPanopticDataset(*folders, skip_faults=True)
    assert len(left) == len(tree.names) - 1 and left.skipped, left.skipped
    return "names"


def run_case(seed: int) -> str:
    """Draw a tree and check one thing about it; returns what."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder).resolve(), draw)
        check = draw.choice((check_png, check_data_set, check_data_set, check_names))
        return check(tree, draw)


def main() -> int:
    """Run cases until the time is up; a failing one is printed with its seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failures, stop, seed = 0, time.monotonic() + args.seconds, args.seed
    while time.monotonic() < stop:
        try:
            counts[run_case(seed)] += 1
        except Exception as error:
            failures += 1
            if failures <= 20:
                print(f"seed {seed}: {type(error).__name__}: {error}")
        seed += 1
    print(f"{seed - args.seed} trees, {failures} wrong; right: {dict(counts)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
