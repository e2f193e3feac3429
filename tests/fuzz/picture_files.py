"""Picture files that Pillow does not write, byte by byte: PNG, TIFF, a CMYK profile, EXIF."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, Any]

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def exif_bytes(orientation: int) -> bytes:
    """Return EXIF that says how a picture is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_bytes(
    samples: Pixels,
    depth: int,
    kind: int,
    *,
    clear: bytes = b"",
    palette: bytes = b"",
    exif: bytes = b"",
    exif_late: bool = False,
) -> bytes:
    """Write a PNG.

    Args:
        samples: ``[H, W, C]``, integers of ``depth`` bits.
        depth: 1, 2, 4, 8 or 16.
        kind: PNG's colour type.
        clear: Content of tRNS.
        palette: Content of PLTE.
        exif: Content of eXIf.
        exif_late: Whether that stands behind the pixels.
    """
    height, width, channels = samples.shape
    assert channels == _CHANNELS[kind]
    rows = samples.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    elif depth == 8:
        lines = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bits = rows[..., None] >> np.arange(depth)[::-1] & 1
        packed = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
        lines = [row.tobytes() for row in packed]
    body = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    note = _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) if exif else b""
    body += b"" if exif_late else note
    body += _chunk(b"PLTE", palette) if palette else b""
    body += _chunk(b"tRNS", clear) if clear else b""
    body += _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    body += note if exif_late else b""
    return b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff_bytes(values: Pixels, *, white_is_zero: bool = False, orientation: int = 1) -> bytes:
    """Write gray samples ``[H, W]`` of any integer or float type as a TIFF of one strip."""
    height, width = values.shape
    order = "<" if values.dtype.byteorder != ">" else ">"
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.tobytes()
    tags = {
        256: width, 257: height, 258: 8 * values.dtype.itemsize, 259: 1,
        262: 0 if white_is_zero else 1, 273: 8, 274: orientation, 277: 1, 278: height,
        279: len(data), 339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def cmyk_profile(corners: Pixels) -> bytes:
    """Make an ICC profile of CMYK that has a Lab colour (8 bits) for each of its 16 corners.

    Args:
        corners: uint8 ``[2, 2, 2, 2, 3]``, by cyan, magenta, yellow and black.
    """
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix
    table += 4 * identity + corners.astype(np.uint8).tobytes() + 3 * identity
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"A2B0": table, b"wtpt": white}
    place, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        index += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I", place + len(body)) + bytes(4) + struct.pack(">I", 0x02400000)
    head += b"prtrCMYKLab " + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp"
    # Relative colorimetric: the perceptual intent would stretch the colours down to black.
    head += bytes(64 - len(head)) + struct.pack(">4I", 1, 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + index + body


def lab_to_srgb(lab: Pixels) -> Pixels:
    """Return the sRGB of CIE L*a*b* under D50, float64 ``[..., 3]`` in 0..255, clipped."""
    level = (lab[..., 0] + 16) / 116
    cubes = np.stack([level + lab[..., 1] / 500, level, level - lab[..., 2] / 200], -1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29))
    xyz = xyz * (0.9642, 1.0, 0.8249)
    linear = (
        xyz
        @ np.array(
            [
                [3.1338561, -1.6168667, -0.4906146],
                [-0.9787684, 1.9161415, 0.0334540],
                [0.0719453, -0.2289914, 1.4052427],
            ]
        ).T
    )
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
