"""What the processes of the cache's tests do; they import this and not the tests."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from collavo.panoptic import CachedSegmenter, PanopticMap


def picture(seed: int) -> Image.Image:
    """Return one of the few images that all processes share."""
    return Image.frombytes("RGB", (6, 5), random.Random(seed).randbytes(90))


def by_brightness(image: Image.Image) -> PanopticMap:
    """Segment an image in a way that depends on each of its pixels."""
    time.sleep(0.002)  # a segmenter takes its time, so that processes meet
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
    ids = grey.reshape(image.height, image.width).int() + 1
    listed = sorted(set(ids.flatten().tolist()))
    return PanopticMap.from_segments(ids, listed, [one % 133 for one in listed])


def same(one: PanopticMap, other: PanopticMap) -> bool:
    """Say whether two maps are equal, types included."""
    names = ("segmentation", "segment_ids", "segment_classes")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def hammer(folder: str, seed: int, barrier: Any, results: Any, vandal: bool) -> None:
    """Ask for the same few images over and over; a vandal also cuts files while others read."""
    warnings.simplefilter("ignore")
    cached = CachedSegmenter(by_brightness, folder, settings="brightness")
    choice = random.Random(seed)
    wrong = 0
    barrier.wait(timeout=120)
    for _ in range(120):
        image = picture(choice.randrange(4))
        wrong += not same(cached(image), by_brightness(image))
        files = sorted(Path(folder).glob("*/*.npz")) if vandal else []
        if files:
            victim = choice.choice(files)
            os.truncate(victim, choice.randrange(max(1, victim.stat().st_size)))
    results.put((wrong, cached.hits, cached.misses))


def die_while_writing(folder: str) -> None:
    """Be killed after the file is written and before it has its name."""

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace: Callable[..., None] = killed
    os.replace = replace  # type: ignore[assignment]
    CachedSegmenter(by_brightness, folder, settings="brightness")(picture(0))
