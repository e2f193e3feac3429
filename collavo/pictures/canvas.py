"""What the pictures are drawn on: pixels (PNG) or vectors (SVG), with the same few marks on both.

Positions and sizes are pixels from the canvas' upper left corner; a box is left, top, right and
bottom, the last two exclusive. Text is measured with Pillow's own font on both.
"""

from __future__ import annotations

import base64
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, Self, TypeVar
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from collavo.pictures.labels import Rectangle
from collavo.pictures.palette import Colour, ink_on

Side = Literal["left", "middle", "right"]
Point = tuple[float, float]

INK: Colour = (30, 30, 30)
SOFT: Colour = (110, 110, 110)
PAPER: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

# Pillow's font, then the common ones that run about as wide.
_FONTS = "Aileron, Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans Condensed', sans-serif"
# XML 1.0 has no way to write these.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Canvas(ABC):
    """A sheet that takes marks; later marks lie over earlier ones.

    Args:
        size: Width and height in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    @abstractmethod
    def paste(self, corner: tuple[int, int], other: Self) -> None:
        """Lay another canvas of the same kind down, with its corner at a point."""

    @abstractmethod
    def picture(self, corner: tuple[int, int], image: Image.Image) -> None:
        """Lay an RGB image, or an LA image with its transparency, with its corner at a point."""

    @abstractmethod
    def area(self, boxes: Sequence[tuple[int, int, int, int]], fill: Colour) -> None:
        """Fill boxes with one colour; borders are narrow boxes, so they stay sharp."""

    @abstractmethod
    def rounded(self, box: Rectangle, fill: Colour, outline: Colour, radius: int) -> None:
        """Draw a filled box with a border of one pixel and round corners."""

    @abstractmethod
    def line(self, start: Point, stop: Point, colour: Colour, width: int) -> None:
        """Draw a straight line at any angle."""

    @abstractmethod
    def text(
        self, point: Point, text: str, size: int, *, ink: Colour = INK, side: Side = "left"
    ) -> None:
        """Write one line of text; the point is its left end, middle or right end, half way up."""

    def label(self, box: Rectangle, lines: Sequence[str], fill: Colour, size: int) -> None:
        """Write one or two lines on a rounded plate."""
        self.rounded(box, fill, BLACK, 3)
        x, step = (box[0] + box[2]) / 2, line_height(size)
        y = (box[1] + box[3]) / 2 - step * (len(lines) - 1) / 2
        for number, text in enumerate(lines):
            self.text((x, y + step * number), text, size, ink=ink_on(fill), side="middle")


AnyCanvas = TypeVar("AnyCanvas", bound=Canvas)
NewCanvas = Callable[[tuple[int, int]], AnyCanvas]
"""Makes an empty canvas of a size."""


class PixelCanvas(Canvas):
    """A canvas of pixels; ``image`` is the RGB picture so far.

    Args:
        size: Width and height in pixels.

    Example:
        >>> canvas = PixelCanvas((20, 10))
        >>> canvas.area([(0, 0, 5, 10)], (255, 0, 0))
        >>> canvas.image.getpixel((4, 9)), canvas.image.getpixel((5, 9))
        ((255, 0, 0), (255, 255, 255))
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size)
        self.image = Image.new("RGB", size, PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def paste(self, corner: tuple[int, int], other: Self) -> None:
        """Lay another canvas down."""
        self.image.paste(other.image, corner)

    def picture(self, corner: tuple[int, int], image: Image.Image) -> None:
        """Lay an image down."""
        mask = image.getchannel("A") if image.mode == "LA" else None
        self.image.paste(image.convert("RGB"), corner, mask)

    def area(self, boxes: Sequence[tuple[int, int, int, int]], fill: Colour) -> None:
        """Fill boxes."""
        for left, top, right, bottom in boxes:
            if left < right and top < bottom:
                self._draw.rectangle((left, top, right - 1, bottom - 1), fill=fill)

    def rounded(self, box: Rectangle, fill: Colour, outline: Colour, radius: int) -> None:
        """Draw a box with round corners."""
        left, top, right, bottom = (round(value) for value in box)
        corners = (left, top, right - 1, bottom - 1)
        self._draw.rounded_rectangle(corners, radius=radius, fill=fill, outline=outline)

    def line(self, start: Point, stop: Point, colour: Colour, width: int) -> None:
        """Draw a line."""
        self._draw.line((*start, *stop), fill=colour, width=width)

    def text(
        self, point: Point, text: str, size: int, *, ink: Colour = INK, side: Side = "left"
    ) -> None:
        """Write a line of text."""
        anchor = {"left": "ls", "middle": "ms", "right": "rs"}[side]
        at = (round(point[0]), round(_baseline(point[1], size)))
        self._draw.text(at, _spaced(text, size), fill=ink, font=_font(size), anchor=anchor)


class VectorCanvas(Canvas):
    """A canvas of SVG elements: text stays text, boxes stay boxes, only photos are pixels.

    Args:
        size: Width and height in pixels.
        title: What a reader of the file is told it shows.

    Example:
        >>> canvas = VectorCanvas((20, 10), "Cats & dogs")
        >>> canvas.area([(0, 0, 5, 10)], (255, 0, 0))
        >>> print(canvas.source())  # doctest: +ELLIPSIS
        <svg xmlns="http://www.w3.org/2000/svg" ...>
        <title>Cats &amp; dogs</title>
        <rect width="20" height="10" fill="#ffffff"/>
        <path d="M0 0h5v10h-5z" fill="#ff0000" shape-rendering="crispEdges"/>
        </svg>
    """

    def __init__(self, size: tuple[int, int], title: str = "") -> None:
        super().__init__(size)
        self._title = title
        self._elements: list[str] = []

    def paste(self, corner: tuple[int, int], other: Self) -> None:
        """Lay another canvas down."""
        group = f'<g transform="translate({corner[0]} {corner[1]})">'
        self._elements += [group, *other._elements, "</g>"]

    def source(self) -> str:
        """Return the SVG file's text so far."""
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{_FONTS}" role="img">'
        )
        title = [f"<title>{_xml(self._title)}</title>"] if self._title else []
        paper = f'<rect width="{width}" height="{height}" fill="{_hex(PAPER)}"/>'
        return "\n".join([head, *title, paper, *self._elements, "</svg>"])

    def picture(self, corner: tuple[int, int], image: Image.Image) -> None:
        """Embed an image: as a PNG, or as a JPEG where that is smaller."""
        kind, content = "png", _encode(image, "PNG", optimize=True)
        if image.mode == "RGB":
            jpeg = _encode(image, "JPEG", quality=90)
            if len(jpeg) < len(content):
                kind, content = "jpeg", jpeg
        data = base64.b64encode(content).decode("ascii")
        self._elements.append(
            f'<image x="{corner[0]}" y="{corner[1]}" width="{image.width}" '
            f'height="{image.height}" href="data:image/{kind};base64,{data}"/>'
        )

    def area(self, boxes: Sequence[tuple[int, int, int, int]], fill: Colour) -> None:
        """Fill boxes, as one path."""
        path = "".join(
            f"M{left} {top}h{right - left}v{bottom - top}h{left - right}z"
            for left, top, right, bottom in boxes
            if left < right and top < bottom
        )
        if path:
            self._elements.append(
                f'<path d="{path}" fill="{_hex(fill)}" shape-rendering="crispEdges"/>'
            )

    def rounded(self, box: Rectangle, fill: Colour, outline: Colour, radius: int) -> None:
        """Draw a box with round corners."""
        left, top, right, bottom = (round(value) for value in box)
        self._elements.append(
            f'<rect x="{left + 0.5}" y="{top + 0.5}" width="{right - left - 1}" '
            f'height="{bottom - top - 1}" rx="{radius}" fill="{_hex(fill)}" '
            f'stroke="{_hex(outline)}"/>'
        )

    def line(self, start: Point, stop: Point, colour: Colour, width: int) -> None:
        """Draw a line."""
        self._elements.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{stop[0]:.1f}" y2="{stop[1]:.1f}" '
            f'stroke="{_hex(colour)}" stroke-width="{width}"/>'
        )

    def text(
        self, point: Point, text: str, size: int, *, ink: Colour = INK, side: Side = "left"
    ) -> None:
        """Write a line of text, as wide as Pillow's font would be."""
        if not text:
            return
        anchor = {"left": "", "middle": ' text-anchor="middle"', "right": ' text-anchor="end"'}
        self._elements.append(
            f'<text x="{point[0]:.1f}" y="{_baseline(point[1], size):.1f}" '
            f'font-size="{size}" fill="{_hex(ink)}"{anchor[side]} '
            f'textLength="{text_width(text, size):.1f}" lengthAdjust="spacingAndGlyphs">'
            f"{_xml(text)}</text>"
        )


def text_width(text: str, size: int) -> float:
    """Return how many pixels wide a line of text is.

    Args:
        text: One line.
        size: Font size in pixels.
    """
    return _font(size).getlength(_spaced(text, size))


def line_height(size: int) -> int:
    """Return how far apart the middles of two lines of text stand.

    Args:
        size: Font size in pixels.
    """
    return size + 1


def shorten(text: str, size: int, width: float) -> str:
    """Cut the middle out of a text that is wider than its place.

    Args:
        text: One line.
        size: Font size in pixels.
        width: What there is, in pixels.

    Example:
        >>> shorten("a-very-long-file-name.jpg", 13, 100)
        'a-very-...ame.jpg'
    """
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        cut = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
        if text_width(cut, size) <= width:
            return cut
    return "..."


def _spaced(text: str, size: int) -> str:
    # Pillow's font is hinted: spaces of small letters come out too narrow to be seen.
    return text if size >= 12 else text.replace(" ", "  ")


def _baseline(middle: float, size: int) -> float:
    # Capitals and digits of the fonts are about 0.7 of the size high.
    return middle + 0.36 * size


def _encode(image: Image.Image, kind: str, **options: bool | int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _xml(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text), {'"': "&quot;"})


def _hex(colour: Colour) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
