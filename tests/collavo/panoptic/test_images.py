"""Pictures as a viewer shows them; random files are in tests/fuzz/fuzz_pictures.py."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms, ImageOps
from transformers.image_utils import load_image

from collavo.cli import main
from collavo.panoptic import CachedSegmenter, CocoPanopticDataset, PanopticMap, read_image
from collavo.panoptic.images import read_image_size
from collavo.train import ConversationDataset
from tests.fuzz.picture_files import cmyk_profile, exif_bytes, png_bytes

TURNS = [
    [[1, 2, 3], [4, 5, 6]], [[3, 2, 1], [6, 5, 4]], [[6, 5, 4], [3, 2, 1]], [[4, 5, 6], [1, 2, 3]],
    [[1, 4], [2, 5], [3, 6]], [[4, 1], [5, 2], [6, 3]], [[6, 3], [5, 2], [4, 1]],
    [[3, 6], [2, 5], [1, 4]],
]  # fmt: skip
"""What a picture of two lines, 1 2 3 and 4 5 6, is by each of EXIF's orientations 1 to 8."""


def gray(pixels):
    return np.asarray(pixels)[..., 0].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", "late.png"])
def test_orientations(tmp_path, orientation, suffix):
    """Every orientation, by hand; what stands behind a PNG's pixels counts as well."""
    stored = np.array(TURNS[0], dtype=np.uint8)
    path = tmp_path / f"picture{suffix}"
    exif = exif_bytes(orientation)
    if suffix == "late.png":
        path.write_bytes(png_bytes(stored[..., None], 8, 0, exif=exif, exif_late=True))
    else:
        image = Image.fromarray(np.repeat(stored[..., None], 3, -1))
        image.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    read = read_image(path)
    assert gray(read) == TURNS[orientation - 1]
    assert gray(read_image(Image.open(path))) == gray(load_image(str(path))) == gray(read)
    assert read_image_size(path) == (read.height, read.width)
    # Read twice, or turned by its user before: not turned once more.
    assert gray(read_image(read)) == gray(read)
    assert gray(read_image(ImageOps.exif_transpose(Image.open(path)))) == gray(read)
    assert gray(read_image(Image.open(path).convert("RGB"))) == gray(read)


def test_a_turned_tiff_without_compression(tmp_path):
    """Pillow maps such a file with the lines as long as they are shown, not as they are stored."""
    path = tmp_path / "scan.tif"
    Image.fromarray(np.array(TURNS[0], dtype=np.uint8)).save(path, exif=exif_bytes(6))
    assert gray(read_image(path)) == TURNS[5] == gray(read_image(Image.open(path)))


@pytest.mark.parametrize("damage", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"nonsense"])
def test_exif_that_is_damaged_says_nothing(tmp_path, damage):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (6, 4), (9, 9, 9)).save(path, exif=damage)
    assert read_image(path).size == (6, 4) and read_image_size(path) == (4, 6)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "array"])
def test_16_bits_show_their_upper_8(tmp_path, kind):
    ramp = np.linspace(0, 65535, 800).reshape(20, 40).astype(np.uint16)
    path = tmp_path / f"ramp.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5 40 20 65535 " + ramp.astype(">u2").tobytes())
    elif kind != "array":
        Image.fromarray(ramp).save(path)
    read = read_image(ramp if kind == "array" else path)
    assert (np.asarray(read) == (ramp >> 8)[..., None]).all()


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    """Where the format tells the range, the values do not: all these pixels are black."""
    path = tmp_path / "dark.pgm"
    path.write_bytes(b"P5 2 1 65535 " + np.array([255, 9], dtype=">u2").tobytes())
    assert gray(read_image(path)) == [[0, 0]]
    assert gray(read_image(np.array([[255, 9]], dtype=np.uint16))) == [[0, 0]]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [[0, 128, 255]]),
        (np.array([[0.0, 64.0, 255.0]], np.float64), [[0, 64, 255]]),
        (np.array([[0, 64, 255]], np.int64), [[0, 64, 255]]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [[0, 128, 255]]),
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), [[0, 128, 255]]),
        (np.array([[0, 16384, 32767]], np.int16), [[0, 128, 255]]),
        (np.array([[True, False]]), [[255, 0]]),
    ],
)
def test_samples_that_tell_their_white(values, shown):
    assert gray(read_image(values)) == shown
    if values.dtype in (np.float32, np.int32):
        assert gray(read_image(Image.fromarray(values))) == shown


