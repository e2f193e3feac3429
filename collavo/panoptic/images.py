"""Pictures as a viewer shows them: the one place where a file, a PIL image or an array is read.

The processor, the data sets, the segmenters and their cache, and ``collavo show`` all read here, so
they see the same pixels:

- turned and mirrored as EXIF (or XMP) says, all eight orientations; what cannot be read says
  nothing, as for any viewer;
- transparency of every kind (alpha, a transparent palette entry or colour) on white ground;
- gray of 16 bits by its upper 8, as 16-bit RGB comes out of Pillow too; wider integers and floats
  by a white that their values tell, and refused where they do not;
- CMYK and LAB through their ICC profile, if it fits; CMYK without one as Pillow converts it, LAB as
  CIE L*a*b* under D50. Profiles of RGB and gray are not applied: what vision models learn from was
  read so;
- of several frames the first.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

_T = TypeVar("_T")
Samples: TypeAlias = np.ndarray[Any, Any]
ImageInput: TypeAlias = Image.Image | str | Path | Samples
"""A picture: a path, a PIL image, or an array ``[H, W]`` or ``[H, W, C]`` of 1 to 4 channels."""

GROUND = (255, 255, 255)
"""What transparent pixels are seen on."""

RAISE_LIMIT = "to allow more, set PIL.Image.MAX_IMAGE_PIXELS (on the command line --max-pixels)"
"""How to go beyond the limit on pixels."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 256, 257, 258, 262, 339
_TEXT_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def read_image(image: ImageInput) -> Image.Image:
    """Return a picture as a viewer shows it, in RGB and without metadata.

    Reading what was read before changes nothing.

    Args:
        image: The path of any format that Pillow reads; a PIL image, of several frames the one it
            stands at; or an array ``[H, W]`` or ``[H, W, C]``, C channels of gray, gray and alpha,
            RGB or RGBA. Booleans, uint8 and uint16 span their range. Other integers and floats are
            taken where their values tell the white: integers up to 255, floats up to 1; above
            that, integers that reach more than half of 16 bits or of the type's range, and floats
            that reach more than half of 255 or 65535.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if it is none of these.
        ValueError: naming the file, if it is no image, is truncated or has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``; if there is no pixel, an array has another shape, or the
            white of its values is not known.

    Example:
        >>> clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
        >>> read_image(clear).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(image, str) and image.startswith(("http:", "https:", "data:")):
        raise ValueError(
            f"image: expected the path of a file, got {image[:40]!r}...; fetch or decode it and "
            "give the PIL image"
        )
    if isinstance(image, str | Path):
        return _read(Path(image), _as_shown)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _named("image", image, _as_shown)
    raise TypeError(
        "image: expected a path, a PIL image or a NumPy array [H, W] or [H, W, C], "
        f"got {type(image).__name__}"
    )


def read_image_size(path: str | Path) -> tuple[int, int]:
    """Return the height and width that :func:`read_image` would give; pixels are not decoded.

    Args:
        path: As there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image or has too many pixels.
    """
    return _read(Path(path), _shown_size)


def describe_orientation(path: str | Path) -> str:
    """Return in words how a file is stored that EXIF turns on its side, or ``""`` for others.

    Args:
        path: As of :func:`read_image`.
    """

    def describe(picture: Image.Image) -> str:
        width, height, orientation = _stored(picture)
        if orientation < 5:
            return ""
        return f" as shown (stored {width}x{height}, EXIF orientation {orientation})"

    try:
        return _read(Path(path), describe)
    except (OSError, ValueError):
        return ""


def check_pixels(width: int, height: int, where: str) -> None:
    """Raise if there are more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, which may be None.

    Args:
        width: In pixels.
        height: In pixels.
        where: What to call the picture in the message.

    Raises:
        ValueError: naming ``where``, the size and how to raise the limit.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{where}: expected at most {limit:,} pixels, got {width} x {height} = "
            f"{width * height:,}; {RAISE_LIMIT}"
        )


def _read(path: Path, take: Callable[[Image.Image], _T]) -> _T:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such image")
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: the image is too large ({error}); {RAISE_LIMIT}") from error
    except Exception as error:  # as in _named
        raise ValueError(f"{path}: the image is unreadable or truncated ({error})") from error
    with picture:
        check_pixels(*picture.size, str(path))
        return _named(str(path), picture, take)


