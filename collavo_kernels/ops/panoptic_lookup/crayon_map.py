"""CrayonMap: the rows of a batch of panoptic maps and the row of every grid cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.fx import _pytree

from collavo_kernels._validation import expect_int, expect_list, expect_tensor

_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class CrayonMap:
    """Rows (one per segment, and one unknown row per image) and the row of every grid cell.

    ``B`` images, ``P = grid_h * grid_w`` cells, ``T`` rows. Rows are ordered by image, then by
    ascending segment id; every image's first row is its own unknown row. A *dead* row, which
    :meth:`pad` adds, has class -1 and image -1 and no cell refers to it.

    It is a pytree: it can enter and leave compiled and exported functions.

    Attributes:
        row_index: ``[B, P]`` int32, the row of each cell in row-major order, in ``[0, T)``.
        row_class: ``[T]`` int32, 0 = unknown, class ``c`` is ``c + 1``, -1 = dead row.
        row_number: ``[T]`` int32, instance number from 1 within image and class; 0 = unknown row,
            or an instance after the last number.
        row_image: ``[T]`` int32, image of the row; -1 = dead row.
        row_segment_id: ``[T]`` int32, id of the segment in the map; 0 = unknown or dead row.
        row_box: ``[T, 4]`` float32, x1, y1, x2, y2 as fractions of the map's width and height,
            x2 and y2 exclusive; 0 for unknown rows and for segments without a pixel.
        row_area: ``[T]`` int32, source pixels of the segment; for an unknown row all other pixels.

    Example:
        >>> import torch
        >>> from collavo_kernels import panoptic_lookup
        >>> ids, classes = torch.tensor([[7], [0]], dtype=torch.int32)
        >>> maps = torch.tensor([[[7, 7], [0, 7]]], dtype=torch.int32)
        >>> crayon = panoptic_lookup(maps, [ids], [classes], grid=(2, 2))
        >>> crayon.row_index.tolist(), crayon.row_class.tolist()
        ([[1, 1, 0, 1]], [0, 1])
    """

    row_index: Tensor
    row_class: Tensor
    row_number: Tensor
    row_image: Tensor
    row_segment_id: Tensor
    row_box: Tensor
    row_area: Tensor

    @property
    def num_images(self) -> int:
        """B, the number of images."""
        return self.row_index.shape[0]

    @property
    def num_cells(self) -> int:
        """P, the number of grid cells of an image."""
        return self.row_index.shape[1]

    @property
    def num_rows(self) -> int:
        """T, the number of rows, dead rows included."""
        return self.row_class.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.row_index.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CrayonMap:
        """Return the map on another device (the same tensors where they are there already)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CrayonMap:
        """Return the map in page-locked memory, from which a GPU copies asynchronously."""
        return self._each(lambda tensor: tensor.pin_memory())

    def pad(self, rows: int) -> CrayonMap:
        """Return the map with ``rows`` rows, dead rows at its end: a fixed T for CUDA graphs.

        Args:
            rows: Number of rows wanted, at least ``num_rows``.

        Raises:
            ValueError: if there are more rows already.
        """
        expect_int("rows", rows, minimum=self.num_rows)
        extra = rows - self.num_rows

        def tail(tensor: Tensor, value: int) -> Tensor:
            return torch.cat([tensor, tensor.new_full((extra, *tensor.shape[1:]), value)])

        return CrayonMap(
            row_index=self.row_index,
            row_class=tail(self.row_class, -1),
            row_number=tail(self.row_number, 0),
            row_image=tail(self.row_image, -1),
            row_segment_id=tail(self.row_segment_id, 0),
            row_box=tail(self.row_box, 0),
            row_area=tail(self.row_area, 0),
        )

    def scatter(self, image_positions: Tensor, sequence_length: int) -> Tensor:
        """Place the cells' rows at the image tokens of a batch of sequences.

        ``out[b, image_positions[b, p]] = row_index[b, p]``, and -1 everywhere else.

        Args:
            image_positions: ``[B, P]`` int32 or int64, where in its sequence the token of each
                cell stands; a negative position leaves its cell out.
            sequence_length: S, tokens per sequence.

        Returns:
            ``[B, S]`` int32, the row of each token, -1 where it is no image token.

        Raises:
            TypeError: if the positions are no integers.
            ValueError: if their shape or device is another, or (on the CPU, outside of compiled
                code; elsewhere its cell is left out) a position is S or more.

        Example:
            >>> import torch
            >>> from collavo_kernels import panoptic_lookup
            >>> none = torch.empty(0, dtype=torch.int32)
            >>> empty = torch.zeros(1, 2, 2, dtype=torch.int32)
            >>> crayon = panoptic_lookup(empty, [none], [none], grid=(1, 2))
            >>> crayon.scatter(torch.tensor([[1, 2]]), 4).tolist()
            [[-1, 0, 0, -1]]
        """
        expect_tensor(
            "image_positions",
            image_positions,
            shape=self.row_index.shape,
            dtypes=_INTEGERS,
            device=self.device,
            hint="one position in its sequence for every grid cell",
        )
        expect_int("sequence_length", sequence_length, minimum=0)
        positions = image_positions.to(torch.int64)
        if not torch.compiler.is_compiling() and positions.device.type == "cpu":
            _check_positions(positions, sequence_length)
        # Left-out cells go to one column more, which is cut off; so do positions that are too high
        # where they cannot be reported, and nothing is ever written out of bounds.
        left_out = (positions < 0) | (positions >= sequence_length)
        positions = torch.where(left_out, sequence_length, positions)
        out = self.row_index.new_full((self.num_images, sequence_length + 1), -1)
        return out.scatter(1, positions, self.row_index)[:, :sequence_length].contiguous()

    @staticmethod
    def cat(maps: Sequence[CrayonMap]) -> CrayonMap:
        """Join the batches of several maps into one, in order.

        Row numbers and images are shifted: the result is what one lookup of all images gives.

        Args:
            maps: At least one map, all with the same number of cells and on the same device.

        Raises:
            TypeError: if they are no list of maps.
            ValueError: if there is none, or cells or devices differ.
        """
        expect_list("maps", maps, "CrayonMap")
        for i, each in enumerate(maps):
            if not isinstance(each, CrayonMap):
                raise TypeError(f"maps[{i}]: expected a CrayonMap, got {type(each).__name__}")
        if not maps:
            raise ValueError("maps: expected at least one CrayonMap, got none")
        for i, each in enumerate(maps):
            expect_tensor(
                f"maps[{i}].row_index",
                each.row_index,
                shape=("B", maps[0].num_cells),
                device=maps[0].device,
                hint="all maps must have the same grid and device",
            )
        index, image = [], []
        rows = images = 0
        for each in maps:
            index.append(_shifted(each.row_index, rows))
            image.append(_shifted(each.row_image, images))
            rows += each.num_rows
            images += each.num_images
        return CrayonMap(
            row_index=torch.cat(index),
            row_class=torch.cat([each.row_class for each in maps]),
            row_number=torch.cat([each.row_number for each in maps]),
            row_image=torch.cat(image),
            row_segment_id=torch.cat([each.row_segment_id for each in maps]),
            row_box=torch.cat([each.row_box for each in maps]),
            row_area=torch.cat([each.row_area for each in maps]),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> CrayonMap:
        return CrayonMap(
            **{field.name: change(getattr(self, field.name)) for field in fields(self)}
        )


def _shifted(values: Tensor, by: int) -> Tensor:
    return torch.where(values >= 0, values + by, values)


def _check_positions(positions: Tensor, sequence_length: int) -> None:
    bad = (positions >= sequence_length).nonzero()
    if len(bad):
        image, cell = bad[0].tolist()
        raise ValueError(
            f"image_positions: expected positions below sequence_length {sequence_length}, "
            f"got {int(positions[image, cell])} for cell {cell} of image {image}"
        )


def _fields(crayon: Any, spec: Any) -> list[Any]:
    """Return the values in the order that ``torch.export`` lays them out."""
    return [getattr(crayon, field.name) for field in fields(crayon)]


torch.export.register_dataclass(CrayonMap, serialized_type_name="collavo_kernels.CrayonMap")
if CrayonMap not in _pytree.SUPPORTED_NODES:
    # torch 2.6 and before leave this half to the class; an exported program's inputs need it.
    _pytree.register_pytree_flatten_spec(CrayonMap, _fields)
