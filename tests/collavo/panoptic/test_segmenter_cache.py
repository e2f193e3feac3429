"""Maps on disk: found again only for the same image and settings, whatever happens to the files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import warnings

import numpy as np
import pytest
import torch
from cache_worker import by_brightness, die_while_writing, hammer, picture, same
from PIL import Image
from tiny_segmenters import save

from collavo.panoptic import CachedMaps, CachedSegmenter, PanopticMap, TransformersSegmenter

PICTURE = picture(0)


@pytest.fixture
def counted():
    """A segmenter that remembers what it was asked."""
    seen = []

    def segmenter(image):
        seen.append(image)
        return by_brightness(image)

    segmenter.seen = seen
    return segmenter


def files(folder, pattern="*/*"):
    return sorted(folder.glob(pattern))


@pytest.mark.filterwarnings("error")
def test_a_map_is_made_once(tmp_path, counted):
    folder = tmp_path / "not" / "yet" / "there"
    cached = CachedSegmenter(counted, folder, settings="v1")
    first, second = cached(PICTURE), cached(PICTURE)
    assert len(counted.seen) == 1 and (cached.hits, cached.misses) == (1, 1)
    assert same(first, by_brightness(PICTURE)) and same(second, first)
    second.segmentation.fill_(0)  # the caller's own, and writable
    another = CachedSegmenter(counted, folder, settings="v1")  # another run
    assert same(another(PICTURE), first) and (another.hits, another.misses) == (1, 0)
    (path,) = files(folder)
    assert path.suffix == ".npz" and len(path.stem) == 64 and path.parent.name == path.stem[:2]
    with np.load(path, allow_pickle=False) as stored:
        assert sorted(stored) == ["key", "segment_classes", "segment_ids", "segmentation"]


def test_colours_and_results_of_transformers_are_kept(tmp_path):
    colours = torch.randint(0, 256, (3, 4, 3), dtype=torch.uint8)
    scene = PanopticMap.from_segments(colours, [2**24 - 1, 5], [-1, 132])
    cached = CachedSegmenter(lambda _: scene, tmp_path, settings="colours")
    assert same(cached(PICTURE), scene) and same(cached(PICTURE), scene)
    result = {"segmentation": torch.full((2, 2), -1.0), "segments_info": []}
    cached = CachedSegmenter(lambda _: result, tmp_path, settings="nothing found")
    assert cached(PICTURE).num_segments == cached(PICTURE).num_segments == 0
    with pytest.raises(TypeError, match="segmenter: expected a PanopticMap or a mapping"):
        CachedSegmenter(lambda _: None, tmp_path, settings="no map")(PICTURE)


def test_the_key_is_what_the_segmenter_sees(tmp_path, counted):
    """Mode, size and every pixel; neither a file's name nor how it was compressed."""
    cached = CachedSegmenter(counted, tmp_path / "maps", settings="v1")
    cached(PICTURE)
    for name in ("a.png", "b.bmp"):
        PICTURE.save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            cached(image)
    assert cached.misses == 1
    changed = PICTURE.copy()
    changed.putpixel((5, 4), tuple(255 - one for one in PICTURE.getpixel((5, 4))))
    turned = Image.frombytes("RGB", PICTURE.size[::-1], PICTURE.tobytes())
    grey = PICTURE.convert("L")
    for number, image in enumerate((changed, turned, grey), start=2):
        assert same(cached(image), by_brightness(image.convert("RGB")))
        assert cached.misses == number
    # Equal indices in two palettes are two images, and the segmenter sees colours.
    for number, palette in enumerate((b"\1\2\3", b"\4\5\6"), start=5):
        image = Image.new("P", (3, 3))
        image.putpalette(palette)
        cached(image)
        assert cached.misses == number and counted.seen[-1].mode == "RGB"


def test_settings_divide_maps(tmp_path, counted):
    own = by_brightness
    settings = [
        "v1", "v2", {"threshold": 0.5}, {"threshold": 0.25}, {"threshold": 0.5, "grid": [3, 4]},
        {"grid": (4, 3), "threshold": 0.5}, {"v1": None},
    ]  # fmt: skip
    for one in settings:
        CachedSegmenter(own, tmp_path, settings=one)(PICTURE)
    assert len(files(tmp_path)) == len(settings)
    order = CachedSegmenter(own, tmp_path, settings={"threshold": 0.5, "grid": (4, 3)})
    order(PICTURE)
    assert (order.hits, order.misses) == (1, 0), "the order of a mapping says nothing"
    counted.settings = {"weights": 1}
    cached = CachedSegmenter(counted, tmp_path)
    cached(PICTURE)
    counted.settings["weights"] = 2  # asked for at every call
    cached(PICTURE)
    CachedSegmenter(counted, tmp_path, settings="and the user's")(PICTURE)
    assert len(files(tmp_path)) == len(settings) + 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "settings: expected a mapping or a string, because the segmenter has no settings"),
        ({"model": object()}, "settings: expected what JSON can store.*object is not JSON"),
        ({"grid": torch.ones(2)}, "settings: expected what JSON can store.*Tensor"),
        ({1: 2, "a": 3}, "settings: expected what JSON can store"),
    ],
)
def test_settings_are_needed(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CachedSegmenter(by_brightness, tmp_path, settings=settings)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "maps").write_text("")
    with pytest.raises(ValueError, match="folder: expected a folder or nothing there yet, got"):
        CachedSegmenter(by_brightness, tmp_path / "maps", settings="v1")


