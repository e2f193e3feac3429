"""Random calls of ``panoptic_lookup``, compared with its reference bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_support import ISAS, LAYOUTS, lay_out, machine, note
from hypothesis import strategies as st

_EDGES = (0, -1, 1, 63, 64, 65, 128, 2**31 - 1, -(2**31))


@dataclass(frozen=True)
class LookupCase:
    """A batch of maps; the ids in a map need not be listed.

    Attributes:
        seed: Of the maps.
        isa: Instruction set.
        threads: Of the loops.
        sizes: Height and width of each map.
        layouts: One of LAYOUTS for each map.
        coloured: Whether each map is in colours; of its ids the lowest 24 bits remain.
        ids: Listed ids of each image.
        strange: Ids beside the listed ones.
        run: Pixels that follow each other with one id.
        grid: Cells.
        majority: Else nearest.
    """

    seed: int
    isa: str
    threads: int
    sizes: list[list[int]]
    layouts: list[str]
    coloured: list[bool]
    ids: list[list[int]]
    strange: list[int]
    run: int
    grid: list[int]
    majority: bool


@st.composite
def lookup_cases(draw: Callable[[Any], Any]) -> LookupCase:
    """Draw maps around the edges of vectors, cells and bands."""
    images = draw(st.integers(1, 3))
    side = st.integers(1, 70) | st.sampled_from((1, 8, 16, 17, 400))
    ids = st.lists(st.integers(1, 2**31 - 1) | st.integers(1, 200), unique=True, max_size=9)
    return LookupCase(
        seed=draw(st.integers(0, 2**16)),
        isa=draw(st.sampled_from(ISAS[::-1])),
        threads=draw(st.sampled_from((1, 1, 2))),
        sizes=[[draw(side), draw(side)] for _ in range(images)],
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in range(images)],
        coloured=[draw(st.booleans()) for _ in range(images)],
        ids=[draw(ids) for _ in range(images)],
        strange=draw(st.lists(st.sampled_from(_EDGES), min_size=1, max_size=4)),
        run=draw(st.sampled_from((1, 1, 5, 16, 33))),
        grid=[draw(st.integers(1, 40)) for _ in range(2)],
        majority=draw(st.booleans()),
    )


def run_lookup(case: LookupCase) -> None:
    """Run a case on the native code and on the reference."""
    note(case)
    generator = torch.Generator().manual_seed(case.seed)
    maps = []
    kinds = zip(case.sizes, case.layouts, case.coloured, case.ids, strict=True)
    for (height, width), layout, coloured, ids in kinds:
        values = torch.tensor([*ids, *case.strange], dtype=torch.int32)
        short = -(-height * width // case.run)
        pick = torch.randint(0, len(values), (short,), generator=generator)
        pixels = values[pick].repeat_interleave(case.run)[: height * width]
        pixels = pixels.view(height, width)
        if coloured:
            pixels = torch.stack([pixels & 255, pixels >> 8 & 255, pixels >> 16 & 255], -1)
        dtype = torch.uint8 if coloured else torch.int32
        maps.append(lay_out(pixels.to(dtype), layout)[None])
    flat = torch.tensor([each for ids in case.ids for each in ids], dtype=torch.int32)
    classes = torch.randint(-1, 7, flat.shape, generator=generator, dtype=torch.int32)
    counts = [len(ids) for ids in case.ids]
    options = (*case.grid, 7, 3, "majority" if case.majority else "nearest")
    op = torch.ops.collavo.panoptic_lookup
    with machine(case.isa, case.threads):
        found = op(maps, flat, classes, counts, *options, backend="cpu")
    expected = op(maps, flat, classes, counts, *options, backend="reference")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