@pytest.mark.parametrize(
    "values",
    [[[0.0, 80.0]], [[-0.5, 1.0]], [[0.0, np.nan]], [[0.0, np.inf]], [[0, 4095]], [[-1, 5]],
     [[0, 2**40]]],
)  # fmt: skip
def test_samples_that_do_not_tell_their_white_are_refused(tmp_path, values):
    """Metres, counts, labels: whichever white were guessed, some picture would come out black."""
    array = np.array(values)
    with pytest.raises(ValueError, match=r"image: expected .* samples .*; (clip and )?scale them"):
        read_image(array)
    path = tmp_path / "depth.tif"
    kind = np.float32 if array.dtype.kind == "f" else np.int32
    if np.abs(array).max() < 2**31 or kind == np.float32:
        Image.fromarray(array.astype(kind)).save(path)
        with pytest.raises(ValueError, match=r"depth\.tif: expected .* samples"):
            read_image(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"got \[3, 8, 8\]; move the channels to the end"),
        (np.zeros((8, 8, 5), np.uint8), r"expected an array \[H, W\] or \[H, W, C\]"),
        (np.zeros((0, 8), np.uint8), r"got \[0, 8\]"),
        (Image.new("RGB", (0, 5)), "image: expected at least one pixel, got 0 x 5"),
    ],
)
def test_no_picture(array, message):
    with pytest.raises(ValueError, match=message):
        read_image(array)


@pytest.mark.parametrize(
    "text", ["https://example.org/a.png", "data:image/png;base64," + "A" * 999]
)
def test_what_is_no_path_is_named(text):
    with pytest.raises(ValueError, match=r"image: expected the path of a file, got '(http|data)"):
        read_image(text)


@pytest.mark.parametrize("what", [np.zeros((4, 4), complex), 7, torch.zeros(4, 4)])
def test_wrong_types(what):
    with pytest.raises(TypeError, match="image: expected "):
        read_image(what)


