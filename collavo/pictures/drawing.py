"""One picture of what the model is told: segments, numbered boxes, crayon grid and legend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from collavo import writing
from collavo._arguments import expect_path
from collavo.panoptic.images import RAISE_LIMIT, ImageInput, read_image
from collavo.panoptic.maps import PanopticMap, PathLike
from collavo.pictures.canvas import (
    AnyCanvas,
    Canvas,
    NewCanvas,
    PixelCanvas,
    VectorCanvas,
    shorten,
    text_width,
)
from collavo.pictures.crayon_grid import draw_grid
from collavo.pictures.scene import SceneRows
from collavo.pictures.views import draw_boxes, draw_legend, draw_overlay

VIEWS = ("overlay", "boxes", "grid", "legend")
"""The views in a picture, in their order; options and arguments call them its panels."""

SUFFIXES = (".png", ".svg")
"""The kinds of files that a picture can be saved as."""

_MARGIN, _TOP = 20, 34
_HEADING = 26
_HEADING_FONT, _TITLE_FONT = 15, 18
_SMALLEST = 240
# A sheet may be this wide, however small its views are.
_SCREEN = 900
# A cell is at least a pixel wide, and a grid not wider than its view or than this.
_MOST_CELLS = 2000
# A legend is never set in more columns than this.
_MOST_COLUMNS = 4


def draw_scene(
    image: ImageInput,
    panoptic: PanopticMap,
    *,
    grid: tuple[int, int] = (24, 24),
    max_number: int = 20,
    panel: int = 760,
    title: str = "",
    panels: Sequence[str] = VIEWS,
) -> Image.Image:
    """Draw an image's segments, numbered boxes, crayon grid and a legend into one picture.

    Labels and boxes are those of the text that the model reads. A bare number is a row of the
    crayon, which the legend explains. Colours are the palette's for colour-blind readers.

    Args:
        image: The image, as :func:`~collavo.panoptic.read_image` takes it.
        panoptic: Its panoptic map, of any size.
        grid: Height and width of the crayon grid, at most 2000 each.
        max_number: Largest instance number.
        panel: Longer side of the drawn image in pixels, at least 240; the views may have
            ``PIL.Image.MAX_IMAGE_PIXELS`` together.
        title: Stands over the picture.
        panels: Which views, in this order: some of ``"overlay"``, ``"boxes"``, ``"grid"`` and
            ``"legend"``.

    Returns:
        An RGB picture of the views, side by side as there is room.

    Raises:
        ValueError: if the image is empty or unreadable, the grid or the panel is too small or too
            large, or the panels are none, unknown or named twice.

    Example:
        >>> import torch
        >>> ids = torch.ones(8, 12, dtype=torch.int32)
        >>> picture = draw_scene(
        ...     Image.new("RGB", (12, 8)), PanopticMap.from_segments(ids, [1], [17]), grid=(4, 6)
        ... )
        >>> picture.mode
        'RGB'
    """
    photo = read_image(image)
    _check(photo, grid, panel, panels)
    scene = SceneRows.of(panoptic, grid, max_number)
    return _compose(PixelCanvas, photo, scene, panel, title, panels).image


def save_scene(
    path: PathLike,
    image: ImageInput,
    panoptic: PanopticMap,
    *,
    grid: tuple[int, int] = (24, 24),
    max_number: int = 20,
    panel: int = 760,
    title: str = "",
    panels: Sequence[str] = VIEWS,
) -> None:
    """Draw the picture of :func:`draw_scene` into a PNG, or with vectors into an SVG.

    An SVG holds all it needs: text, boxes, cells and legend as vectors, the photo as pixels. The
    same arguments give the same bytes.

    Args:
        path: Where to write; its suffix, ``.png`` or ``.svg``, says what.
        image: As of :func:`draw_scene`, like all that follow.
        panoptic: The image's panoptic map.
        grid: Height and width of the crayon grid.
        max_number: Largest instance number.
        panel: Longer side of the drawn image in pixels.
        title: Stands over the picture.
        panels: Which views, in this order.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: naming the file, if it cannot be written; an older picture is still there.
        ValueError: if the suffix is another one, or as :func:`draw_scene`.

    Example:
        >>> import tempfile, torch
        >>> ids = torch.ones(8, 12, dtype=torch.int32)
        >>> scene = PanopticMap.from_segments(ids, [1], [17])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "scene.svg"
        ...     save_scene(path, Image.new("RGB", (12, 8)), scene, panels=["grid"])
        ...     "#1 horse" in path.read_text(encoding="utf-8")
        True
    """
    expect_path("path", path, "the picture to write")
    path = check_suffix(path)
    photo = read_image(image)
    _check(photo, grid, panel, panels)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    scene = SceneRows.of(panoptic, grid, max_number)
    if path.suffix.lower() == ".png":
        picture = _compose(PixelCanvas, photo, scene, panel, title, panels).image
        with writing.written_file(path) as temporary:
            picture.save(temporary, "PNG")
        return
    new = partial(VectorCanvas, title=_printable(title))
    source = _compose(new, photo, scene, panel, title, panels).source()
    writing.write_file(path, source.encode("utf-8"))


def check_suffix(path: PathLike) -> Path:
    """Return a picture's path if a picture can be saved there.

    Args:
        path: A file name.

    Raises:
        ValueError: if it ends in neither ``.png`` nor ``.svg``.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        wanted = " or ".join(SUFFIXES)
        raise ValueError(f"{path}: expected a file name ending in {wanted}, got {path.suffix!r}")
    return path


