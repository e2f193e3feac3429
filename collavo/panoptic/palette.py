"""Colours for segments that stay apart for colour-blind readers too.

There are eight families, one per class, of five shades each, one per instance. What is guaranteed,
as CIE Lab distances (Delta E 1976; about 2 is just noticeable), to readers with normal vision and
to those without one kind of cones (protanopia, deuteranopia, tritanopia after Machado et al., 2009):

- the first shades of the eight families, so the first eight classes of a picture, are at least 23
  apart from one another and 14 from the grey of what is unknown;
- the five shades of a family, so the first five instances of a class, are at least 16 apart;
- any two of the forty colours are at least 9 apart;
- where a family has a shade free, rows that touch in the picture do not get the same one.

A picture with more than forty segments repeats colours. Colour is never the only sign: every
picture also draws borders between segments and writes their labels or row numbers.
"""

from __future__ import annotations

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
        appear; the rows of a family get its shades in turn, rows that touch different ones.

    Example:
        >>> row_colours([0, 18, 18], [0, 1, 2]).tolist()
        [[226, 226, 226], [239, 124, 20], [253, 213, 175]]
    """
    beside: dict[int, set[int]] = {}
    for one, other in touching:
        beside.setdefault(one, set()).add(other)
        beside.setdefault(other, set()).add(one)
    families: dict[int, int] = {}
    uses: Counter[Colour] = Counter()
    colours: list[Colour] = []
    for row, (label, number) in enumerate(zip(classes, numbers, strict=True)):
        if label <= 0 and number <= 0:
            colours.append(UNKNOWN)
            continue
        shades = FAMILIES[families.setdefault(label, len(families)) % len(FAMILIES)]
        near = {colours[other] for other in beside.get(row, ()) if other < row}
        colour = min(shades, key=lambda shade: (shade in near, uses[shade]))
        uses[colour] += 1
        colours.append(colour)
    return np.asarray(colours, dtype=np.uint8).reshape(-1, 3)


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
