"""The palette's promises, for normal vision and for three kinds of colour blindness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collavo.pictures.palette import FAMILIES, UNKNOWN, ink_on, row_colours

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
# sRGB to CIE XYZ, D65.
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colours):
    values = np.asarray(colours, dtype=np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colours, vision):
    """CIE Lab of colours as somebody sees them."""
    seen = np.clip(linear(colours) @ VISIONS[vision].T, 0, 1)
    xyz = (seen @ TO_XYZ.T) / TO_XYZ.sum(axis=1)
    bent = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = bent.T
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=1)


def smallest_distance(colours, vision):
    points = lab(colours, vision)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return distances[~np.eye(len(points), dtype=bool)].min()


def test_the_simulation_confuses_what_dichromats_confuse():
    """Red and olive of like lightness fall together without green cones, and white stays white."""
    pair = [(200, 60, 60), (131, 117, 56)]
    assert smallest_distance(pair, "normal") > 40
    assert smallest_distance(pair, "deuteranopia") < 0.5 * smallest_distance(pair, "normal")
    for vision in VISIONS:
        assert np.allclose(lab([(255, 255, 255)], vision), [[100, 0, 0]], atol=0.1)
    # Lab of pure sRGB red, as any colour table has it.
    assert np.allclose(lab([(255, 0, 0)], "normal"), [[53.24, 80.09, 67.20]], atol=0.05)


@pytest.mark.parametrize("vision", VISIONS)
def test_the_first_classes_of_a_picture_stay_apart(vision):
    colours = row_colours(range(1, 9), [1] * 8)
    assert smallest_distance(colours, vision) >= 23
    assert smallest_distance([*colours, UNKNOWN], vision) >= 14


@pytest.mark.parametrize("vision", VISIONS)
def test_instances_of_a_class_stay_apart(vision):
    """The first five of each of eight classes, however many there are and whatever touches."""
    for before in range(8):
        classes = [*range(1, before + 1), *[100] * 12]
        touching = [(before + 5, before + 6), (before + 6, before + 1), (before, before + 7)]
        colours = row_colours(classes, [*[1] * before, *range(1, 13)], touching)
        colours = colours[before : before + 5]
        assert smallest_distance(colours, vision) >= 16


@pytest.mark.parametrize("vision", VISIONS)
def test_all_forty_colours_stay_apart(vision):
    colours = [colour for family in FAMILIES for colour in family]
    assert len(colours) == 40
    assert smallest_distance(colours, vision) >= 9


def test_ink_is_read_on_every_colour():
    """At least 4.5:1, what accessibility guidelines ask of small text."""
    for colour in [UNKNOWN, *(colour for family in FAMILIES for colour in family)]:
        low, high = sorted(
            float(linear(one) @ TO_XYZ[1]) + 0.05 for one in (colour, ink_on(colour))
        )
        assert high / low >= 4.5, colour


def test_rows_without_class():
    """The unknown row is grey; a segment of unknown class is something and has a colour."""
    colours = row_colours([0, 0, 7], [0, 1, 1]).tolist()
    assert colours[0] == list(UNKNOWN) and len({tuple(c) for c in colours}) == 3
    assert row_colours([], []).shape == (0, 3)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_neighbours_differ_while_there_are_shades(data):
    """A row with up to four neighbours always has a shade left, in whatever order they come."""
    count = data.draw(st.integers(1, 30))
    classes = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    degree = [0] * count
    touching = set()
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    for one, other in data.draw(st.lists(pairs, max_size=90)):
        if one < other and degree[one] < 4 and degree[other] < 4 and (one, other) not in touching:
            touching.add((one, other))
            degree[one] += 1
            degree[other] += 1
    colours = row_colours(classes, [1] * count, touching).tolist()
    assert all(colours[one] != colours[other] for one, other in touching)


def test_a_map_of_one_class_is_coloured_like_a_land_map():
    """24 countries on a 6 x 4 board, corners included: no two neighbours alike."""
    touching = {
        (a, b)
        for a in range(24)
        for b in range(a + 1, 24)
        if abs(a // 6 - b // 6) <= 1 and abs(a % 6 - b % 6) <= 1
    }
    colours = row_colours([1] * 24, range(1, 25), touching).tolist()
    assert all(colours[a] != colours[b] for a, b in touching)
