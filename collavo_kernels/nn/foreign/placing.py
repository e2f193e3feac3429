"""Row indices of a batch's images brought to the places of its image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collavo_kernels._rows import checked_index
from collavo_kernels._validation import describe, expect_tensor
from collavo_kernels.nn.foreign.positions import ImagePositions

_INTEGERS = (torch.int32, torch.int64)


class PlacedRows(NamedTuple):
    """The row of every image token and its place.

    Attributes:
        positions: int64 ``[B, P]``, -1 = none.
        rows: int32 ``[B, P]``, -1 = no row.
        length: S, or None where the positions do not say it.
    """

    positions: Tensor
    rows: Tensor
    length: int | None

    def row_index(self, length: int, repeats: int = 1) -> Tensor:
        """Return the row of each token, int32 ``[B * repeats, length]``, -1 = none.

        Args:
            length: S.
            repeats: How often each sample stands, copies beside each other, as for beams.
        """
        batch = self.positions.shape[0]
        out = self.rows.new_full((batch, length + 1), -1)  # the last column takes what has no place
        places = torch.where(self.positions < 0, length, self.positions)
        rows = torch.where(self.positions < 0, -1, self.rows)
        return out.scatter(1, places, rows)[:, :length].repeat_interleave(repeats, 0)


def place_rows(
    row_index: Tensor | Sequence[Tensor],
    image_positions: ImagePositions | Tensor,
    *,
    count: int,
    whole: bool,
) -> PlacedRows:
    """Bring row indices and the places of image tokens together.

    Args:
        row_index: As ``crayon_context`` takes it.
        image_positions: As ``crayon_context`` takes it.
        count: T, rows of the table.
        whole: Whether ``row_index`` ``[B, S]`` is of whole sequences, not of image tokens.

    Raises:
        TypeError: if one is of another kind.
        ValueError: if they disagree, naming the sample.
    """
    where = image_positions.mask if isinstance(image_positions, ImagePositions) else image_positions
    expect_tensor(
        "image_positions",
        where,
        shape=("B", "S"),
        dtypes=(torch.bool, *_INTEGERS),
        hint="a mask of the image tokens, or positions [B, P]; find_image_positions makes one",
    )
    images = _indices(row_index, count)
    if where.dtype != torch.bool:
        return _at_positions(row_index, where, images, whole)
    if where.shape[1] < 2:
        raise ValueError(
            f"image_positions: expected sequences of two tokens or more, got {list(where.shape)}; "
            "a single token is taken for a decode step"
        )
    if whole:
        return _of_sequences(row_index, where)
    images = [each.to(where.device) for each in images]
    found = where.sum(1).tolist()
    rows = [
        _of_sample(sample, shown, tokens, where)
        for sample, (shown, tokens) in enumerate(
            zip(_shown(images, image_positions, found), found, strict=True)
        )
    ]
    positions = [line.nonzero().flatten() for line in where]
    return PlacedRows(
        pad_sequence(positions, batch_first=True, padding_value=-1),
        pad_sequence(rows, batch_first=True, padding_value=-1),
        where.shape[1],
    )


def _indices(row_index: Tensor | Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the row index of each image, int32 ``[P]``, checked."""
    if not isinstance(row_index, Tensor | Sequence) or isinstance(row_index, str):
        raise TypeError(
            "crayon: expected (table, row_index) with a row index [images, P], or a list of one "
            f"[P] per image, got {describe(row_index)}"
        )
    if isinstance(row_index, Tensor):
        expect_tensor("crayon.row_index", row_index, shape=("images", "P"), dtypes=_INTEGERS)
        return list(checked_index(row_index, count).int())
    for i, each in enumerate(row_index):
        expect_tensor(f"crayon.row_index[{i}]", each, shape=("P",), dtypes=_INTEGERS)
    return [checked_index(each, count).int() for each in row_index]