def test_a_batch_asks_for_what_is_missing(tmp_path, counted):
    """Each missing image once, together where the segmenter can; the order stays."""
    images = [picture(seed) for seed in (1, 2, 1, 3)]
    cached = CachedSegmenter(counted, tmp_path, settings="v1")
    cached(images[1])
    found = cached.batch(images)
    assert all(same(one, by_brightness(image)) for one, image in zip(found, images, strict=True))
    assert len(counted.seen) == 3 and (cached.hits, cached.misses) == (2, 3)
    asked = []
    counted.batch = lambda group: asked.append(len(group)) or [by_brightness(i) for i in group]
    cached.batch([picture(4), *images, picture(5)])
    cached.batch(images)
    assert asked == [2] and cached.batch([]) == []
    counted.batch = lambda group: []
    with pytest.raises(ValueError, match="batch of 1 images to give as many maps, got 0"):
        cached(picture(6))


def test_damaged_files_are_made_again(tmp_path, counted):
    """Cut anywhere or with any byte changed: the right map comes, and a good file with it."""
    cached = CachedSegmenter(counted, tmp_path, settings="v1")
    expected = cached(PICTURE)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    cuts = [content[:length] for length in range(0, len(content), 37)]
    flipped = [
        content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]
        for i in range(0, len(content), 11)
    ]
    for damaged in (*cuts, *flipped):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = cached.misses
            assert same(cached(PICTURE), expected)
        told = [str(one.message) for one in caught]
        assert len(told) == cached.misses - before, "every file that is made again is told of"
        assert all(str(path) in one and "is made again" in one for one in told)
        if damaged in cuts:
            assert told
        if told:
            assert path.read_bytes() == content
    assert files(tmp_path) == [path]


def foreign(kind, path, others):
    if kind == "another image's":
        path.write_bytes(others.read_bytes())
    elif kind == "a pickle":
        path.write_bytes(pickle.dumps({"segmentation": 1}))
    elif kind == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "objects":
        with path.open("wb") as file:
            np.savez(file, key=np.array([{}], dtype=object))
    else:
        arrays = dict(np.load(path))
        arrays["segment_classes"] = arrays["segment_classes"] + 500
        with path.open("wb") as file:
            np.savez(file, **arrays)


@pytest.mark.parametrize(
    "kind", ["another image's", "a pickle", "an array", "objects", "no panoptic map"]
)
def test_foreign_files_are_replaced(tmp_path, kind):
    cached = CachedSegmenter(by_brightness, tmp_path, settings="v1")
    cached(PICTURE)
    (path,) = files(tmp_path)
    cached(picture(1))
    others = next(one for one in files(tmp_path) if one != path)
    foreign(kind, path, others)
    with pytest.warns(UserWarning, match=f"{path.name}: the cached map is unreadable"):
        assert same(cached(PICTURE), by_brightness(PICTURE))
    assert same(cached(PICTURE), by_brightness(PICTURE)) and cached.hits == 1


def test_a_failed_write_leaves_nothing_and_loses_nothing(tmp_path, monkeypatch):
    """A full cache must not end a run of hours."""

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", full)
    cached = CachedSegmenter(by_brightness, tmp_path, settings="v1")
    with pytest.warns(UserWarning, match=rf"{tmp_path}: a map could not be kept.*no space left"):
        assert same(cached(PICTURE), by_brightness(PICTURE))
    assert files(tmp_path) == []
    monkeypatch.undo()
    assert same(cached(PICTURE), cached(PICTURE)) and (cached.hits, cached.misses) == (1, 2)


