"""The files of a prepared data set: settings, shards of crayon rows and instructions, a report.

``prepared.json`` has the format's version, the settings, the inputs' fingerprint and, once all is
done, the counts. Shard ``k`` has the images ``k n`` to ``(k + 1) n`` of the index, in order:

- ``shard-0000k.jsonl``, a line per image: ``image_id``, ``file_name``, ``width``, ``height`` and
  ``instructions`` (``template``, ``question``, ``answer``), or, first of all keys, ``skipped`` (the
  file or entry) and ``reason``.
- ``shard-0000k.safetensors``, written last: the fields of the ``CrayonMap`` of all images that were
  not skipped, and what finds one of them without reading the others.

Every file is written beside its place and then renamed, so that a file that is there is whole.
What is noticed of later damage: files that are missing or of another length, tensors without their
names or sizes, lines that are no JSON. Bytes that changed in place are not: there are no checksums,
since reading all of a shard would cost more than opening it is worth.

``prepared.lock`` is empty; a run that writes to the folder holds a lock on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from collavo import writing
from collavo.panoptic.coco_index import Skipped
from collavo.panoptic.instructions import TEMPLATES, Instruction, check_templates
from collavo_kernels import MAX_MAP_SIDE, CrayonMap

try:
    import fcntl
except ImportError:  # only POSIX systems have it
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
MANIFEST = "prepared.json"
REPORT = "skipped.jsonl"
LOCK = "prepared.lock"

_SKIPPED_LINE = b'{"skipped"'
_CRAYON = tuple(field.name for field in fields(CrayonMap))


@dataclass(frozen=True)
class PrepareSettings:
    """What is made of a COCO panoptic folder.

    Args:
        grid: Height and width of the crayon grid in cells.
        reduce: How a grid cell gets its segment: ``"majority"`` or ``"nearest"``.
        max_number: Largest instance number; later instances of a class get 0.
        templates: The instructions to make.
        images_per_shard: Entries of the index that go into one shard.
        verify_images: Whether images are decoded; otherwise their size alone is read.
        limit: Only so many entries from the index's beginning; None takes all.
        image_mode: What the processor makes of a picture: ``"squash"`` covers all of it with the
            grid, ``"pad"`` the square that it is padded to, as LLaVA-1.5 does.

    Raises:
        ValueError: naming the setting that is out of range.

    Source: released code (35x35 grid, numbers up to 20).
    """

    grid: tuple[int, int] = (35, 35)
    reduce: str = "majority"
    max_number: int = 20
    templates: tuple[str, ...] = tuple(TEMPLATES)
    images_per_shard: int = 1024
    verify_images: bool = False
    limit: int | None = None
    image_mode: str = "squash"

    def __post_init__(self) -> None:
        check_templates(self.templates)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid: expected a positive height and width, got {self.grid}")
        if max(self.grid) > MAX_MAP_SIDE:
            raise ValueError(
                f"grid: expected at most {MAX_MAP_SIDE} cells per side, got {self.grid}"
            )
        if self.reduce not in ("majority", "nearest"):
            raise ValueError(f"reduce: expected majority or nearest, got {self.reduce!r}")
        if self.image_mode not in ("squash", "pad"):
            raise ValueError(f"image_mode: expected squash or pad, got {self.image_mode!r}")
        limit = 1 if self.limit is None else self.limit
        for name, value, least in (
            ("max_number", self.max_number, 0),
            ("images_per_shard", self.images_per_shard, 1),
            ("limit", limit, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.max_number >= 2**31:
            raise ValueError(f"max_number: expected at most {2**31 - 1}, got {self.max_number}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        content = {**asdict(self), "grid": list(self.grid), "templates": list(self.templates)}
        if self.image_mode == "squash":  # as folders say it that were prepared before there was pad
            del content["image_mode"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PrepareSettings:
        """Read what :meth:`to_json` returned.

        Args:
            content: The settings.

        Raises:
            TypeError: if a setting is missing or unknown.
            ValueError: as the class itself.
        """
        lists = {name: tuple(content[name]) for name in ("grid", "templates") if name in content}
        return cls(**{**content, **lists})


@dataclass(frozen=True)
class PreparedImage:
    """A line of a shard.

    Args:
        image_id: COCO's number of the image.
        file_name: As the JSON has it.
        height: In pixels.
        width: In pixels.
        instructions: All of the image, in the templates' order; one for each of its classes with
            the template ``"class"``; none for an image without any visible object.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    instructions: tuple[Instruction, ...]

    def line(self) -> bytes:
        """Return the image as a line of JSON."""
        # ``asdict`` would copy every instruction deeply, which costs more than the JSON itself.
        instructions = [
            {"template": one.template, "question": one.question, "answer": one.answer}
            for one in self.instructions
        ]
        content = {
            "image_id": self.image_id,
            "file_name": self.file_name,
            "width": self.width,
            "height": self.height,
            "instructions": instructions,
        }
        return json.dumps(content).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> PreparedImage:
        """Read what :meth:`line` returned.

        Args:
            line: The line.
        """
        content = json.loads(line)
        instructions = tuple(Instruction(**one) for one in content.pop("instructions"))
        return cls(instructions=instructions, **content)