def _check(photo: Image.Image, grid: tuple[int, int], panel: int, panels: Sequence[str]) -> None:
    if max(grid) > _MOST_CELLS:
        raise ValueError(
            f"grid: expected at most {_MOST_CELLS} cells per side in a picture, got {grid}"
        )
    if panel < _SMALLEST:
        raise ValueError(f"panel: expected at least {_SMALLEST} pixels, got {panel}")
    known = not isinstance(panels, str) and set(panels) <= set(VIEWS)
    if not known or not panels or len(set(panels)) < len(panels):
        raise ValueError(f"panels: expected some of {list(VIEWS)}, each once, got {panels!r}")
    views = max(1, sum(name != "legend" for name in panels))
    width, height = _view_size(photo, panel)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and views * width * height > limit:
        most = max(_SMALLEST, int(panel * (limit / (views * width * height)) ** 0.5))
        raise ValueError(
            f"panel: expected at most {most} pixels (--panel-size), got {panel}: {views} views of "
            f"{width} x {height} have more than {limit:,} pixels; {RAISE_LIMIT}"
        )


def _view_size(photo: Image.Image, panel: int) -> tuple[int, int]:
    scale = panel / max(photo.size)
    return max(1, round(photo.width * scale)), max(1, round(photo.height * scale))


def _compose(
    new: NewCanvas[AnyCanvas],
    image: Image.Image,
    scene: SceneRows,
    panel: int,
    title: str,
    panels: Sequence[str],
) -> AnyCanvas:
    """Draw the views and put them on the sheet that needs the least paper."""
    few = panel < 4 * max(image.size)
    smooth = Image.Resampling.LANCZOS if few else Image.Resampling.NEAREST
    photo = image.resize(_view_size(image, panel), smooth)
    drawn = {name: _piece(new, name, photo, scene) for name in panels if name != "legend"}
    limit = max(round(1.2 * (2 * panel + _MARGIN)), _SCREEN)
    sheets = []
    for columns in range(1, _MOST_COLUMNS + 1 if "legend" in panels else 2):
        if "legend" in panels:
            drawn["legend"] = "Rows of the crayon", draw_legend(new, scene, columns)
        pieces = [drawn[name] for name in panels]
        sheets.append((pieces, *_arrange(pieces, limit, _TOP if title else _MARGIN // 2)))
    pieces, corners, (width, height) = min(sheets, key=lambda sheet: sheet[2][0] * sheet[2][1])
    sheet = new((width, height))
    title = shorten(_printable(title), _TITLE_FONT, width - 2 * _MARGIN)
    sheet.text((_MARGIN, _TOP / 2 + 2), title, _TITLE_FONT)
    for (heading, canvas), (x, y) in zip(pieces, corners, strict=True):
        sheet.text((x, y + _HEADING / 2 - 2), heading, _HEADING_FONT)
        sheet.paste((x, y + _HEADING), canvas)
    return sheet


def _piece(
    new: NewCanvas[AnyCanvas], name: str, photo: Image.Image, scene: SceneRows
) -> tuple[str, AnyCanvas]:
    """Draw one view; return its heading and its canvas."""
    if name == "overlay":
        return f"Segments ({len(scene.rows)})", draw_overlay(new, photo, scene)
    if name == "boxes":
        return "Boxes, as the text has them (dashed: stuff)", draw_boxes(new, photo, scene)
    rows, columns = scene.cell_rows.shape
    heading = f"Crayon grid, {rows} x {columns} cells (a bare number is a row)"
    return heading, draw_grid(new, photo.size, scene)


def _arrange(
    pieces: Sequence[tuple[str, Canvas]], limit: int, top: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Set pieces in lines like words, none wider than the limit unless one piece alone is.

    Returns:
        The pieces' upper left corners, and the sheet's width and height.
    """
    corners: list[tuple[int, int]] = []
    x, y, bottom, right = _MARGIN, top, top, 0
    for heading, canvas in pieces:
        # An SVG's reader may have none but a wider font.
        width = max(canvas.size[0], round(1.1 * text_width(heading, _HEADING_FONT)))
        if x > _MARGIN and x + width > _MARGIN + limit:
            x, y = _MARGIN, bottom
        corners.append((x, y))
        x += width + _MARGIN
        right = max(right, x)
        bottom = max(bottom, y + _HEADING + canvas.size[1] + _MARGIN)
    return corners, (right, bottom)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