def processes():
    # A server that has imported the package forks each process: started at once, no shared locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cache_worker"])
    return context


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked by a server")
@pytest.mark.parametrize("vandal", [False, True])
def test_several_processes_share_a_folder(tmp_path, vandal):
    """Four processes, the same four images; with a vandal, files are cut while others read."""
    context = processes()
    barrier, results = context.Barrier(4), context.Queue()
    workers = [
        context.Process(
            target=hammer, args=(str(tmp_path), seed, barrier, results, vandal and seed == 0)
        )
        for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    told = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert all(wrong == 0 and hits + misses == 120 for wrong, hits, misses in told)
    assert sum(misses for _, _, misses in told) >= 4
    if not vandal:
        assert sum(misses for _, _, misses in told) <= 16, "at most once per process and image"
    assert {path.suffix for path in files(tmp_path)} == {".npz"}, "no temporary file is left"
    assert len(files(tmp_path)) == 4
    warnings.simplefilter("ignore")
    for seed in range(4):
        cached = CachedSegmenter(by_brightness, tmp_path, settings="brightness")
        assert same(cached(picture(seed)), by_brightness(picture(seed)))


@pytest.mark.filterwarnings("error")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked by a server")
def test_a_killed_writer_leaves_what_nobody_reads(tmp_path):
    worker = processes().Process(target=die_while_writing, args=(str(tmp_path),))
    worker.start()
    worker.join(timeout=120)
    assert worker.exitcode == -signal.SIGKILL
    (left,) = files(tmp_path)
    assert left.suffix == ".tmp" and left.stat().st_size > 0
    cached = CachedSegmenter(by_brightness, tmp_path, settings="brightness")
    assert same(cached(PICTURE), cached(PICTURE)) and (cached.hits, cached.misses) == (1, 1)
    assert len(files(tmp_path, "*/*.npz")) == 1 and left in files(tmp_path)


def test_it_travels_to_workers(tmp_path):
    cached = CachedSegmenter(by_brightness, tmp_path, settings="v1")
    cached(PICTURE)
    again = pickle.loads(pickle.dumps(cached))
    assert same(again(PICTURE), by_brightness(PICTURE)) and again.hits == 1


def test_no_threshold_and_no_weight_gets_an_old_map(tmp_path):
    """A model of transformers tells its settings itself, weights included."""
    pytest.importorskip("scipy", reason="transformers' panoptic models need scipy")
    folder = save("maskformer", tmp_path / "model")

    def loaded():
        kwargs = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_threshold": 0.0}
        return TransformersSegmenter.from_pretrained(folder, grid=(6, 9), **kwargs)

    segmenter = loaded()
    cached = CachedSegmenter(segmenter, tmp_path / "maps")
    first = cached(PICTURE)
    segmenter.threshold = 0.999
    assert cached(PICTURE).num_segments == 0 and cached.misses == 2
    segmenter.threshold = 0.0
    weight = segmenter.model.class_predictor.bias
    with torch.no_grad():
        weight[7] += 100
    assert set(cached(PICTURE).segment_classes.tolist()) == {7} and cached.misses == 3
    segmenter.grid = None
    assert cached(PICTURE).size == (5, 6) and cached.misses == 4
    # A later run, with the model as it was: no forward is needed.
    fresh = loaded()
    fresh.model.forward = None
    again = CachedSegmenter(fresh, tmp_path / "maps")
    assert same(again(PICTURE), first) and (again.hits, again.misses) == (1, 0)


@pytest.mark.filterwarnings("error")
def test_maps_without_their_segmenter(tmp_path, counted):
    """Training reads what a segmenter has kept; an image that it has not seen has no map."""
    with pytest.raises(FileNotFoundError, match="expected maps that a CachedSegmenter of this"):
        CachedMaps(tmp_path)
    cached = CachedSegmenter(counted, tmp_path, settings="v1")
    made = cached(PICTURE)
    maps = pickle.loads(pickle.dumps(CachedMaps(tmp_path)))
    assert same(maps(PICTURE), made) and maps(picture(1)) is None and len(counted.seen) == 1
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"npz: the cached map is unreadable .* remove it, and"):
        maps(PICTURE)
    CachedSegmenter(counted, tmp_path, settings="v2")(PICTURE)
    with pytest.raises(ValueError, match="of one segmenter and its settings, found those of 2"):
        CachedMaps(tmp_path)


def test_a_folder_of_an_older_version_is_told_its_settings(tmp_path, counted):
    """One look at what is kept is enough: no map has to be made again."""
    made = CachedSegmenter(counted, tmp_path, settings="v1")(PICTURE)
    (facts,) = files(tmp_path, "settings-*.json")
    facts.unlink()
    CachedSegmenter(counted, tmp_path, settings="v1")(PICTURE)
    assert same(CachedMaps(tmp_path)(PICTURE), made) and len(counted.seen) == 1