def test_transparency_of_every_kind_lies_on_white(tmp_path):
    """Half red on white is pink; what is under clear pixels is not seen."""
    clear, half = (255, 255, 255), (255, 127, 127)
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    rgba.putpixel((0, 0), (0, 0, 255, 0))
    palette = rgba.convert("RGB").quantize(2)
    palette.info["transparency"] = bytes(
        0 if palette.getpixel((0, 0)) == index else 128 for index in range(2)
    )
    for image in (rgba, rgba.convert("RGBa"), palette):
        read = read_image(image)
        assert [read.getpixel((x, 0)) for x in (0, 1)] == [clear, half], image.mode
    assert read_image(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert read_image(np.array([[[0, 128]]], np.uint8)).getpixel((0, 0)) == (127, 127, 127)
    key = tmp_path / "key.gif"
    Image.fromarray(np.array([[0, 1]], np.uint8), "P").save(key, transparency=0)
    assert read_image(key).getpixel((0, 0)) == clear


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_a_transparent_gray_of_any_depth(tmp_path, depth):
    """Pillow brings pixels to 8 bits and leaves the transparent value as it is stored."""
    path = tmp_path / "key.png"
    samples = np.array([[[1], [2]]]) << max(depth - 8, 0)
    path.write_bytes(png_bytes(samples, depth, 0, clear=struct.pack(">H", samples[0, 1, 0])))
    assert gray(read_image(path)) == [[255 // (2**depth - 1) if depth < 16 else 1, 255]]


def test_cmyk_through_its_profile(tmp_path):
    """As LittleCMS itself; without a profile, or with another one's, as Pillow converts."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (4, 4, 4), dtype=np.uint8), "CMYK")
    profile = cmyk_profile(random.integers(60, 200, (2, 2, 2, 2, 3)))
    path = tmp_path / "print.jpg"
    image.save(path, icc_profile=profile, quality=95)
    expected = ImageCms.profileToProfile(
        Image.open(path),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
        renderingIntent=1,
    )
    assert (np.asarray(read_image(path)) == np.asarray(expected)).all()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    without_table = profile.replace(b"A2B0", b"B2A9")
    for other in (None, srgb, b"nonsense", profile[:200], without_table):
        image.save(path, quality=95, icc_profile=other)
        assert (np.asarray(read_image(path)) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (3, 2), (0, level, 0)) for level in (9, 99, 199)]
    for suffix in ("webp", "gif", "tif", "png"):
        path = tmp_path / f"frames.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(path).getpixel((0, 0)) == (0, 9, 0), suffix


def test_every_part_of_the_project_sees_the_same(tmp_path):
    """A photo of 16 bits, with alpha, on its side: what is read is what all others are given."""
    random = np.random.default_rng(0)
    path = tmp_path / "photo.png"
    samples = random.integers(0, 65536, (12, 18, 4))
    path.write_bytes(png_bytes(samples, 16, 6, exif=exif_bytes(6)))
    read = read_image(path)
    assert read.size == (12, 18)
    seen = []

    def segmenter(image):
        seen.append(image)
        return PanopticMap.empty(2, 2)

    with Image.open(path) as opened:
        PanopticMap.from_segmenter(segmenter, opened)
    CachedSegmenter(segmenter, tmp_path / "cache", settings="none")(path)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    record = {"image": path.name, "conversation": turns}
    seen += ConversationDataset([record], images=tmp_path)[0]["image"]
    assert [np.array_equal(np.asarray(one), np.asarray(read)) for one in seen] == [True] * 3
    processor = tiny.tiny_processor()
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is in this?"}]
    batches = [
        processor(images=images, text=processor.prompt("What is in this?"), return_tensors="pt")
        for images in (path, str(path), read, np.asarray(read), [Image.open(path)])
    ]
    batches.append(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    )
    for batch in batches:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])


def test_a_map_is_that_of_the_picture_as_shown(coco_folder):
    """A map of the stored picture is refused with both sizes; so is one handed to the processor."""
    image, png = coco_folder / "images" / "001.png", coco_folder / "panoptic" / "001.png"
    Image.open(image).save(image, exif=exif_bytes(8))
    data = CocoPanopticDataset(
        coco_folder / "images", coco_folder / "panoptic", coco_folder / "panoptic.json"
    )
    message = r"001\.png: the map is 16x12, its image .*001\.png is 12x16 as shown \(stored 16x12"
    with pytest.raises(ValueError, match=message):
        data[0]
    processor = tiny.tiny_processor()
    prompt = processor.prompt("What is in this?")
    with pytest.raises(ValueError, match=r"panoptic\[0\]: .* 16x12 lies on its side, .* 12x16"):
        processor(image, prompt, data.panoptic_map(0))
    Image.open(png).transpose(Image.Transpose.ROTATE_90).save(png)
    assert data[0].panoptic.size == (16, 12) and data[0].image.size == (12, 16)
    assert processor(image, prompt, data.panoptic_map(0))["crayon_class"]


@pytest.fixture
def few_pixels(monkeypatch):
    """Lower Pillow's limit, and put it back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)


def test_too_many_pixels_are_refused_with_the_way_out(coco_folder, few_pixels, capsys, tmp_path):
    way = "set PIL.Image.MAX_IMAGE_PIXELS"
    for width in (16, 60):  # over the limit, and over twice of it, where Pillow raises itself
        path = tmp_path / f"{width}.png"
        Image.new("RGB", (width, 12)).save(path)
        for read in (read_image, read_image_size):
            with (
                pytest.warns(Image.DecompressionBombWarning) if width == 16 else io.BytesIO(),
                pytest.raises(ValueError, match=rf"{width}\.png: .*pixels.*; to allow more, {way}"),
            ):
                read(path)
    words = ["show", "--image", str(coco_folder / "images" / "001.png")]
    words += ["--panoptic", str(coco_folder / "panoptic" / "001.png")]
    words += ["--annotations", str(coco_folder / "panoptic.json")]
    words += ["--output", str(tmp_path / "out.png")]
    with pytest.warns(Image.DecompressionBombWarning):
        assert main(words) == 2
    assert "--max-pixels" in capsys.readouterr().err
    assert main([*words, "--max-pixels", "2000000"]) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--panel-size", "30000"), "panel: expected at most 6306 pixels (--panel-size), got"),
        (("--grid", "30000"), "grid: expected at most 2000 cells per side in a picture"),
        (("--max-pixels", "0"), "--max-pixels: expected at least 1, got 0"),
    ],
)
def test_a_picture_too_large_to_draw(coco_folder, tmp_path, capsys, extra, message):
    """Before anything of that size is made: 30,000 pixels once took 21 GB."""
    words = ["show", "--image", str(coco_folder / "images" / "001.png")]
    words += ["--panoptic", str(coco_folder / "panoptic" / "001.png")]
    words += ["--annotations", str(coco_folder / "panoptic.json")]
    assert main([*words, "--output", str(tmp_path / "out.png"), *extra]) == 2
    assert message in capsys.readouterr().err