def _named(where: str, picture: Image.Image, take: Callable[[Image.Image], _T]) -> _T:
    try:
        return take(picture)
    except _Refused as error:
        raise ValueError(f"{where}: {error}") from error
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # Pillow's decoders raise anything at all on a damaged file
        raise ValueError(f"{where}: the image is unreadable or truncated ({error})") from error


class _Refused(ValueError):
    """What is wrong with a picture that is not damaged."""


def _as_shown(picture: Image.Image) -> Image.Image:
    if not (picture.width and picture.height):
        raise _Refused(f"expected at least one pixel, got {picture.width} x {picture.height}")
    stored_as = _raw_mode(picture)
    _load(picture)
    # After loading: Pillow turns a TIFF itself then, and finds what stands behind a PNG's pixels.
    turn = _TURNS.get(_orientation(picture))
    shown = _rgb(picture, stored_as)
    if turn is not None:
        shown = shown.transpose(turn)
    # Else an orientation or a colour key that has been followed would be so once more.
    shown.info.clear()
    return shown


def _load(picture: Image.Image) -> None:
    name = getattr(picture, "filename", "")
    if getattr(picture, "tag_v2", {}).get(_ORIENTATION, 1) in (5, 6, 7, 8):
        # By its name Pillow maps an uncompressed TIFF, and a turned one with the shown width.
        picture.filename = ""  # type: ignore[attr-defined]
    try:
        picture.load()
    finally:
        if name:
            picture.filename = name  # type: ignore[attr-defined]


