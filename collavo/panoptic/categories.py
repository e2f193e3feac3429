"""The 133 classes of COCO panoptic: 80 things, then 53 kinds of stuff.

A class has three faces: COCO's category id (1..200, with gaps), the class index 0..132 that the
kernels use (things first, in COCO's order), and the name that stands in the text, which is COCO's
name without ``-merged``, ``-other`` and ``-stuff``. All display names are distinct.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

_THINGS = """
1:person 2:bicycle 3:car 4:motorcycle 5:airplane 6:bus 7:train 8:truck 9:boat 10:traffic_light
11:fire_hydrant 13:stop_sign 14:parking_meter 15:bench 16:bird 17:cat 18:dog 19:horse 20:sheep
21:cow 22:elephant 23:bear 24:zebra 25:giraffe 27:backpack 28:umbrella 31:handbag 32:tie
33:suitcase 34:frisbee 35:skis 36:snowboard 37:sports_ball 38:kite 39:baseball_bat
40:baseball_glove 41:skateboard 42:surfboard 43:tennis_racket 44:bottle 46:wine_glass 47:cup
48:fork 49:knife 50:spoon 51:bowl 52:banana 53:apple 54:sandwich 55:orange 56:broccoli 57:carrot
58:hot_dog 59:pizza 60:donut 61:cake 62:chair 63:couch 64:potted_plant 65:bed 67:dining_table
70:toilet 72:tv 73:laptop 74:mouse 75:remote 76:keyboard 77:cell_phone 78:microwave 79:oven
80:toaster 81:sink 82:refrigerator 84:book 85:clock 86:vase 87:scissors 88:teddy_bear
89:hair_drier 90:toothbrush
"""
_STUFF = """
92:banner 93:blanket 95:bridge 100:cardboard 107:counter 109:curtain 112:door-stuff 118:floor-wood
119:flower 122:fruit 125:gravel 128:house 130:light 133:mirror-stuff 138:net 141:pillow
144:platform 145:playingfield 147:railroad 148:river 149:road 151:roof 154:sand 155:sea 156:shelf
159:snow 161:stairs 166:tent 168:towel 171:wall-brick 175:wall-stone 176:wall-tile 177:wall-wood
178:water-other 180:window-blind 181:window-other 184:tree-merged 185:fence-merged
186:ceiling-merged 187:sky-other-merged 188:cabinet-merged 189:table-merged
190:floor-other-merged 191:pavement-merged 192:mountain-merged 193:grass-merged 194:dirt-merged
195:paper-merged 196:food-other-merged 197:building-other-merged 198:rock-merged
199:wall-other-merged 200:rug-merged
"""
_SUFFIXES = ("-merged", "-other", "-stuff")


def _parse(table: str) -> list[tuple[int, str]]:
    pairs = (entry.split(":") for entry in table.split())
    return [(int(number), name.replace("_", " ")) for number, name in pairs]


_CLASSES = (*_parse(_THINGS), *_parse(_STUFF))

CATEGORY_IDS: tuple[int, ...] = tuple(number for number, _ in _CLASSES)
"""COCO's category id of every class index."""
CLASS_NAMES: tuple[str, ...] = tuple(name for _, name in _CLASSES)
"""COCO's full name of every class index, suffixes included."""
NUM_CLASSES = len(CLASS_NAMES)
NUM_THINGS = len(_parse(_THINGS))

CATEGORY_TO_INDEX: Mapping[int, int] = MappingProxyType(
    {category: index for index, category in enumerate(CATEGORY_IDS)}
)
"""Class index of every COCO category id."""


def _strip(name: str) -> str:
    while name.endswith(_SUFFIXES):
        name = name[: name.rindex("-")]
    return name


DISPLAY_NAMES: tuple[str, ...] = tuple(_strip(name) for name in CLASS_NAMES)
"""The name of every class index as it stands in prompts and answers."""

_INDEX_BY_NAME = {
    **{name: index for index, name in enumerate(DISPLAY_NAMES)},
    **{name: index for index, name in enumerate(CLASS_NAMES)},
}


def display_name(index: int) -> str:
    """Return the name of a class as it stands in prompts: no ``-merged``, ``-other``, ``-stuff``.

    Args:
        index: Class index, 0..132.

    Raises:
        ValueError: if the index is out of range.

    Source: released code (the printed names); the paper's appendix A lists the classes.

    Example:
        >>> display_name(0), display_name(119), display_name(87)
        ('person', 'sky', 'floor-wood')
    """
    _check_index(index)
    return DISPLAY_NAMES[index]


def is_thing(index: int) -> bool:
    """Say whether a class is a countable thing (index 0..79) rather than stuff.

    Args:
        index: Class index, 0..132.

    Raises:
        ValueError: if the index is out of range.

    Example:
        >>> is_thing(17), is_thing(119)
        (True, False)
    """
    _check_index(index)
    return index < NUM_THINGS


def class_index(name: str) -> int:
    """Return the class index of a COCO name or of a display name.

    Args:
        name: Such as ``"sky-other-merged"`` or ``"sky"``.

    Raises:
        ValueError: if no class has that name.

    Example:
        >>> class_index("sky-other-merged"), class_index("sky"), class_index("horse")
        (119, 119, 17)
    """
    try:
        return _INDEX_BY_NAME[name]
    except KeyError:
        raise ValueError(f"name: expected a COCO panoptic class, got {name!r}") from None


def index_from_category_id(category_id: int) -> int:
    """Return the class index 0..132 of a COCO category id.

    Args:
        category_id: COCO's number, 1..200 with gaps.

    Raises:
        ValueError: if COCO panoptic has no such category.

    Example:
        >>> index_from_category_id(1), index_from_category_id(187)
        (0, 119)
    """
    try:
        return CATEGORY_TO_INDEX[category_id]
    except KeyError:
        raise ValueError(
            f"category_id: expected a COCO panoptic category, got {category_id!r}"
        ) from None


def category_id_from_index(index: int) -> int:
    """Return COCO's category id of a class index.

    Args:
        index: Class index, 0..132.

    Raises:
        ValueError: if the index is out of range.

    Example:
        >>> category_id_from_index(119)
        187
    """
    _check_index(index)
    return CATEGORY_IDS[index]


def coco_categories(indices: Iterable[int] | None = None) -> list[dict[str, int | str]]:
    """Return the ``categories`` list of a COCO panoptic JSON.

    Args:
        indices: The class indices to list; None lists all 133.

    Raises:
        ValueError: if an index is out of range.

    Example:
        >>> coco_categories([119])
        [{'id': 187, 'name': 'sky-other-merged', 'isthing': 0}]
    """
    chosen = range(NUM_CLASSES) if indices is None else indices
    return [
        {"id": category_id_from_index(i), "name": CLASS_NAMES[i], "isthing": int(is_thing(i))}
        for i in chosen
    ]


def _check_index(index: int) -> None:
    if not 0 <= index < NUM_CLASSES:
        raise ValueError(f"index: expected a class index 0..{NUM_CLASSES - 1}, got {index}")
