"""Colours for segments that stay apart for colour-blind readers too.

A class has a hue, taken from the palettes of Okabe and Ito and of Paul Tol; instances of a class
differ in lightness. Colour is never the only sign: every picture also carries numbers.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]

UNKNOWN: Colour = (200, 200, 200)

# Neighbours in the list differ in lightness as well as in hue.
_HUES: tuple[Colour, ...] = (
    (230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0),
    (86, 180, 233), (51, 34, 136), (68, 170, 153), (136, 34, 85), (153, 153, 51), (204, 102, 119),
    (17, 119, 51), (136, 204, 238),
)  # fmt: skip
# Mixed with white (> 0) or black (< 0), by instance; later rounds turn the hue a little.
_SHADES = (0.0, 0.5, -0.3, 0.25, -0.5, 0.7)
_TURNS = (0.0, -0.035, 0.035)


def row_colours(classes: Sequence[int], numbers: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return one colour per row of a crayon map.

    Args:
        classes: 0 = unknown, class c is c + 1, in the order of the rows.
        numbers: Instance numbers.

    Returns:
        uint8 ``[T, 3]``, red, green and blue. Classes get their hue in the order in which they
        appear, so the first classes of a picture always differ.
    """
    order = {label: i for i, label in enumerate(dict.fromkeys(c for c in classes if c > 0))}
    colours = [
        UNKNOWN if label <= 0 else _shade(_HUES[order[label] % len(_HUES)], number)
        for label, number in zip(classes, numbers, strict=True)
    ]
    return np.asarray(colours, dtype=np.uint8).reshape(-1, 3)


def ink_on(colour: Sequence[int]) -> Colour:
    """Return black or white, whichever reads better on a colour.

    Args:
        colour: Red, green and blue, 0..255.

    Example:
        >>> ink_on((240, 228, 66)), ink_on((51, 34, 136))
        ((0, 0, 0), (255, 255, 255))
    """
    red, green, blue = (int(value) for value in colour)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return (0, 0, 0) if bright else (255, 255, 255)


def _shade(hue: Colour, number: int) -> Colour:
    rounds, place = divmod(max(number, 1) - 1, len(_SHADES))
    angle, light, strength = colorsys.rgb_to_hls(*(value / 255 for value in hue))
    turned = colorsys.hls_to_rgb((angle + _TURNS[rounds % len(_TURNS)]) % 1, light, strength)
    amount = _SHADES[place]
    target = 1.0 if amount > 0 else 0.0
    mixed = [round(255 * (value + (target - value) * abs(amount))) for value in turned]
    return mixed[0], mixed[1], mixed[2]
