"""Panoptic maps: which segment every pixel belongs to, and which class every segment has."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from collavo import writing
from collavo.panoptic.categories import CATEGORY_TO_INDEX, NUM_CLASSES, class_index
from collavo.panoptic.images import ImageInput, check_pixels, read_image
from collavo.panoptic.json_files import integer, shown
from collavo_kernels import MAX_MAP_SIDE, CrayonMap, decode_colours

PathLike = str | Path

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = {0: "grayscale", 2: "RGB", 3: "paletted", 4: "grayscale with alpha", 6: "RGBA"}
_MAX_ID = 256**3 - 1


def read_panoptic_png(path: PathLike) -> Tensor:
    """Read a COCO panoptic PNG as segment ids: ``id = R + 256 G + 65536 B``.

    Args:
        path: An RGB PNG with 8 bits per channel.

    Returns:
        int32 ``[H, W]``; 0 means "no segment".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as :func:`read_panoptic_colours`.

    Source: COCO panoptic's file format.

    Example:
        >>> import tempfile, torch
        >>> ids = torch.tensor([[0, 1], [256, 70000]], dtype=torch.int32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_panoptic_png(Path(folder) / "map.png", ids)
        ...     bool((read_panoptic_png(Path(folder) / "map.png") == ids).all())
        True
    """
    return decode_colours(read_panoptic_colours(path))


def read_panoptic_colours(path: PathLike) -> Tensor:
    """Read a COCO panoptic PNG as it is: the lookup takes its colours without a copy.

    Args:
        path: An RGB PNG with 8 bits per channel.

    Returns:
        uint8 ``[H, W, 3]``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no PNG, is truncated, has no pixels or too many for
            the lookup on a side or for ``PIL.Image.MAX_IMAGE_PIXELS``, or is paletted, grayscale,
            16-bit or RGBA.

    Source: COCO panoptic's file format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such panoptic PNG")
    content = path.read_bytes()
    _check_png_header(path, content)
    try:
        with Image.open(BytesIO(content)) as picture:
            return torch.from_numpy(np.array(picture))  # a copy that may be written to
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: the panoptic PNG is truncated or damaged ({error})") from error


def read_panoptic_size(path: PathLike) -> tuple[int, int]:
    """Read a COCO panoptic PNG's height and width from its header; its pixels are not decoded.

    Args:
        path: As of :func:`read_panoptic_colours`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if its header is not that of a panoptic PNG.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such panoptic PNG")
    with path.open("rb") as file:
        head = file.read(26)
    _check_png_header(path, head)
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def _check_png_header(path: Path, head: bytes) -> None:
    # Pillow turns 16-bit RGB into 8 bits without a word, so the header itself is read.
    if not head.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path}: expected a PNG with a panoptic map, got another kind of file")
    if len(head) < 26 or head[12:16] != b"IHDR":
        raise ValueError(f"{path}: the panoptic PNG is truncated or damaged (no header)")
    width, height, depth, kind = struct.unpack(">IIBB", head[16:26])
    if (depth, kind) != (8, 2):
        found = f"{depth}-bit {_PNG_KINDS.get(kind, f'colour type {kind}')}"
        raise ValueError(
            f"{path}: expected an 8-bit RGB PNG (id = R + 256 G + 65536 B), got {found}"
        )
    if not (width and height):
        raise ValueError(f"{path}: expected a map with pixels, got {width}x{height}")
    if max(width, height) > MAX_MAP_SIDE:
        raise ValueError(
            f"{path}: expected a map of at most {MAX_MAP_SIDE} pixels per side, "
            f"got {width}x{height}"
        )
    check_pixels(width, height, str(path))


def write_panoptic_png(path: PathLike, segmentation: Tensor) -> None:
    """Write segment ids as a COCO panoptic PNG; ids <= 0 are written as 0.

    Args:
        path: Where to write; the folder must exist.
        segmentation: int32 or int64 ``[H, W]``, at most 2**24 - 1.

    Raises:
        ValueError: if the map is not two-dimensional, is empty or has a larger id.

    Source: COCO panoptic's file format.
    """
    if segmentation.dim() != 2 or segmentation.numel() == 0:
        raise ValueError(
            f"segmentation: expected a map [H, W] with pixels, got {list(segmentation.shape)}"
        )
    ids = segmentation.detach().cpu().clamp_min(0).numpy().astype(np.int64)
    if ids.max() > _MAX_ID:
        raise ValueError(f"segmentation: expected ids of at most {_MAX_ID}, got {ids.max()}")
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    with writing.written_file(path, sync=False) as temporary:
        Image.fromarray(channels).save(temporary, format="PNG")


@dataclass(frozen=True, eq=False)
class PanopticMap:
    """One image's segments: a map of ids, and the class of every listed id.

    Args:
        segmentation: int32 ``[H, W]`` on the CPU; values <= 0 and ids that are not listed mean
            "no segment". Or uint8 ``[H, W, 3]``, the colours of a COCO panoptic PNG.
        segment_ids: int32 ``[S]``, the ids > 0 as they stand in the map, each listed once. An id
            that covers no pixel may be listed.
        segment_classes: int32 ``[S]``, class indices 0..132, or -1 for a segment of unknown class.

    Raises:
        TypeError: if the map is neither int32 nor uint8, or a list is no int32 tensor.
        ValueError: if a shape, an id or a class is wrong.

    Example:
        >>> ids = torch.tensor([[0, 7], [7, 7]], dtype=torch.int32)
        >>> scene = PanopticMap.from_segments(ids, [7], [17])
        >>> scene.size, scene.num_segments
        ((2, 2), 1)
    """

    segmentation: Tensor
    segment_ids: Tensor
    segment_classes: Tensor

    def __post_init__(self) -> None:
        _expect("segmentation", self.segmentation, (torch.int32, torch.uint8))
        shape = self.segmentation.shape
        coloured = self.segmentation.dtype == torch.uint8
        if len(shape) != (3 if coloured else 2) or (coloured and shape[2] != 3):
            raise ValueError(
                "segmentation: expected int32 [H, W] or uint8 [H, W, 3], "
                f"got {self.segmentation.dtype} {list(shape)}"
            )
        for name, value in (
            ("segment_ids", self.segment_ids),
            ("segment_classes", self.segment_classes),
        ):
            _expect(name, value, (torch.int32,))
            if value.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, got {list(value.shape)}")
        if self.segmentation.numel() == 0:
            raise ValueError(
                f"segmentation: expected at least one pixel, got {list(self.segmentation.shape)}"
            )
        self._check_lists()

    def _check_lists(self) -> None:
        ids, classes = self.segment_ids.tolist(), self.segment_classes.tolist()
        if len(ids) != len(classes):
            raise ValueError(f"segment_classes: expected {len(ids)} classes, got {len(classes)}")
        seen: set[int] = set()
        for segment, label in zip(ids, classes, strict=True):
            if segment <= 0:
                raise ValueError(f"segment_ids: expected ids > 0, got {segment}")
            if segment in seen:
                raise ValueError(f"segment_ids: id {segment} is listed twice")
            if not -1 <= label < NUM_CLASSES:
                raise ValueError(
                    f"segment_classes: expected -1..{NUM_CLASSES - 1} for segment {segment}, "
                    f"got {label}"
                )
            seen.add(segment)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.segmentation.shape[0]), int(self.segmentation.shape[1])

    def ids(self) -> Tensor:
        """Return the segment id of every pixel, int32 ``[H, W]``: the map itself, or decoded."""
        coloured = self.segmentation.dtype == torch.uint8
        return decode_colours(self.segmentation) if coloured else self.segmentation

    @property
    def num_segments(self) -> int:
        """How many segments are listed."""
        return self.segment_ids.numel()

    @classmethod
    def from_segments(
        cls,
        segmentation: Tensor | np.ndarray[Any, Any],
        segment_ids: Sequence[int] | Tensor,
        segment_classes: Sequence[int] | Tensor,
    ) -> PanopticMap:
        """Build a map from any integer map and any integer lists.

        Args:
            segmentation: ``[H, W]`` of any integer type that fits into int32, or uint8
                ``[H, W, 3]`` colours of a COCO panoptic PNG.
            segment_ids: The listed ids.
            segment_classes: Their class indices, in the same order.

        Raises:
            TypeError: if the map is not of an integer type.
            ValueError: as the class itself, and if an id does not fit into int32.
        """
        raw = _tensor(segmentation)
        if raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
            raise TypeError(f"segmentation: expected an integer map, got {raw.dtype}")
        if raw.dtype == torch.int64 and raw.numel() and int(raw.max()) >= 2**31:
            raise ValueError(
                f"segmentation: expected ids that fit into int32, got {int(raw.max())}"
            )
        if raw.dtype == torch.int64:
            raw = raw.clamp_min(-1)  # else ids below int32's least would come round to others
        coloured = raw.dtype == torch.uint8 and raw.dim() == 3
        return cls(
            raw.cpu().to(raw.dtype if coloured else torch.int32).contiguous(),
            torch.as_tensor(segment_ids, dtype=torch.int32).cpu().reshape(-1),
            torch.as_tensor(segment_classes, dtype=torch.int32).cpu().reshape(-1),
        )

    @classmethod
    def empty(cls, height: int, width: int) -> PanopticMap:
        """Return a map without any segment.

        Args:
            height: In pixels.
            width: In pixels.
        """
        none = torch.zeros(0, dtype=torch.int32)
        return cls(torch.zeros(height, width, dtype=torch.int32), none, none.clone())

    @classmethod
    def from_coco(
        cls,
        png: PathLike | Tensor,
        segments_info: Sequence[Mapping[str, Any]],
        categories: Sequence[Mapping[str, Any]] | None = None,
    ) -> PanopticMap:
        """Build a map from COCO's PNG and the ``segments_info`` of its annotation.

        Args:
            png: The PNG's path, or what was read from it: colours, uint8 ``[H, W, 3]``, or ids,
                int32 ``[H, W]``.
            segments_info: One mapping per segment with ``id`` and ``category_id``.
            categories: The JSON's ``categories``; classes are then found by name, so files with
                their own category ids work. None means COCO's own ids.

        Raises:
            FileNotFoundError: if there is no such PNG.
            ValueError: naming the PNG, the segment and the key, if the PNG is unreadable, a key is
                missing, an id is listed twice or a category is unknown.
        """
        where = "segments_info" if isinstance(png, Tensor) else str(png)
        ids, classes = parse_segments(segments_info, category_table(categories), where)
        segmentation = png if isinstance(png, Tensor) else read_panoptic_colours(png)
        return cls.from_segments(segmentation, ids, classes)

    @classmethod
    def from_segmenter(
        cls, segmenter: Callable[[Image.Image], object], image: ImageInput
    ) -> PanopticMap:
        """Run any segmenter on an image.

        Args:
            segmenter: A callable that takes an RGB image and returns a ``PanopticMap``, or a
                mapping as transformers' panoptic post-processing gives it: ``segmentation``
                ``[H, W]`` (ids; <= 0 is no segment) and ``segments_info`` with ``id`` and
                ``label_id`` (a class index).
            image: As :func:`~collavo.panoptic.read_image` takes it; the segmenter sees what that
                returns.

        Raises:
            TypeError: if the segmenter returns something else.
            ValueError: if the image is unreadable, or the result has a missing key, an id twice or
                a class out of range.

        Example:
            >>> def left_half_is_a_horse(image):
            ...     ids = torch.zeros(image.height, image.width, dtype=torch.int32)
            ...     ids[:, : image.width // 2] = 1
            ...     return {"segmentation": ids, "segments_info": [{"id": 1, "label_id": 17}]}
            >>> scene = PanopticMap.from_segmenter(left_half_is_a_horse, Image.new("RGB", (4, 2)))
            >>> scene.segment_classes.tolist()
            [17]
        """
        result = segmenter(read_image(image))
        return result if isinstance(result, PanopticMap) else cls.from_result(result)

    @classmethod
    def from_result(cls, result: object) -> PanopticMap:
        """Build a map from what transformers' panoptic post-processing returns for one image.

        Args:
            result: A mapping with ``segmentation`` ``[H, W]`` (ids; <= 0 is no segment) and
                ``segments_info``, one mapping per segment with ``id`` and ``label_id``.

        Raises:
            TypeError: if it is no mapping.
            ValueError: if a key is missing, an id occurs twice or a class is out of range.
        """
        if not isinstance(result, Mapping):
            raise TypeError(
                "segmenter: expected a PanopticMap or a mapping with 'segmentation' and "
                f"'segments_info', got {type(result).__name__}"
            )
        for key in ("segmentation", "segments_info"):
            if key not in result:
                raise ValueError(f"segmenter: its result has no {key!r}")
        where = "segmenter: segments_info"
        infos = list(enumerate(result["segments_info"]))
        ids = [_entry(info, "id", where, i) for i, info in infos]
        labels = [_entry(info, "label_id", where, i) for i, info in infos]
        # The map comes as float where nothing at all was found.
        segmentation = _tensor(result["segmentation"])
        if segmentation.dtype != torch.int64:
            segmentation = segmentation.to(torch.int32)
        return cls.from_segments(segmentation, ids, labels)


MapInput: TypeAlias = PanopticMap | CrayonMap
"""An image's segments: its map, or the rows and cells that a lookup has made of it already."""


def _expect(name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {names}, got {found}")


def _tensor(values: Any) -> Tensor:
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # Pillow's arrays are so, and torch would warn
    return torch.as_tensor(values)


def category_table(categories: Sequence[Mapping[str, Any]] | None) -> Mapping[int, int | str]:
    """Return the class index of every category id of a JSON's ``categories``.

    A class of the file's own has its name, as messages show it, in the index's place: only a
    segment of it is a fault.

    Args:
        categories: Entries with ``id`` and ``name``; None means COCO's own.

    Raises:
        ValueError: if an entry lacks an id, or an id occurs twice.

    Example:
        >>> category_table([{"id": "1", "name": "sky"}, {"id": 2.0, "name": "drone"}])
        {1: 119, 2: "'drone'"}
    """
    if categories is None:
        return CATEGORY_TO_INDEX
    table: dict[int, int | str] = {}
    for position, entry in enumerate(categories):
        number = _entry(entry, "id", "categories", position)
        if number in table:
            raise ValueError(f"categories[{position}]: id {number} is listed twice")
        name: Any = entry.get("name")
        try:
            table[number] = class_index(name)
        except (ValueError, TypeError):
            table[number] = shown(name)
    return table


def parse_segments(
    segments_info: Sequence[Mapping[str, Any]], table: Mapping[int, int | str], where: str
) -> tuple[list[int], list[int]]:
    """Check a ``segments_info`` list and return its ids and class indices.

    Args:
        segments_info: One mapping per segment with ``id`` and ``category_id``.
        table: Class index, or an own class's name, of every category id.
        where: What to call the list in messages, such as its file.

    Raises:
        ValueError: naming ``where``, the entry and the key.
    """
    ids: list[int] = []
    classes: list[int] = []
    seen: set[int] = set()
    for position, info in enumerate(segments_info):
        segment = _entry(info, "id", f"{where}: segments_info", position)
        category = _entry(info, "category_id", f"{where}: segments_info", position)
        if segment in seen:
            raise ValueError(f"{where}: segment id {segment} is listed twice")
        if not 0 < segment <= _MAX_ID:
            raise ValueError(f"{where}: expected a segment id in 1..{_MAX_ID}, got {segment}")
        label = table.get(category)
        if label is None:
            raise ValueError(f"{where}: segment {segment} has the unknown category_id {category}")
        if isinstance(label, str):
            raise ValueError(
                f"{where}: segment {segment} has category_id {category}: expected a COCO panoptic "
                f"class, got {label}"
            )
        seen.add(segment)
        ids.append(segment)
        classes.append(label)
    return ids, classes


def _entry(info: object, key: str, where: str, position: int) -> int:
    value = info.get(key) if isinstance(info, Mapping) else None
    number = integer(value)
    if number is None:
        raise ValueError(f"{where}[{position}]: expected an integer {key!r}, got {shown(value)}")
    return number
