"""A segmenter's maps kept on disk, so that an image is segmented once for all runs and workers."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from collavo import writing
from collavo._arguments import expect_like, expect_path
from collavo.panoptic.images import ImageInput, read_image
from collavo.panoptic.maps import PanopticMap, PathLike

# Part of every key: a change of what is stored, or of how keys are made, leaves old files unread.
_FORMAT = 1
_FIELDS = ("segmentation", "segment_ids", "segment_classes")
_DAMAGED = (
    OSError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class CachedSegmenter:
    """A segmenter that looks on disk first; itself a segmenter, for any number of workers.

    A map is found again by the size and pixels of the image as shown and by the segmenter's
    settings, never by a file's name. The settings are asked for at every call, so a changed
    threshold or weight never gets an old map. Files lie in subfolders named by the first two digits
    of the key (``folder/3f/3f09....npz``) and hold plain arrays; a file is written beside its place
    and then renamed, so no reader sees half of one. What cannot be read is computed again and
    replaced, and what cannot be written is returned all the same, each with a warning. A writer
    that is killed leaves a ``.tmp`` file that nobody reads; such files may be deleted while nothing
    writes to the folder.

    Args:
        segmenter: Takes an RGB image and returns what ``PanopticMap.from_segmenter`` understands.
        folder: Where the maps are kept; it is made when the first is written.
        settings: A JSON-serialisable mapping or a string that changes whenever the segmenter would
            give other maps. Needed where the segmenter has no ``settings`` of its own; otherwise
            it is added to them.

    Raises:
        ValueError: if no settings are known or they cannot be stored as JSON, or the folder is a
            file.

    Example:
        >>> import tempfile
        >>> def left_half_is_a_horse(image):
        ...     ids = torch.zeros(image.height, image.width, dtype=torch.int32)
        ...     ids[:, : image.width // 2] = 1
        ...     return PanopticMap.from_segments(ids, [1], [17])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cached = CachedSegmenter(left_half_is_a_horse, folder, settings="left half, v1")
        ...     maps = [cached(Image.new("RGB", (4, 2))) for _ in range(3)]
        >>> cached.hits, cached.misses, maps[2].segmentation.tolist()
        (2, 1, [[1, 1, 0, 0], [1, 1, 0, 0]])
    """

    def __init__(
        self,
        segmenter: Callable[[Image.Image], object],
        folder: PathLike,
        *,
        settings: Mapping[str, Any] | str | None = None,
    ) -> None:
        expect_like("segmenter", segmenter, "a segmenter", has=("__call__",))
        expect_path("folder", folder, "the cache's folder")
        self.segmenter = segmenter
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder: expected a folder or nothing there yet, got {self.folder}")
        self._settings = settings
        self._settings_json()
        self.hits = 0
        self.misses = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the keys are made of besides the image: the segmenter's settings and the user's."""
        return {
            "segmenter": getattr(self.segmenter, "settings", None),
            "settings": self._settings,
        }

    def __call__(self, image: ImageInput) -> PanopticMap:
        """Return the map of an image, from disk or from the segmenter.

        Args:
            image: As :func:`~collavo.panoptic.read_image` takes it; what that returns is what the
                segmenter sees and the key is made of.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[ImageInput]) -> list[PanopticMap]:
        """Return the maps of several images; the segmenter gets those that are not on disk.

        It gets them together if it has a ``batch`` of its own.

        Args:
            images: As in a call.
        """
        settings = self._settings_json()
        pictures = [read_image(image) for image in images]
        keys = [_key(picture, settings) for picture in pictures]
        maps: dict[str, PanopticMap] = {}
        missing: dict[str, Image.Image] = {}
        for key, picture in zip(keys, pictures, strict=True):
            known = key in maps or key in missing
            found = None if known else self._read(key)
            if known or found is not None:
                self.hits += 1
            else:
                self.misses += 1
                missing[key] = picture
            if found is not None:
                maps[key] = found
        if maps:  # kept by a version that did not say with which settings, perhaps
            with suppress(OSError):
                self._note(settings)
        for key, panoptic in zip(missing, self._segment(list(missing.values())), strict=True):
            self._write(key, panoptic, settings)
            maps[key] = panoptic
        return [maps[key] for key in keys]

    def _segment(self, images: Sequence[Image.Image]) -> list[PanopticMap]:
        together = getattr(self.segmenter, "batch", None)
        if together is None:
            return [PanopticMap.from_segmenter(self.segmenter, image) for image in images]
        results = list(together(images)) if images else []
        if len(results) != len(images):
            raise ValueError(
                f"segmenter: expected its batch of {len(images)} images to give as many maps, "
                f"got {len(results)}"
            )
        return [
            one if isinstance(one, PanopticMap) else PanopticMap.from_result(one) for one in results
        ]

    def _settings_json(self) -> str:
        settings = self.settings
        if settings["segmenter"] is None and settings["settings"] is None:
            raise ValueError(
                "settings: expected a mapping or a string, because the segmenter has no settings "
                "of its own; without them a map of an earlier model or threshold would be returned"
            )
        try:
            return json.dumps({**settings, "format": _FORMAT}, sort_keys=True, default=_as_dict)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"settings: expected what JSON can store, so that runs can compare it, got {error}"
            ) from error

    def _read(self, key: str) -> PanopticMap | None:
        try:
            return _read(self.folder, key)
        except _DAMAGED as error:
            warnings.warn(
                f"{_path(self.folder, key)}: the cached map is unreadable and is made again "
                f"({error})",
                stacklevel=4,
            )
            return None

    def _write(self, key: str, panoptic: PanopticMap, settings: str) -> None:
        path = _path(self.folder, key)
        arrays: dict[str, Any] = {name: getattr(panoptic, name).numpy() for name in _FIELDS}
        content = BytesIO()
        np.savez_compressed(content, key=np.array(key), **arrays)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Every write has a name of its own: two workers with the same image both succeed, and
            # the later rename wins. What a power failure damages is made again.
            writing.write_file(path, content.getvalue(), sync=False)
            self._note(settings)
        except OSError as error:
            # A run of hours does not end because its cache is full.
            warnings.warn(
                f"{self.folder}: a map could not be kept there and will be made again ({error})",
                stacklevel=4,
            )

    def _note(self, settings: str) -> None:
        """Say in the folder with which settings its maps were made."""
        facts = _facts(self.folder, settings)
        if not facts.exists():
            writing.write_file(facts, settings.encode(), sync=False)


class CachedMaps:
    """The maps that a ``CachedSegmenter`` has kept, read without its segmenter.

    Args:
        folder: In which one segmenter, with one choice of settings, has kept its maps.

    Raises:
        FileNotFoundError: if there is no such folder, or no map in it.
        ValueError: if maps of several settings lie there.

    Example:
        >>> import tempfile
        >>> def nothing(image):
        ...     ids = torch.zeros(image.height, image.width, dtype=torch.int32)
        ...     return PanopticMap.from_segments(ids, [], [])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = CachedSegmenter(nothing, folder, settings="nothing, v1")(Image.new("L", (4, 2)))
        ...     maps = CachedMaps(folder)
        ...     maps(Image.new("L", (4, 2))) is None, maps(Image.new("L", (2, 4))) is None
        (False, True)
    """

    def __init__(self, folder: PathLike) -> None:
        expect_path("folder", folder, "a folder of a CachedSegmenter")
        self.folder = Path(folder)
        found = sorted(self.folder.glob("settings-*.json"))
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: expected maps that a CachedSegmenter of this version has kept, "
                "found none"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.folder}: expected maps of one segmenter and its settings, found those of "
                f"{len(found)}; keep each in a folder of its own"
            )
        self._settings = found[0].read_text(encoding="utf-8")

    def fingerprint(self) -> str:
        """Return what differs where the maps are of another segmenter or other settings."""
        return _digest(self._settings)

    def __call__(self, image: ImageInput) -> PanopticMap | None:
        """Return the map of an image, or None if none is kept.

        Args:
            image: As ``CachedSegmenter`` takes it.

        Raises:
            ValueError: naming the file, if the map is unreadable.
        """
        key = _key(read_image(image), self._settings)
        try:
            return _read(self.folder, key)
        except _DAMAGED as error:
            raise ValueError(
                f"{_path(self.folder, key)}: the cached map is unreadable ({error}); remove it, "
                "and let the segmenter make it again"
            ) from error


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.npz"


def _facts(folder: Path, settings: str) -> Path:
    """Return the file that says with which settings maps were made."""
    return folder / f"settings-{_digest(settings)}.json"


def _digest(settings: str) -> str:
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _read(folder: Path, key: str) -> PanopticMap | None:
    path = _path(folder, key)
    try:
        # Opened here: NumPy leaves the file open where it is no zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                raise ValueError("it belongs to another image or other settings")
            return PanopticMap(*(torch.from_numpy(stored[name]) for name in _FIELDS))
    except FileNotFoundError:
        return None


def _key(image: Image.Image, settings: str) -> str:
    sha = hashlib.sha256()
    header = json.dumps([settings, image.mode, image.size])
    sha.update(header.encode())
    sha.update(image.tobytes())
    return sha.hexdigest()


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
