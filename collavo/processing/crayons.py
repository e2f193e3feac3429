"""The crayons of a batch of pictures: maps are looked up together, given crayons checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from collavo.panoptic.maps import MapInput, PanopticMap
from collavo.processing.blocks import Layout, look_up
from collavo_kernels import CrayonMap


def crayons_of(
    maps: Sequence[MapInput | None],
    sizes: Sequence[tuple[int, int]],
    layouts: Sequence[Layout],
    *,
    num_classes: int,
    max_number: int,
    reduce: str,
) -> list[CrayonMap]:
    """Give every picture its rows; maps that are no crayon yet are looked up together.

    Args:
        maps: A map, a crayon or None for each picture.
        sizes: Height and width of each.
        layouts: Where the image tokens of each look.
        num_classes: Number of classes.
        max_number: Largest instance number.
        reduce: How a cell gets its segment.

    Raises:
        ValueError: naming the map, if a crayon does not fit.
    """
    given = list(zip(maps, layouts, strict=True))
    looked_up: Iterator[CrayonMap] = iter(())
    pairs = [(known, layout) for known, layout in given if isinstance(known, PanopticMap)]
    if pairs:
        looked_up = iter(
            look_up(pairs, num_classes=num_classes, max_number=max_number, reduce=reduce)
        )
    crayons = []
    for position, (known, layout) in enumerate(given):
        if known is None:
            crayons.append(_unknown(layout, num_classes, max_number, reduce))
        elif isinstance(known, PanopticMap):
            crayons.append(next(looked_up))
        else:
            crayons.append(
                check_crayon(
                    known,
                    f"panoptic[{position}]",
                    size=sizes[position],
                    layout=layout,
                    num_classes=num_classes,
                    max_number=max_number,
                )
            )
    return crayons


@lru_cache(maxsize=256)
def _unknown(layout: Layout, num_classes: int, max_number: int, reduce: str) -> CrayonMap:
    """Return the one unknown segment of a picture without a map; nobody writes into it."""
    sizes = {"num_classes": num_classes, "max_number": max_number}
    return look_up([(None, layout)], **sizes, reduce=reduce)[0]


def check_crayon(
    crayon: CrayonMap,
    where: str,
    *,
    size: tuple[int, int],
    layout: Layout,
    num_classes: int,
    max_number: int,
) -> CrayonMap:
    """Return what is the crayon of one image, as a lookup for these sizes gives it.

    Args:
        crayon: Rows and cells.
        where: What to call it in messages.
        size: Height and width of the image.
        layout: Where the image tokens look: one view of all of the image.
        num_classes: Number of classes.
        max_number: Largest instance number.

    Raises:
        ValueError: naming ``where`` and what differs.
    """
    (block, *others) = layout
    cells = block.places
    if others or not block.padded or cells != block.grid[0] * block.grid[1]:
        raise ValueError(
            f"{where}: expected a PanopticMap, since the image processor crops this image of "
            f"{size[1]}x{size[0]} or cuts it into tiles, and its map has to follow, got a "
            "CrayonMap; use a processor that squashes or pads (make_image_processor)"
        )
    if crayon.device.type != "cpu":
        raise ValueError(f"{where}: expected a CrayonMap on the CPU, got {crayon.device}")
    if crayon.num_images != 1 or bool((crayon.row_image != 0).any()):
        raise ValueError(
            f"{where}: expected a CrayonMap of one image without dead rows, got "
            f"{crayon.num_images} images and {crayon.num_rows} rows"
        )
    if crayon.num_cells != cells:
        raise ValueError(
            f"{where}: expected the processor's {cells} grid cells, got a CrayonMap with "
            f"{crayon.num_cells}; look the map up with the processor's grid"
        )
    for name, values, most in (
        ("a row's class", crayon.row_class, num_classes),
        ("a row's number", crayon.row_number, max_number),
        # In a batch a row outside would be one of another image.
        ("a cell's row_index", crayon.row_index, crayon.num_rows - 1),
    ):
        if values.numel() and int(values.max()) > most:
            raise ValueError(
                f"{where}: expected {name} to be at most {most}, as the processor's "
                f"crayon has it, got {int(values.max())}"
            )
        if values is crayon.row_index:
            values = values[:, block.seeing.reshape(-1)]
        if values.numel() and int(values.min()) < 0:
            raise ValueError(
                f"{where}: expected {name} to be at least 0, got {int(values.min())}; look the map "
                "up again"
            )
    if bool((crayon.row_index[:, ~block.seeing.reshape(-1)] != -1).any()):
        raise ValueError(
            f"{where}: expected -1 in the cells of padding, since the image processor pads this "
            f"image of {size[1]}x{size[0]} to a square, got rows; look the map up for that square "
            "(collavo prepare --image-mode pad)"
        )
    return crayon
