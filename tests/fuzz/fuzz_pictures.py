"""Random picture files: the same pixels everywhere, and those that a viewer shows.

What a viewer shows is computed here from the samples that were written, by formulas of its own; for
opaque 8-bit RGB and gray it is what Pillow and transformers read. Damaged files must be refused
with an error that names them.

    python -m tests.fuzz.fuzz_pictures --seconds 120 --seed 0
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.picture_files import (
    Pixels,
    cmyk_profile,
    exif_bytes,
    lab_to_srgb,
    png_bytes,
    tiff_bytes,
)

Random = np.random.Generator


@dataclass
class Picture:
    """A file as it is written, and what it shows.

    Attributes:
        kind: What it is, for messages.
        suffix: Of the file's name.
        content: The file.
        shown: float64 ``[H, W, 3]``, before EXIF turns it; None where the file must be refused.
        slack: By how much a value may differ: 1 where a formula rounds.
        plain: Whether transformers must read the same.
    """

    kind: str
    suffix: str
    content: bytes
    shown: Pixels | None
    slack: float = 0.0
    plain: bool = False


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Return stored pixels as EXIF's orientation shows them."""
    return {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }.get(orientation, pixels)


def on_white(colours: Pixels, alpha: Pixels) -> Pixels:
    """Lay colours ``[H, W, 3]`` with alpha ``[H, W]``, both in 0..255, on white."""
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def _three(gray: Pixels) -> Pixels:
    return np.repeat(gray[..., None].astype(np.float64), 3, axis=-1)


