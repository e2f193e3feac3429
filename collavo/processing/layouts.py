"""Where the image tokens of transformers' families of LLaVA-like models look.

A function for each way from a picture to image tokens. Each follows what its family's image
processor does with a picture of a size, and the order in which its model lines up the features.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from collavo.processing.blocks import Axis, Block, Layout
from collavo.processing.geometry import square
from collavo.processing.region import frame

LayoutOf = Callable[[Any, int, int, int], Layout]


class Family(NamedTuple):
    """What has to be known of a processor of transformers.

    Attributes:
        layout: Gives the image tokens of a picture: called with the processor, the picture's
            height and width, and how many pictures its prompt has where they are one list.
        place: The token that image features are put in the place of; empty: ``image_token``.
        behind_image: What a prompt has behind an image's placeholder that belongs to it.
        images: How the processor takes images: ``"given"``, as its caller gave them (lists may mean
            something), ``"nested"``, in a list for each prompt, or ``"flat"``, in one.
    """

    layout: LayoutOf
    place: str = ""
    behind_image: str = ""
    images: str = "given"


def squashed(processor: Any, height: int, width: int, together: int) -> Layout:
    """LLaVA-1.5, VipLLaVA, Video-LLaVA: one view, squashed or cropped; a class token may lead it.

    Args:
        processor: With ``patch_size``.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    placed = frame(processor.image_processor, height, width)
    patch = _positive(processor, "patch_size")
    rows = Axis.even(placed.height // patch, patch, placed.top, placed.tall)
    columns = Axis.even(placed.width // patch, patch, placed.left, placed.wide)
    return (Block(rows, columns, before=_class_tokens(processor)),)


def any_resolution(processor: Any, height: int, width: int, together: int) -> Layout:
    """LLaVA-NeXT (and Video): a squashed base, then tiles of a padded picture as one grid.

    The tiles' tokens stand in rows across all tiles, those of whole rows or columns of padding left
    out, with a newline behind each row.

    Args:
        processor: With ``patch_size``.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    patch = _positive(processor, "patch_size")
    side = _tile_side(processor.image_processor)
    lead = _class_tokens(processor)
    base = _base(side, side // patch, patch, lead)
    return (base, _tiles_in_rows(processor, side, side // patch, patch, (height, width)))


def any_resolution_shrunk(processor: Any, height: int, width: int, together: int) -> Layout:
    """LLaVA-OneVision: as LLaVA-NeXT, a grid of too many tokens scaled down; lists are squares.

    Pictures of a prompt with several are not cut into tiles but padded to a square, with one
    newline behind all tokens.

    Args:
        processor: With ``num_image_tokens`` and ``vision_aspect_ratio``.
        height: Of the picture.
        width: Of the picture.
        together: How many pictures the prompt has, where they are one list.
    """
    if processor.vision_feature_select_strategy == "default":
        raise ValueError(
            f"{_name(processor)}: expected vision_feature_select_strategy='full', got 'default'"
        )
    cells = _side_of(processor, "num_image_tokens")
    side = _tile_side(processor.image_processor)
    patch = side // cells
    if together != 1:
        top, left, whole = square(height, width)
        scale = side / whole
        rows = Axis.even(cells, patch, top * side / whole, height * scale)
        columns = Axis.even(cells, patch, left * side / whole, width * scale)
        return (Block(rows, columns, after=1),)
    base = _base(side, cells, patch, 0)
    tiles = _tiles_in_rows(processor, side, cells, patch, (height, width))
    most = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(len(tiles.rows.cells) * len(tiles.columns.cells) / (most * cells**2))
    if ratio > 1.1:
        rows, columns = (
            _merged(axis, int(len(axis.cells) // ratio)) for axis in (tiles.rows, tiles.columns)
        )
        tiles = Block(rows, columns, newline=1)
    return (base, tiles)


def resized(processor: Any, height: int, width: int, together: int) -> Layout:
    """Pixtral, Mistral3: a picture of any shape in patches, ``spatial_merge_size`` to a token.

    Args:
        processor: With ``patch_size`` and ``spatial_merge_size``.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    patch = _positive(processor, "patch_size") * _positive(processor, "spatial_merge_size")
    images = processor.image_processor
    if not images.do_resize or getattr(images, "do_center_crop", False):
        raise ValueError("image_processor: expected do_resize=True and do_center_crop=False")
    longest = dict(images.size).get("longest_edge")
    most = (longest, longest) if longest else _height_and_width(images)
    ratio = max(height / most[0], width / most[1], 1)
    tall, wide = (math.floor(length / ratio) for length in (height, width))
    rows, columns = (tall - 1) // patch + 1, (wide - 1) // patch + 1
    return (Block(Axis.even(rows, 1, 0, rows), Axis.even(columns, 1, 0, columns)),)


def tiled(processor: Any, height: int, width: int, together: int) -> Layout:
    """InternVL, GOT-OCR2: tiles of a squashed picture, then the whole; patches are merged.

    Args:
        processor: With ``image_seq_length`` or ``num_image_tokens`` tokens to a tile.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    counted = "image_seq_length" if hasattr(processor, "image_seq_length") else "num_image_tokens"
    cells = _side_of(processor, counted)
    side = _height_and_width(processor.image_processor)
    columns = rows = 1
    most = _image_setting(processor, "max_patches")
    if _image_setting(processor, "crop_to_patches") and most > 1:
        columns, rows = _own_function(processor, "get_optimal_tiled_canvas")(
            (height, width),
            side,
            _image_setting(processor, "min_patches"),
            most,
        )
    whole = _tiles(side, cells)
    return whole if rows * columns == 1 else (*_tiles(side, cells, rows, columns), *whole)


def tiled_behind(processor: Any, height: int, width: int, together: int) -> Layout:
    """Ovis2: the whole squashed picture, then its tiles.

    Args:
        processor: With ``image_seq_length`` tokens to a tile.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    cells = _side_of(processor, "image_seq_length")
    side = _height_and_width(processor.image_processor)
    whole = _tiles(side, cells)
    most = _image_setting(processor, "max_patches")
    if not (_image_setting(processor, "crop_to_patches") and most > 1):
        return whole
    if _image_setting(processor, "use_covering_area_grid"):
        function = _own_function(processor, "get_min_tile_covering_grid")
        columns, rows = function(
            (height, width),
            target_patch_size=side[0],
            max_image_tiles=most,
            covering_threshold=0.9,
        )
    else:
        columns, rows = _own_function(processor, "get_optimal_tiled_canvas")(
            (height, width),
            side,
            _image_setting(processor, "min_patches"),
            most,
        )
    return whole if rows * columns == 1 else (*whole, *_tiles(side, cells, rows, columns))


def split(processor: Any, height: int, width: int, together: int) -> Layout:
    """Idefics3, SmolVLM: tiles of a picture scaled to whole ones, then all of it; merged patches.

    Args:
        processor: With ``image_seq_len`` tokens to a tile.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    cells = _side_of(processor, "image_seq_len")
    images = processor.image_processor
    tile = dict(images.max_image_size)["longest_edge"]
    whole = _tiles((tile, tile), cells)
    if not images.do_image_splitting:
        return whole
    if images.do_resize:
        size = dict(images.size)
        if size.get("longest_edge"):
            height, width = _longest_side(height, width, size["longest_edge"])
        else:
            height, width = _height_and_width(images)
    tall, wide = _whole_tiles(height, width, tile)
    if tall <= tile and wide <= tile:
        return whole
    return (*_tiles((tile, tile), cells, tall // tile, wide // tile), *whole)


def padded(processor: Any, height: int, width: int, together: int) -> Layout:
    """Janus: the longer side scaled, then padded to a square.

    Args:
        processor: With ``num_image_tokens`` tokens.
        height: Of the picture.
        width: Of the picture.
        together: Not looked at.
    """
    cells = _side_of(processor, "num_image_tokens")
    images = processor.image_processor
    if not (images.do_resize and images.do_pad):
        raise ValueError("image_processor: expected do_resize=True and do_pad=True")
    side, _ = _height_and_width(images)
    scale = side / max(height, width)
    tall, wide = (max(round(length * scale), images.min_size) for length in (height, width))
    top, left, whole = square(tall, wide)
    patch = whole // cells
    return (Block(Axis.even(cells, patch, top, tall), Axis.even(cells, patch, left, wide)),)


def _base(side: int, cells: int, patch: int, lead: int) -> Block:
    """Return a squashed picture, which a grid of patches covers from its upper left corner on."""
    axis = Axis.even(cells, patch, 0, side)
    return Block(axis, axis, before=lead)


def _tiles_in_rows(
    processor: Any, side: int, cells: int, patch: int, size: tuple[int, int]
) -> Block:
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    if best[0] % side or best[1] % side:
        raise ValueError(
            f"image_grid_pinpoints: expected multiples of the tiles' side {side}, got {list(best)}"
        )
    tall, wide = best
    if wide / width < tall / height:
        tall = min(math.ceil(height * (wide / width)), tall)
    else:
        wide = min(math.ceil(width * (tall / height)), wide)
    rows, columns = (
        tuple(
            (tile * side + i * patch, tile * side + (i + 1) * patch)
            for tile in range(length // side)
            for i in range(cells)
        )
        for length in best
    )
    # As the model takes its padding off: from the numbers of tokens, not of pixels.
    if width / height > len(columns) / len(rows):
        cut = (len(rows) - int(round(height * (len(columns) / width), 7))) // 2
        rows = rows[cut : len(rows) - cut]
    else:
        cut = (len(columns) - int(round(width * (len(rows) / height), 7))) // 2
        columns = columns[cut : len(columns) - cut]
    return Block(
        Axis(rows, (best[0] - tall) // 2, tall),
        Axis(columns, (best[1] - wide) // 2, wide),
        newline=1,
    )


def _merged(axis: Axis, count: int) -> Axis:
    """Return an axis of fewer cells, each as long as the old ones that are scaled into it."""
    old = len(axis.cells)

    def place(tokens: float, end: bool) -> float:
        cell = min(max(math.ceil(tokens) - 1 if end else math.floor(tokens), 0), old - 1)
        first, last = axis.cells[cell]
        return first + (tokens - cell) * (last - first)

    step = old / count
    cells = tuple((place(i * step, False), place((i + 1) * step, True)) for i in range(count))
    return Axis(cells, axis.start, axis.length)


def _tiles(side: tuple[int, int], cells: int, rows: int = 1, columns: int = 1) -> Layout:
    """Return the tiles of a squashed picture one by one, each with a grid of its own.

    Args:
        side: Height and width of a tile in pixels.
        cells: Tokens along either side of a tile.
        rows: Of tiles.
        columns: Of tiles.
    """

    def axis(length: int, tile: int, tiles: int) -> Axis:
        cell = length // cells
        first = tile * length
        borders = [first + i * cell for i in range(cells + 1)]
        return Axis(tuple(pairwise(borders)), 0, tiles * length)

    return tuple(
        Block(axis(side[0], row, rows), axis(side[1], column, columns))
        for row in range(rows)
        for column in range(columns)
    )


def _longest_side(height: int, width: int, most: int) -> tuple[int, int]:
    """Return a picture's size with its longer side scaled, the other rounded up to an even one."""
    ratio = width / height
    if width >= height:
        width, height = most, int(most / ratio)
        height += height % 2
    else:
        height, width = most, int(most * ratio)
        width += width % 2
    # No side is above what its image processors call the absolute limit.
    limit = 4096
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > limit:
        height, width = int(limit / ratio), limit
    elif height > width and height > limit:
        height, width = limit, int(limit * ratio)
    return max(height, 1), max(width, 1)


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width


def _name(processor: Any) -> str:
    return type(processor).__name__


def _positive(processor: Any, setting: str) -> int:
    value = getattr(processor, setting, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{_name(processor)}: expected {setting} to be positive, got {value!r}")
    return int(value)


def _side_of(processor: Any, setting: str) -> int:
    """Return the side of the square grid that a number of tokens is."""
    count = _positive(processor, setting)
    side: int = math.isqrt(count)
    if side**2 != count:
        raise ValueError(f"{_name(processor)}: expected {setting} to be a square, got {count}")
    return side


def _class_tokens(processor: Any) -> int:
    extra = int(processor.num_additional_image_tokens or 0)
    lead = extra - int(processor.vision_feature_select_strategy == "default")
    if lead not in (0, 1):
        raise ValueError(
            f"{_name(processor)}: expected no image token beside the patches, or a class token in "
            f"front of them, got num_additional_image_tokens={extra} with "
            f"vision_feature_select_strategy={processor.vision_feature_select_strategy!r}"
        )
    return lead


def _height_and_width(image_processor: Any) -> tuple[int, int]:
    size = dict(image_processor.size)
    if not (size.get("height") and size.get("width") and image_processor.do_resize):
        raise ValueError(
            "image_processor: expected do_resize=True and size with height and width, got "
            f"do_resize={image_processor.do_resize}, size={size}"
        )
    return size["height"], size["width"]


def _tile_side(image_processor: Any) -> int:
    size, crop = dict(image_processor.size), dict(image_processor.crop_size or {})
    sides = {side for side in (*size.values(), *crop.values()) if side}
    if len(sides) != 1:
        raise ValueError(
            f"image_processor: expected one size for base and tiles, got size={size}, "
            f"crop_size={crop}"
        )
    return int(sides.pop())


def _image_setting(processor: Any, name: str) -> Any:
    """Return what a processor tells its image processor, or what that does by itself."""
    told = getattr(processor, "images_kwargs", None)
    if told is None:  # older releases keep it beside the class
        module = vars(sys.modules[type(processor).__module__])
        kwargs = module.get(f"{_name(processor)}Kwargs")
        told = getattr(kwargs, "_defaults", {}).get("images_kwargs", {})
    return told[name] if name in told else getattr(processor.image_processor, name)


def _own_function(processor: Any, name: str) -> Callable[..., Any]:
    """Return a function that a processor's image processor calls for sizes."""
    images = processor.image_processor
    for kind in type(images).__mro__:
        found = getattr(sys.modules.get(kind.__module__), name, None)
        if found is not None:
            function: Callable[..., Any] = found
            return function
    raise ValueError(
        f"image_processor: expected one of {_name(processor)}'s family, whose module has {name}, "
        f"got {type(images).__name__}"
    )


FAMILIES: dict[str, Family] = {
    "LlavaProcessor": Family(squashed),
    "VideoLlavaProcessor": Family(squashed),
    "LlavaNextProcessor": Family(any_resolution),
    "LlavaNextVideoProcessor": Family(any_resolution),
    "LlavaOnevisionProcessor": Family(any_resolution_shrunk),
    "PixtralProcessor": Family(resized),
    "InternVLProcessor": Family(tiled),
    "GotOcr2Processor": Family(tiled, behind_image="</img>", images="flat"),
    "Ovis2Processor": Family(tiled_behind, place="<IMG_ATOM>"),
    "JanusProcessor": Family(padded),
    "Idefics3Processor": Family(split, images="nested"),
    "SmolVLMProcessor": Family(split, images="nested"),
}
"""By the class name of the processor; VipLLaVA has LLaVA's, Mistral3 Pixtral's."""


# Processors of models whose image tokens no crayon can be given to, and why.
_REFUSED = {"Idefics2Processor": "its resampler's latents have no place in the image"}


def family_of(processor: Any) -> Family:
    """Return what is known of a processor's family.

    Args:
        processor: Of transformers.

    Raises:
        TypeError: naming its class, if it is of none.
    """
    for kind in type(processor).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("transformers."):
            return FAMILIES[kind.__name__]
        if kind.__name__ in _REFUSED:
            raise TypeError(f"processor: {kind.__name__} is not served: {_REFUSED[kind.__name__]}")
    raise TypeError(
        f"processor: expected one of {', '.join(FAMILIES)}, got {_name(processor)}; with a grid of "
        "your own, CollavoProcessor(image_processor, tokenizer, grid=...) serves any model that "
        "looks at one squashed or cropped view of an image"
    )