def _raw_mode(picture: Image.Image) -> str:
    """Return Pillow's name of the stored samples, such as ``RGB;16B``; empty once it has loaded."""
    tiles: Any = getattr(picture, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    if isinstance(arguments, tuple):
        arguments = arguments[0] if arguments else ""
    return arguments if isinstance(arguments, str) else ""


def _orientation(picture: Image.Image, *, header_only: bool = False) -> int:
    try:
        exif = Image.Image.getexif(picture) if header_only else picture.getexif()
        found = exif.get(_ORIENTATION, 1)
    except Exception:  # EXIF that is damaged says nothing
        return 1
    return found if found in _TURNS else 1


def _stored(picture: Image.Image) -> tuple[int, int, int]:
    """Return width and height as stored, and the orientation, from the header of an open file."""
    late = picture.format == "PNG" and "exif" not in picture.info and _text_after_pixels(picture)
    # Pillow decodes a PNG to look for EXIF behind its pixels; most have none there.
    orientation = _orientation(picture, header_only=not late)
    tags: Any = getattr(picture, "tag_v2", None)
    # Pillow turns a TIFF when it loads it, and gives the size before or after by version.
    width, height = (tags[_WIDTH], tags[_HEIGHT]) if tags else picture.size
    return width, height, orientation


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    width, height, orientation = _stored(picture)
    return (height, width) if orientation < 5 else (width, height)


def _text_after_pixels(picture: Image.Image) -> bool:
    with open(str(getattr(picture, "filename", "")), "rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in _TEXT_CHUNKS:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    return False


def _rgb(picture: Image.Image, stored_as: str) -> Image.Image:
    mode = picture.mode
    if mode in ("CMYK", "LAB"):
        return _through_profile(picture)
    if mode.startswith("I") or mode == "F":
        return _from_gray(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if mode in ("1", "L", "RGB") and "transparency" in picture.info:
        picture = picture.copy()
        picture.info["transparency"] = _colour_key(picture.info["transparency"], stored_as)
    if mode == "La":  # Pillow has no direct way to RGBA
        picture = picture.convert("LA")
    return _on_ground(picture.convert("RGBA"))


def _on_ground(picture: Image.Image) -> Image.Image:
    ground = Image.new("RGB", picture.size, GROUND)
    ground.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return ground


def _colour_key(key: Any, stored_as: str) -> Any:
    """Bring a PNG's transparent colour to 8 bits: Pillow does so with the pixels alone."""
    if isinstance(key, tuple):
        deep = stored_as == "RGB;16B" or (not stored_as and max(key) > 255)
        return tuple(value >> 8 if deep else value & 255 for value in key)
    if stored_as in ("L;2", "L;4"):
        most = 2 ** int(stored_as[-1]) - 1
        return (key & most) * (255 // most)
    return key & 255


def _through_profile(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    def transformed(profile: Any) -> Image.Image:
        intent: Any = ImageCms.getDefaultIntent(profile)
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(profile, srgb, picture.mode, "RGB", intent).apply(picture)

    try:
        own = ImageCms.ImageCmsProfile(BytesIO(picture.info.get("icc_profile", b"")))
        if own.profile.xcolor_space.strip().upper() == picture.mode:
            return transformed(own)
    except (ImageCms.PyCMSError, OSError, TypeError):
        pass  # a damaged one counts as none, as for any viewer
    if picture.mode == "CMYK":
        return picture.convert("RGB")
    return transformed(ImageCms.createProfile("LAB"))


def _from_gray(picture: Image.Image) -> Image.Image:
    """Bring gray of 12, 16 or 32 bits, or floats, to RGB."""
    values = np.asarray(picture)
    tags: Any = getattr(picture, "tag_v2", {})
    depth, signed = tags.get(_BITS, (0,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    if picture.mode == "I" and depth == 32 and not signed:
        values = values.view(np.uint32)  # Pillow keeps these bits in an int32
    elif picture.mode == "I" and depth == 16 and signed:
        values = values.astype(np.int16)
    elif picture.mode == "I" and picture.format in ("PNG", "PPM"):
        values = values.astype(np.uint16)  # no more bits are in such a file
    gray = values >> 4 if depth == 12 else _eight_bits(values)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds in 8 bits only
        gray = 255 - gray
    shown = Image.fromarray(gray.astype(np.uint8))
    key = picture.info.get("transparency")
    if key is None:
        return shown.convert("RGB")
    shown.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return _on_ground(shown.convert("RGBA"))


def _from_array(values: Samples) -> Image.Image:
    shape = values.shape
    if values.size == 0 or not (len(shape) == 2 or (len(shape) == 3 and 1 <= shape[2] <= 4)):
        turned = len(shape) == 3 and 1 <= shape[0] <= 4
        hint = "; move the channels to the end with numpy.moveaxis(image, 0, -1)" if turned else ""
        raise ValueError(
            "image: expected an array [H, W] or [H, W, C] of 1 to 4 channels with pixels, "
            f"got {list(shape)}{hint}"
        )
    if values.dtype.kind not in "buif":
        raise TypeError(f"image: expected an array of integers or floats, got {values.dtype}")
    try:
        samples = _eight_bits(values)
    except _Refused as error:
        raise ValueError(f"image: {error}") from error
    if len(shape) == 3 and shape[2] == 1:
        samples = samples[..., 0]
    return _as_shown(Image.fromarray(np.ascontiguousarray(samples)))


def _eight_bits(values: Samples) -> Samples:
    """Bring samples to uint8; booleans and unsigned integers of 8 and 16 bits span their range."""
    kind, size = values.dtype.kind, 8 * values.dtype.itemsize
    if kind == "f":
        return _floats_in_eight_bits(values)
    if kind == "b" or values.dtype == np.uint8:
        return values.astype(np.uint8) * np.uint8(255 if kind == "b" else 1)
    bits = size
    if values.dtype != np.uint16:
        whole = min(size, 32) - (kind == "i" and size <= 32)
        bits = _bits_of(int(values.min()), int(values.max()), whole, values.dtype)
    eight: Samples = (values >> max(bits - 8, 0)).astype(np.uint8)
    return eight


def _bits_of(least: int, most: int, whole: int, dtype: np.dtype[Any]) -> int:
    for bits in sorted({min(8, whole), min(16, whole), whole}):
        reached = bits <= 8 or most >= 2 ** (bits - 1)
        if least >= 0 and most < 2**bits:
            if reached:
                return bits
            break
    raise _Refused(
        f"expected {dtype} samples from 0 to 255, or such that reach more than half of 16 bits or "
        f"of the type's range, got {least} to {most}, which do not tell what is white; scale them "
        "to uint8 or uint16"
    )


def _floats_in_eight_bits(values: Samples) -> Samples:
    least, most = float(values.min()), float(values.max())
    if least >= 0:  # a NaN is not
        for white in (1, 255, 65535):
            if most <= white and (white == 1 or most > white / 2):
                eight: Samples = np.rint(values * values.dtype.type(255 / white)).astype(np.uint8)
                return eight
    raise _Refused(
        "expected float samples from 0 to 1 (white), or such that reach more than half of 255 or "
        f"65535, got {least:.6g} to {most:.6g}; clip and scale them to 0..1"
    )