def _saved(image: Image.Image, suffix: str, orientation: int, **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{suffix}"
        image.save(path, exif=exif_bytes(orientation), **options)
        return path.read_bytes()


def _size(random: Random) -> tuple[int, int]:
    return int(random.integers(1, 14)), int(random.integers(1, 14))


def plain(random: Random, orientation: int) -> Picture:
    """Opaque RGB and gray of 8 bits, in the formats of the web."""
    shape = _size(random) + ((3,) if random.random() < 0.6 else ())
    image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    suffix = str(random.choice([".png", ".jpg", ".webp", ".tif"]))
    content = _saved(image, suffix, orientation, **({"lossless": True} if "w" in suffix else {}))
    shown = np.asarray(image.convert("RGB")).astype(np.float64)
    if suffix == ".jpg":
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a.jpg").write_bytes(content)
            shown = np.asarray(Image.open(Path(folder) / "a.jpg").convert("RGB")).astype(np.float64)
    # Pillow scrambles an uncompressed TIFF of gray that is turned, and so does transformers.
    same = suffix != ".tif" or orientation < 5
    return Picture(f"plain {image.mode} {suffix}", suffix, content, shown, plain=same)


def png(random: Random, orientation: int) -> Picture:
    """PNGs of every colour type and depth, with and without transparent colours."""
    kind = int(random.choice([0, 0, 2, 3, 4, 6]))
    depth = int(random.choice({0: [1, 2, 4, 8, 16], 3: [1, 2, 4, 8]}.get(kind, [8, 16])))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    # Few values, so that a transparent colour is met.
    values = random.integers(0, 2**depth, 3)
    samples = values[random.integers(0, 3, (*_size(random), channels))]
    eight = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
    alpha = np.full(samples.shape[:2], 255.0)
    palette, clear = b"", b""
    if kind == 3:
        colours = random.integers(0, 256, (2**depth, 3), dtype=np.uint8)
        palette = colours.tobytes()
        eight = colours[samples[..., 0]]
    if kind in (4, 6):
        alpha = eight[..., -1].astype(np.float64)
        eight = eight[..., :-1]
    elif random.random() < 0.6:
        if kind == 3:
            some = random.integers(0, 256, 2**depth if random.random() < 0.5 else 1)
            if random.random() < 0.3:
                some = np.where(np.arange(len(some)) == 0, 0, 255)
            clear = some.astype(np.uint8).tobytes()
            alpha = np.append(some, np.full(256, 255))[: 2**depth][samples[..., 0]].astype(float)
            if len(some) < 2**depth:
                full = np.full(2**depth, 255.0)
                full[: len(some)] = some
                alpha = full[samples[..., 0]]
        else:
            # One pixel's colour, of which no other colour shares the upper bytes.
            key = samples[0, 0]
            clear = key.astype(">u2").tobytes()
            hit = (eight == eight[0, 0]).all(-1) if kind == 2 else samples[..., 0] == key[0]
            alpha = np.where(hit, 0.0, 255.0)
    shown = on_white(_three(eight[..., 0]) if eight.shape[-1] == 1 else eight, alpha)
    late = bool(random.random() < 0.3)
    content = png_bytes(
        samples, depth, kind, clear=clear, palette=palette, exif=exif_bytes(orientation),
        exif_late=late,
    )  # fmt: skip
    name = (
        f"PNG type {kind}, {depth} bits{', tRNS' if clear else ''}{', late EXIF' if late else ''}"
    )
    return Picture(name, ".png", content, shown, slack=0.51)


def deep(random: Random, orientation: int) -> Picture:
    """Gray TIFFs of 16 and 32 bits and of floats, either end first, white or black as zero."""
    kind = str(random.choice(["<u2", ">u2", "<u4", "<i4", ">i4", "<i2", "<f4", ">f4"]))
    dtype = np.dtype(kind)
    shape = _size(random)
    inverted = False
    if dtype.kind == "f":
        white = float(random.choice([1, 255, 65535]))
        values = (random.random(shape) * white).astype(dtype)
        values[0, 0] = white
        inverted = bool(random.random() < 0.3)
        shown = values.astype(np.float64) / white * 255
    else:
        bits = 8 * dtype.itemsize - (dtype.kind == "i")
        if kind == "<u2":
            inverted = bool(random.random() < 0.3)
        used = bits if bits == 16 or random.random() < 0.6 else 8
        values = random.integers(0, 2**used, shape).astype(dtype)
        values[0, 0] = 2**used - 1
        shown = (values.astype(np.int64) >> (used - 8)).astype(np.float64)
    if inverted:
        shown = 255 - shown
    content = tiff_bytes(values, white_is_zero=inverted, orientation=orientation)
    name = f"TIFF {kind}{', white is zero' if inverted else ''}"
    return Picture(name, ".tif", content, _three(shown), slack=0.51)


def unclear(random: Random, orientation: int) -> Picture:
    """Samples that do not tell what is white: refused, never guessed."""
    shape = _size(random)
    values: Pixels = random.integers(256, 20000, shape).astype("<i4")
    if random.random() < 0.5:
        values = random.uniform(1.2, 100, shape).astype("<f4")
    bad = random.choice([0.0, -5.0, np.nan])
    if bad != 0.0 and (values.dtype.kind == "f" or not np.isnan(bad)):
        values[0, 0] = bad
    content = tiff_bytes(values, orientation=orientation)
    return Picture(f"TIFF {values.dtype} without white", ".tif", content, None)


def print_colours(random: Random, orientation: int) -> Picture:
    """CMYK with and without a profile, and LAB, which LittleCMS interpolates; not near black."""
    shape = _size(random)
    which = int(random.integers(3))
    if which == 0:
        lab = random.integers(-12, 13, (*shape, 3))
        lab[..., 0] = random.integers(100, 200, shape)
        image = Image.frombytes("LAB", shape[::-1], (lab & 255).astype(np.uint8).tobytes())
        shown = lab_to_srgb(lab * (100 / 255, 1, 1))
        return Picture("LAB", ".tif", _saved(image, ".tif", orientation), shown, slack=4)
    ink = random.integers(0, 2, (*shape, 4))
    image = Image.fromarray((ink * 255).astype(np.uint8), "CMYK")
    if which == 1:
        shown = 255.0 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
        return Picture("CMYK", ".tif", _saved(image, ".tif", orientation), shown)
    corners = random.integers(116, 140, (2, 2, 2, 2, 3))
    corners[..., 0] = random.integers(100, 200, (2, 2, 2, 2))
    corners[0, 0, 0, 0] = 255, 128, 128  # LittleCMS makes paper white, whatever stands there
    lab = (corners - (0, 128, 128))[tuple(np.moveaxis(ink, -1, 0))] * (100 / 255, 1, 1)
    content = _saved(image, ".tif", orientation, icc_profile=cmyk_profile(corners))
    return Picture("CMYK with profile", ".tif", content, lab_to_srgb(lab), slack=4)


def animated(random: Random, orientation: int) -> Picture:
    """Several frames, of which the first is read; a GIF has no EXIF."""
    shape = _size(random)
    frames = [Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in "123"]
    suffix = str(random.choice([".webp", ".png", ".tif"]))
    options = {"save_all": True, "append_images": frames[1:]}
    if suffix == ".webp":
        options["lossless"] = True
    content = _saved(frames[0], suffix, orientation, **options)
    return Picture(f"animated {suffix}", suffix, content, np.asarray(frames[0]).astype(float))


def damaged(random: Random, orientation: int) -> Picture:
    """A file with bytes changed or cut off: refused, or read the same everywhere."""
    picture = _KINDS[int(random.integers(len(_KINDS) - 1))](random, orientation)
    content = bytearray(picture.content)
    if random.random() < 0.5:
        content = content[: int(random.integers(len(content)))]
    else:
        for place in random.integers(0, len(content), 4):
            content[place] ^= int(random.integers(1, 256))
    return Picture(f"damaged {picture.kind}", picture.suffix, bytes(content), None)


_KINDS: list[Callable[[Random, int], Picture]] = [
    plain, png, png, deep, unclear, print_colours, animated, damaged,
]  # fmt: skip


def run_case(seed: int, folder: Path) -> str:
    """Draw a picture, read it in every way and compare; returns its kind."""
    random = np.random.default_rng(seed)
    orientation = int(random.choice([1, 2, 3, 4, 5, 6, 7, 8, 8, 6, 0, 9]))
    picture = _KINDS[int(random.integers(len(_KINDS)))](random, orientation)
    path = folder / f"picture-{seed}{picture.suffix}"
    path.write_bytes(picture.content)
    name = f"{picture.kind}, orientation {orientation}"
    try:
        _compare(picture, path, orientation, name)
    finally:
        path.unlink()
    return picture.kind.partition(" ")[0]


def _compare(picture: Picture, path: Path, orientation: int, name: str) -> None:
    from transformers.image_utils import load_image

    from collavo.panoptic.coco import read_image, read_image_size

    try:
        read = read_image(path)
    except ValueError as error:
        assert picture.shown is None, f"{name}: refused: {error}"
        assert str(path) in str(error), f"{name}: the file is not named: {error}"
        return
    pixels = np.asarray(read)
    assert read.mode == "RGB" and read_image_size(path) == pixels.shape[:2], name
    if picture.shown is None:
        assert picture.kind.startswith("damaged"), f"{name}: expected to be refused"
    else:
        shown = turned(picture.shown, orientation)
        assert pixels.shape == shown.shape, f"{name}: {pixels.shape}, expected {shown.shape}"
        off = np.abs(pixels - shown).max()
        assert off <= picture.slack, f"{name}: off by {off}"
    with Image.open(path) as opened:
        _same(pixels, read_image(opened), f"{name}: as a PIL image")
    _same(pixels, read_image(read), f"{name}: read twice")
    _same(pixels, read_image(pixels), f"{name}: as an array")
    for other, found in _elsewhere(path).items():
        _same(pixels, found, f"{name}: {other}")
    if picture.plain:
        _same(pixels, load_image(str(path)), f"{name}: transformers")


def _same(expected: Pixels, found: Any, what: str) -> None:
    pixels = np.asarray(found)
    assert pixels.shape == expected.shape and (pixels == expected).all(), f"{what} differs"


def _elsewhere(path: Path) -> dict[str, Image.Image]:
    """Return what other parts of the project see of a file."""
    from collavo.panoptic import CachedSegmenter, PanopticMap
    from collavo.train import ConversationDataset

    seen: dict[str, Image.Image] = {}

    def segmenter(image: Image.Image) -> PanopticMap:
        seen["segmenter"] = image
        return PanopticMap.empty(2, 2)

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    data = ConversationDataset([{"image": path.name, "conversation": turns}], images=path.parent)
    PanopticMap.from_segmenter(segmenter, Image.open(path))
    found = {"data set": data[0]["image"][0], "segmenter": seen["segmenter"]}
    with tempfile.TemporaryDirectory() as folder:
        CachedSegmenter(segmenter, folder, settings="none")(Image.open(path))
    return {**found, "cache": seen["segmenter"]}


def main() -> int:
    """Run cases until the time is up; a failing one is printed with its seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    stop, seed = time.monotonic() + args.seconds, args.seed
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < stop:
            try:
                counts[run_case(seed, Path(folder))] += 1
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                if not failures[text.partition(",")[0]]:
                    print(f"seed {seed}: {text}")
                failures[text.partition(",")[0]] += 1
            seed += 1
    print(f"{seed - args.seed} pictures, {failures.total()} wrong; right: {dict(counts)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
