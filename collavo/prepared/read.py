"""Prepared data sets: crayon rows and instructions from shards, without opening a PNG."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from collavo._arguments import expect_path
from collavo.panoptic.coco import check_sizes
from collavo.panoptic.file_names import FileNames, inner_name
from collavo.panoptic.images import read_image
from collavo.panoptic.instructions import Instruction
from collavo.panoptic.maps import PathLike
from collavo.prepared.shards import MANIFEST, PrepareSettings, Shard, read_manifest
from collavo_kernels import CrayonMap

_OPEN_SHARDS = 32


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """One image with its crayon and its instructions.

    Args:
        path: The image's file; it is not opened before it is asked for.
        image_id: COCO's number of the image.
        size: Height and width of the image in pixels.
        crayon: Rows and cells of this image alone.
        instructions: All there are; none for an image without any visible object.
    """

    path: Path
    image_id: int
    size: tuple[int, int]
    crayon: CrayonMap
    instructions: tuple[Instruction, ...]

    def image(self) -> Image.Image:
        """Read the image as :func:`~collavo.panoptic.read_image` does.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if it is unreadable or of another size than its map was.
        """
        image = read_image(self.path)
        where = f"{self.path.name} (prepared)"
        check_sizes(self.size, where, (image.height, image.width), self.path)
        return image


class PreparedDataset(Dataset[PreparedSample]):
    """What ``collavo prepare`` made of a COCO panoptic folder, in the order of its JSON.

    Shards are opened when a sample of theirs is asked for, a few at a time, and of these only the
    sample's own bytes are read. It can be pickled and used by any number of workers.

    Its crayons fit a processor of the same grid, reduction, largest number and padding alone.
    ``CollavoTrainer`` and ``collavo train`` check that; elsewhere call :meth:`check_processor`
    once, since a single crayon does not tell of which grid it is.

    Args:
        folder: That ``collavo prepare`` wrote.
        images: Folder of the images; None leaves samples' paths relative to it.

    Raises:
        FileNotFoundError: naming what is missing: the folder's JSON, a shard, the images' folder.
        ValueError: naming the file, if preparing was not finished or a shard is truncated.
    """

    def __init__(self, folder: PathLike, images: PathLike | None = None) -> None:
        expect_path("folder", folder, "a prepared folder")
        self.folder = Path(folder)
        self.images = None if images is None else Path(images)
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"images: there is no folder {self.images}")
        path = self.folder / MANIFEST
        manifest = read_manifest(path)
        if not manifest["complete"]:
            raise ValueError(
                f"{path}: preparing was not finished; run the same collavo prepare again, which "
                "goes on where it stopped"
            )
        self.settings = _settings(path, manifest)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        shards = [Shard(self.folder, i) for i in range(int(manifest["counts"]["shards"]))]
        self._starts = [0, *accumulate(len(shard) for shard in shards)]
        if self._starts[-1] != manifest["counts"]["images"]:
            raise ValueError(
                f"{path}: expected {manifest['counts']['images']} images in the shards, "
                f"got {self._starts[-1]}"
            )
        self._num_objects = np.concatenate([shard.num_objects.numpy() for shard in shards])
        self._names: FileNames | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files stay behind; a worker opens its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[PreparedSample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PreparedSample:
        """Return one sample; its image is not opened yet.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such sample.
            FileNotFoundError: naming the shard that has gone.
            ValueError: naming the shard that is damaged or names a file outside of the folder.
        """
        shard, place = self._find(index)
        line = shard.image(place)
        name = inner_name(line.file_name, f"{shard.lines}: file_name")
        path = Path(name) if self.images is None else self.images / name
        size = (line.height, line.width)
        return PreparedSample(path, line.image_id, size, shard.crayon(place), line.instructions)

    def crayon(self, index: int) -> CrayonMap:
        """Return one image's rows and cells alone.

        Args:
            index: 0..len-1, or counted from the end.

        Raises:
            IndexError: if there is no such sample.
        """
        shard, place = self._find(index)
        return shard.crayon(place)

    def num_segments(self, index: int) -> int:
        """Return how many visible segments of a known class an image has: what can be asked about.

        Args:
            index: 0..len-1, or counted from the end.
        """
        return int(self._num_objects[index])

    def file_name(self, index: int) -> str:
        """Return the file name of a sample's image, as the JSON has it.

        Args:
            index: 0..len-1, or counted from the end.
        """
        shard, place = self._find(index)
        return shard.file_names[place]

    def index_of(self, file_name: PathLike) -> int | None:
        """Return the index of the sample whose image a name or path means, or None.

        Args:
            file_name: As of ``CocoPanopticDataset.index_of``.

        Raises:
            ValueError: naming both, if two images fit alike.
        """
        if self._names is None:
            shards = (self._shard(number) for number in range(len(self._starts) - 1))
            names = (name for shard in shards for name in shard.file_names)
            self._names = FileNames(names, str(self.folder))
        return self._names.best(Path(file_name))

    def check_crayon(
        self, *, grid: tuple[int, int], max_number: int, reduce: str, image_mode: str = "squash"
    ) -> None:
        """Raise unless the crayons were made as a processor would make them.

        Args:
            grid: Height and width of the processor's grid.
            max_number: Its largest instance number.
            reduce: Its reduction.
            image_mode: What it makes of a picture.

        Raises:
            ValueError: naming the setting that differs.
        """
        wanted: dict[str, Any] = {"grid": tuple(grid), "max_number": max_number, "reduce": reduce}
        wanted["image_mode"] = image_mode
        if image_mode not in ("squash", "pad"):
            raise ValueError(
                f"{self.folder}: was prepared for processors that show all of an image, this one "
                f"has image_mode {image_mode!r}; name the maps themselves (CocoPanopticDataset; on "
                "the command line --panoptic and --annotations in the place of --prepared)"
            )
        for name, value in wanted.items():
            there = getattr(self.settings, name)
            if there != value:
                raise ValueError(
                    f"{self.folder}: was prepared with {name} {there!r}, the processor has "
                    f"{value!r}; prepare the images with the processor's {name}"
                )

    def check_processor(self, processor: Any) -> None:
        """Raise unless the crayons are those that a processor would make.

        Args:
            processor: A ``CollavoProcessor``.

        Raises:
            ValueError: naming the setting that differs.
        """
        self.check_crayon(
            grid=processor.grid,
            max_number=processor.max_number,
            reduce=processor.reduce,
            image_mode=processor.image_mode,
        )

    def _find(self, index: int) -> tuple[Shard, int]:
        position = range(len(self))[index]
        number = bisect_right(self._starts, position) - 1
        return self._shard(number), position - self._starts[number]

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.folder, number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard


def _settings(path: Path, manifest: dict[str, Any]) -> PrepareSettings:
    try:
        return PrepareSettings.from_json(manifest["settings"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its settings are none of collavo prepare ({error})") from error
