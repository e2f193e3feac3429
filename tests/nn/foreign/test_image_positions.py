"""``find_image_positions`` against the embeddings: what changes with the pixels is an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collavo_kernels.nn import (
    CrayonInputs,
    ImagePositions,
    crayon_context,
    current_crayon,
    find_image_positions,
)
from tests.nn.foreign.llava_stand_in import HIDDEN, IMAGE, PATCHES, SIDE, StandIn, stand_in
from tests.nn.foreign.stand_in_batch import IDS, MASK, ROWS, images, where

TABLE = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
SEVERAL = torch.tensor([[1, IMAGE, 5, IMAGE, IMAGE, 6], [1, 2, 3, 4, 5, 6]])


def merged(model: StandIn, ids: Tensor, pictures: Any, mask: Tensor | None = None) -> Tensor:
    prepared = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, pictures)
    return prepared[4]


def changed(model: StandIn, ids: Tensor, pictures: Any, mask: Tensor | None = None) -> Tensor:
    """Places whose embedding is another with other pixels, ``[B, S]``."""
    others = [3 - 2 * each for each in pictures]
    return (merged(model, ids, pictures, mask) != merged(model, ids, others, mask)).any(2)


def rows_of(model: StandIn, ids: Tensor, pictures: Any, rows: Any, found: Any) -> Tensor:
    """The row of each token, as the layers of a forward pass are given it."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any) -> None:
        crayon = current_crayon()
        assert isinstance(crayon, CrayonInputs) and crayon.row_index is not None
        seen.append(crayon.row_index)

    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(see)
    with torch.no_grad(), crayon_context(model, (TABLE, rows), found):
        model(ids, images=pictures)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str) -> None:
    model = stand_in()
    model.config.tokenizer_padding_side = side
    found = where(model)
    assert torch.equal(found.mask, changed(model, IDS, list(images()), MASK))
    assert found.mask.sum().item() == 2 * PATCHES and found.images.tolist() == [1, 1]
    assert found.mask[1, -2 if side == "right" else 3].item() is False


def test_several_images_and_a_picture_that_is_not_shown() -> None:
    """LLaVA's batches have a black picture for a sample of words; its rows may be there or not."""
    model, pictures = stand_in(), images(count=4)
    found = find_image_positions(model, SEVERAL, pictures)
    assert torch.equal(found.mask, changed(model, SEVERAL, list(pictures)))
    assert found.images.tolist() == [3, 0]
    rows = torch.arange(16, dtype=torch.int32).view(4, 4) % 4
    rows[1] = -1
    index = rows_of(model, SEVERAL, pictures, rows, found)
    assert index[found.mask].tolist() == rows[:3].flatten().tolist()
    assert torch.equal(index, rows_of(model, SEVERAL, pictures, rows[:3], found))
    assert torch.equal(index, rows_of(model, SEVERAL, pictures, rows[:3], found.mask))


def test_crops_have_as_many_tokens_as_they_have() -> None:
    """Any-resolution images: the whole picture, then crops with a newline, another number each."""
    model = stand_in()
    crops = [torch.randn(3, 3, SIDE, SIDE), torch.randn(2, 3, SIDE, SIDE)]
    found = find_image_positions(model, IDS, crops, attention_mask=MASK)
    counts = [PATCHES + 2 * (PATCHES + 1), PATCHES + PATCHES + 1]
    assert found.mask.sum(1).tolist() == counts
    newline = (merged(model, IDS, crops, MASK) == model.model.image_newline).all(2)
    assert torch.equal(found.mask & ~newline, changed(model, IDS, crops, MASK))
    rows = [torch.arange(count, dtype=torch.int32) % 4 for count in counts]
    rows = [each.where(torch.arange(len(each)) % 5 != 3, -1) for each in rows]
    with torch.no_grad(), crayon_context(model, (TABLE, rows), found):
        model(IDS, attention_mask=MASK, images=crops)
    with (
        pytest.raises(ValueError, match="expected 9 image tokens in sample 0"),
        crayon_context(model, (TABLE, rows[::-1]), found),
    ):
        pass


# A sequence of 3 words and 3 images: 1, 4 tokens, 5, 4 + 4 tokens, 6.
@pytest.mark.parametrize(
    ("length", "begun", "whole"),
    [
        (3, 1, 0),
        (5, 1, 0),
        (6, 3, 1),
        (9, 3, 1),
        (13, 3, 1),
        (14, 3, 1),
        (15, 3, 3),
    ],
)
def test_a_cut_takes_the_last_tokens(length: int, begun: int, whole: int) -> None:
    model, pictures = stand_in(), images(count=3)
    ids = SEVERAL[:1]
    rows = torch.arange(12, dtype=torch.int32).view(3, 4) % 4
    whole_index = rows_of(model, ids, pictures, rows, find_image_positions(model, ids, pictures))
    model.config.tokenizer_model_max_length = length
    found = find_image_positions(model, ids, pictures)
    assert (found.begun.tolist(), found.whole.tolist()) == ([begun], [whole])
    index = rows_of(model, ids, pictures, rows, found)
    assert torch.equal(index, whole_index[:, :length])


def test_a_cut_excuses_no_other_grid() -> None:
    """The image stands before the cut: its tokens are all there, and the rows are too many."""
    model = stand_in()
    model.config.tokenizer_model_max_length = 7
    found = find_image_positions(model, IDS[:1], images(count=1))
    assert found.whole.tolist() == [1]
    with (
        pytest.raises(ValueError, match="expected 8 image tokens in sample 0"),
        crayon_context(model, (TABLE, ROWS[:1].repeat(1, 2)), found),
    ):
        pass


class OldSignature(nn.Module):
    """LLaVA 1.0's: no position ids, five values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stand_in()

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, attention_mask, past_key_values, labels, images
    ):  # fmt: skip
        result = self.inner.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, past_key_values, labels, images
        )
        return (None, *result[2:])


def test_older_and_younger_signatures() -> None:
    old, new = OldSignature(), stand_in()
    for found, expected in zip(
        find_image_positions(old, IDS, images(), attention_mask=MASK), where(new), strict=True
    ):
        assert torch.equal(found, expected)
    sized = find_image_positions(new, IDS, images(), attention_mask=MASK, image_sizes=[(4, 4)] * 2)
    assert isinstance(sized, ImagePositions)
    with pytest.raises(TypeError, match="image_sizes: expected one of input_ids, attention_mask"):
        find_image_positions(old, IDS, images(), image_sizes=[(4, 4)])


def test_what_merges_nothing_is_refused() -> None:
    model = stand_in()
    with pytest.raises(ValueError, match="nothing was merged: images is None"):
        find_image_positions(model, IDS, None)
    with pytest.raises(ValueError, match=r"nothing was merged: .* input_ids \[2, 1\]"):
        find_image_positions(model, IDS[:, :1], images())
    with pytest.raises(TypeError, match="expected one with prepare_inputs_labels_for_multimodal"):
        find_image_positions(model.model, IDS, images())
    with pytest.raises(ValueError, match="attention_mask"):
        find_image_positions(model, IDS, images(), attention_mask=MASK[:1])


def test_positions_leave_gradients_and_modes_alone() -> None:
    model = stand_in().train()
    assert not find_image_positions(model, IDS, images()).mask.requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())