def skipped_line(skipped: Skipped) -> bytes:
    """Return the line of an image that was skipped.

    Args:
        skipped: The file or entry, and the reason.
    """
    return json.dumps({"skipped": skipped.name, "reason": skipped.reason}).encode() + b"\n"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process at the latest.

    Where the system or the folder's file system has no such locks, nothing is kept out.

    Args:
        folder: Of the prepared data set.

    Raises:
        ValueError: if another run holds the lock.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{folder}: another run of collavo prepare writes to it; wait until it is "
                    "done, or name another folder"
                ) from error
            except OSError:
                pass  # this file system has no locks
        yield
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read ``prepared.json``.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is none of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; expected what collavo prepare made"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and {"settings", "inputs", "complete"} <= content.keys():
            return dict(content)
        found = f"format {content['format']!r}"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        found = f"something else ({error!r})"
    raise ValueError(f"{path}: expected format {FORMAT} of collavo prepare, got {found}")


def shard_files(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the lines' and the tensors' file of a shard.

    Args:
        folder: Of the prepared data set.
        number: 0, 1, ...
    """
    stem = f"shard-{number:05d}"
    return folder / f"{stem}.jsonl", folder / f"{stem}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    crayon: CrayonMap,
    entries: Sequence[PreparedImage | Skipped],
) -> None:
    """Write a shard; it is done when its tensors are in place.

    Args:
        folder: Of the prepared data set.
        number: 0, 1, ...
        crayon: Of the images among the entries, in order.
        entries: The shard's images, and in their places what was skipped.
    """
    images: list[PreparedImage] = []
    lines: list[bytes] = []
    starts, position = [], 0
    for entry in entries:
        if isinstance(entry, PreparedImage):
            images.append(entry)
            starts.append(position)
        line = entry.line() if isinstance(entry, PreparedImage) else skipped_line(entry)
        lines.append(line)
        position += len(line)
    per_image = torch.bincount(crayon.row_image.long(), minlength=len(images))
    visible = (crayon.row_class > 0) & (crayon.row_area > 0)
    objects = torch.bincount(crayon.row_image[visible].long(), minlength=len(images))
    # COCO's names are in UTF-8; no file's name has the character 0.
    names = bytearray("\0".join(image.file_name for image in images), "utf-8", "surrogatepass")
    tensors = {
        **{name: getattr(crayon, name) for name in _CRAYON},
        "first_row": torch.cat([per_image.new_zeros(1), per_image.cumsum(0)]),
        "line_start": torch.tensor([*starts, position], dtype=torch.int64),
        "num_objects": objects.to(torch.int32),
        "num_instructions": torch.tensor(
            [len(image.instructions) for image in images], dtype=torch.int32
        ),
        "file_names": torch.frombuffer(names, dtype=torch.uint8) if names else _EMPTY,
    }
    line_file, tensor_file = shard_files(folder, number)
    writing.write_file(line_file, b"".join(lines))
    writing.write_file(tensor_file, save({k: v.contiguous() for k, v in tensors.items()}))


def _map(path: Path) -> Any:
    # safetensors' classes have no types.
    return safe_open(path, framework="pt")


_EMPTY = torch.empty(0, dtype=torch.uint8)


class Shard:
    """A shard that is open for reading; tensors are mapped, not read.

    Args:
        folder: Of the prepared data set.
        number: 0, 1, ...

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the file that is truncated or no shard. Bytes that changed in place are
            not noticed; see the module.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.lines, self.tensors = shard_files(folder, number)
        for path in (self.lines, self.tensors):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: this shard is missing")
        try:
            self._file = _map(self.tensors)
            self._first_row = self._file.get_tensor("first_row").tolist()
            self._line_start = self._file.get_tensor("line_start").tolist()
            missing = set(_CRAYON) - set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.tensors}: truncated, or no shard ({error})") from error
        if missing:
            raise ValueError(f"{self.tensors}: no shard: it has no {sorted(missing)[0]}")
        if not self._line_start or len(self._line_start) != len(self._first_row):
            raise ValueError(
                f"{self.tensors}: no shard: its first_row has {len(self._first_row)} entries and "
                f"its line_start {len(self._line_start)}"
            )
        size = self.lines.stat().st_size
        if size != self._line_start[-1]:
            raise ValueError(f"{self.lines}: expected {self._line_start[-1]} bytes, got {size}")

    def __len__(self) -> int:
        return len(self._first_row) - 1

    @cached_property
    def num_objects(self) -> Tensor:
        """``[n]`` int32, the visible segments of a known class of every image."""
        return self._get("num_objects")

    @cached_property
    def num_instructions(self) -> Tensor:
        """``[n]`` int32, the instructions of every image."""
        return self._get("num_instructions")

    @cached_property
    def file_names(self) -> list[str]:
        """Every image's file name."""
        joined = bytes(self._get("file_names").numpy()).decode("utf-8", "surrogatepass")
        return joined.split("\0") if len(self) else []

    def crayon(self, index: int) -> CrayonMap:
        """Return the rows and cells of one image; nothing else is read.

        Args:
            index: 0..len-1.
        """
        first, last = self._first_row[index], self._first_row[index + 1]
        columns = {name: self._file.get_slice(name)[first:last] for name in _CRAYON[1:]}
        columns["row_image"] = torch.zeros_like(columns["row_image"])
        cells = self._file.get_slice("row_index")[index : index + 1]
        # Cells of padding have no row.
        return CrayonMap(row_index=torch.where(cells < 0, -1, cells - first), **columns)

    def image(self, index: int) -> PreparedImage:
        """Return what stands about one image.

        Args:
            index: 0..len-1.

        Raises:
            ValueError: naming the file, if its line is damaged.
        """
        start = self._line_start[index]
        with self.lines.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            return PreparedImage.from_line(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.lines}: damaged at byte {start} ({error})") from error

    def skipped(self) -> list[Skipped]:
        """Return what was skipped in place of an image, in order.

        Raises:
            ValueError: naming the file, if a line is damaged.
        """
        found, start = [], 0
        with self.lines.open("rb") as file:
            for line in file:
                if line.startswith(_SKIPPED_LINE):
                    try:
                        entry = json.loads(line)
                        found.append(Skipped(entry["skipped"], entry["reason"]))
                    except (ValueError, TypeError, KeyError) as error:
                        raise ValueError(
                            f"{self.lines}: damaged at byte {start} ({error}); remove it and "
                            "run collavo prepare again"
                        ) from error
                start += len(line)
        return found

    def _get(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.tensors}: no shard ({error})") from error
        return tensor