def _at_positions(
    row_index: Tensor | Sequence[Tensor], positions: Tensor, images: list[Tensor], whole: bool
) -> PlacedRows:
    if whole:
        raise ValueError(
            "image_positions: expected a mask [B, S] beside a CrayonInputs, whose row_index is of "
            "whole sequences; give (table, row_index) with a row per position"
        )
    sizes = [len(each) for each in images]
    if sizes != [positions.shape[1]] * positions.shape[0]:
        raise ValueError(
            f"image_positions: expected a position for each row index {_shape(row_index)}, got "
            f"{list(positions.shape)}"
        )
    return PlacedRows(positions.long(), torch.stack(images).to(positions.device), None)


def _of_sequences(row_index: Tensor | Sequence[Tensor], where: Tensor) -> PlacedRows:
    if not isinstance(row_index, Tensor) or row_index.shape != where.shape:
        raise ValueError(
            f"crayon.row_index: expected {list(where.shape)} as image_positions has it, a row per "
            f"token of the sequences, got {_shape(row_index)}; (table, row_index) takes a row per "
            "image token"
        )
    rows = row_index.int().to(where.device)
    stray = ((rows >= 0) & ~where).nonzero()
    if len(stray):
        sample, token = stray[0].tolist()
        raise ValueError(
            f"crayon.row_index: expected -1 where image_positions has no image token, got "
            f"{int(rows[sample, token])} at sample {sample}, token {token}"
        )
    places = torch.arange(where.shape[1], device=where.device).expand(where.shape)
    return PlacedRows(places, rows, where.shape[1])


def _shape(row_index: Tensor | Sequence[Tensor]) -> str:
    if isinstance(row_index, Tensor):
        return str(list(row_index.shape))
    return f"of {len(row_index)} images with {[len(each) for each in row_index]} cells"


class _Shown(NamedTuple):
    """The row indices of a sample's images, and how many of them have some, or all, tokens."""

    images: list[Tensor]
    begun: int
    whole: int


def _shown(
    images: list[Tensor], image_positions: ImagePositions | Tensor, found: list[int]
) -> list[_Shown]:
    """Deal the images out to the samples."""
    if not isinstance(image_positions, ImagePositions):
        counts = begun = whole = steps = _greedy(images, found)
    else:
        counts, begun, whole = (each.tolist() for each in image_positions[1:])
        # In LLaVA's batches a sample of words alone has a picture that is not shown, whose row
        # index may be there or not.
        steps = counts if len(images) == sum(counts) else [max(n, 1) for n in counts]
    if len(images) != sum(steps):
        raise ValueError(
            f"crayon.row_index: expected those of {sum(counts)} images, as image_positions has "
            f"them ({', '.join(map(str, counts))} by sample), got {len(images)}"
        )
    shown, first = [], 0
    for i, count in enumerate(counts):
        shown.append(_Shown(images[first : first + count], begun[i], whole[i]))
        first += steps[i]
    return shown


def _greedy(images: list[Tensor], found: list[int]) -> list[int]:
    """Return how many images each sample shows, where only the numbers of tokens are known."""
    counts, left = [], [len(each) for each in images]
    for tokens in found:
        count = 0
        while tokens > 0 and count < len(left):
            tokens -= left[count]
            count += 1
        counts.append(count)
        left = left[count:]
    if counts:
        counts[-1] += len(left)  # its check says how many tokens are missing
    return counts


def _of_sample(sample: int, shown: _Shown, tokens: int, where: Tensor) -> Tensor:
    sizes = [len(each) for each in shown.images]
    least, most = sum(sizes[: shown.whole]), sum(sizes[: shown.begun])
    if not least <= tokens <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise ValueError(
            f"image_positions: expected {expected} image tokens in sample {sample}, one for each "
            f"entry of its row indices (images with {sizes}), got {tokens}; the crayon is of "
            "another grid, or of other images"
        )
    rows = shown.images or [torch.empty(0, dtype=torch.int32, device=where.device)]
    return torch.cat(rows)[:tokens]
