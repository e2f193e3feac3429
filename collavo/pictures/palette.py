"""Colours for segments that stay apart for colour-blind readers too.

There are eight families, one per class, of five shades each, one per instance. Distances are those
of CIE Lab (Delta E 1976; about 2 is just noticeable). They hold for normal vision and for complete
protanopia, deuteranopia and tritanopia, as Machado et al. (2009) simulate them:

- the first shades of the eight families are at least 23 apart, and 14 from the grey of the unknown
  row; a picture of one segment each of up to eight classes uses these;
- the five shades of a family are at least 16 apart: the first five instances of a class, where
  there are at most eight classes;
- any two of the forty colours are at least 9 apart.

More classes and instances repeat colours. Rows that touch in the picture have different ones, save
where the neighbours of one have all the shades of its family. Colour is never the only sign: every
picture also has lines between segments, and labels or row numbers on them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]

UNKNOWN: Colour = (226, 226, 226)

# Found by a search over hue, chroma and lightness for the largest smallest distance under all four
# kinds of vision; every next shade is the one farthest from those before it.
FAMILIES: tuple[tuple[Colour, ...], ...] = (
    ((239, 124, 20), (253, 213, 175), (119, 73, 2), (230, 152, 83), (174, 109, 68)),
    ((3, 109, 245), (195, 220, 254), (6, 47, 100), (102, 102, 170), (127, 174, 254)),
    ((1, 155, 82), (161, 255, 197), (31, 104, 68), (84, 200, 164), (124, 198, 126)),
    ((201, 106, 176), (95, 8, 69), (125, 84, 104), (153, 32, 134), (220, 158, 192)),
    ((254, 209, 2), (73, 67, 37), (178, 194, 107), (181, 168, 45), (243, 237, 108)),
    ((50, 208, 254), (3, 75, 97), (76, 122, 139), (47, 159, 195), (153, 200, 218)),
    ((200, 4, 27), (253, 176, 141), (167, 119, 112), (181, 37, 61), (118, 0, 8)),
    ((57, 4, 144), (199, 163, 228), (112, 67, 206), (160, 136, 254), (113, 54, 157)),
)


def row_colours(
    classes: Sequence[int],
    numbers: Sequence[int],
    touching: Collection[tuple[int, int]] = (),
) -> npt.NDArray[np.uint8]:
    """Return one colour per row of a crayon map.

    Args:
        classes: 0 = unknown, class c is c + 1, in the order of the rows.
        numbers: Instance numbers; a segment of unknown class has one, the unknown row has 0.
        touching: Pairs of rows that lie side by side in the picture.

    Returns:
        uint8 ``[T, 3]``, red, green and blue. Classes get their family in the order in which they
        appear; the rows of a family share its shades evenly, rows that touch take different ones.

    Example:
        >>> row_colours([0, 18, 18], [0, 1, 2]).tolist()
        [[226, 226, 226], [239, 124, 20], [253, 213, 175]]
    """
    beside: list[set[int]] = [set() for _ in classes]
    for one, other in touching:
        beside[one].add(other)
        beside[other].add(one)
    families: dict[int, list[int]] = {}
    order: dict[int, int] = {}
    colours = [UNKNOWN] * len(classes)
    for row, (label, number) in enumerate(zip(classes, numbers, strict=True)):
        if label > 0 or number > 0:
            family = order.setdefault(label, len(order)) % len(FAMILIES)
            families.setdefault(family, []).append(row)
    for family, rows in families.items():
        for row, shade in _share(rows, beside, len(FAMILIES[family])).items():
            colours[row] = FAMILIES[family][shade]
    return np.asarray(colours, dtype=np.uint8).reshape(-1, 3)


def _share(rows: Sequence[int], beside: Sequence[set[int]], count: int) -> dict[int, int]:
    """Give every row of a family one of its shades, evenly, those that touch different ones.

    The first rows get the shades in their order. Then the row whose neighbours already have most of
    the shades is always next (Brelaz' DSATUR).
    """
    given: dict[int, int] = {}
    uses: Counter[int] = Counter()
    # Negative, so that the first rows come before all that a count of shades can bring forward.
    queue = [(place - 2 * count if place < count else 0, row) for place, row in enumerate(rows)]
    heapq.heapify(queue)
    members = set(rows)
    while queue:
        _, row = heapq.heappop(queue)
        if row in given:
            continue
        near = Counter(given[other] for other in beside[row] if other in given)
        given[row] = min(range(count), key=lambda shade: (near[shade], uses[shade], shade))
        uses[given[row]] += 1
        for other in beside[row] & members - given.keys():
            taken = {given[third] for third in beside[other] if third in given}
            heapq.heappush(queue, (-len(taken), other))
    return given


def ink_on(colour: Sequence[int]) -> Colour:
    """Return black or white, whichever has the higher contrast with a colour (at least 4.5:1).

    Args:
        colour: Red, green and blue, 0..255.

    Source: the contrast ratio of the Web Content Accessibility Guidelines 2.

    Example:
        >>> ink_on((254, 209, 2)), ink_on((57, 4, 144))
        ((0, 0, 0), (255, 255, 255))
    """
    light = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(value) / 255 for value in colour)
    ]
    luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]
    # Both contrasts, (1 + 0.05) / (l + 0.05) and (l + 0.05) / 0.05, are equal at 0.179.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
