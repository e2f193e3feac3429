"""Pictures and JSON entries that are wrong, each in one way, for the tests that meet them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from PIL import Image

from collavo.panoptic import write_panoptic_png


def raw_png(path: Path, width: int, height: int, depth: int = 8, kind: int = 2) -> None:
    """Write a PNG by hand, as Pillow would not: without pixels, or 16-bit RGB; all is zero."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = bytes(1 + width * channels * depth // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(row * height))
    body = chunk(b"IHDR", header) + data + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def break_map(path: Path, kind: str) -> None:
    """Put a map that cannot be used in the place of a good one of 16x12 pixels."""
    if kind == "truncated":
        write_panoptic_png(path, torch.randint(0, 2**24, (12, 16)))
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "no picture":
        path.write_text("not a picture")
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "JPEG":
        Image.new("RGB", (16, 12)).save(path, format="JPEG")
    elif kind == "16-bit RGB":
        raw_png(path, 16, 12, depth=16)
    elif kind == "no pixels":
        raw_png(path, 0, 12)
    elif kind == "too wide":
        raw_png(path, 33000, 2)
    elif kind == "other size":
        write_panoptic_png(path, torch.ones(12, 15, dtype=torch.int32))
    elif kind == "missing":
        path.unlink()
    else:
        Image.new(kind, (16, 12)).save(path)


BAD_MAPS = {
    "truncated": "the panoptic PNG is truncated or damaged",
    "no picture": "expected a PNG with a panoptic map, got another kind of file",
    "empty file": "expected a PNG with a panoptic map",
    "JPEG": "expected a PNG with a panoptic map",
    "P": "expected an 8-bit RGB PNG .*got 1-bit paletted",
    "L": "expected an 8-bit RGB PNG .*got 8-bit grayscale",
    "I;16": "expected an 8-bit RGB PNG .*got 16-bit grayscale",
    "16-bit RGB": "expected an 8-bit RGB PNG .*got 16-bit RGB",
    "RGBA": "expected an 8-bit RGB PNG .*got 8-bit RGBA",
    "no pixels": "expected a map with pixels, got 0x12",
    "too wide": "expected a map of at most 32767 pixels per side, got 33000x2",
    "other size": "the map is 15x12, its image .*001.png is 16x12",
    "missing": "there is no such panoptic PNG",
}
"""What is said about a map of every kind of ``break_map``."""
