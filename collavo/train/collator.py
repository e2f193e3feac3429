"""Records become padded batches of plain, batch-first tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from collavo.processing.processor import IGNORE_INDEX, CollavoProcessor
from collavo.train.dataset import check_record, record_images


class CrayonCollator:
    """Make a training batch: inputs, and labels on the answers and their stop tokens only.

    It may be pickled and used by any number of workers.

    Args:
        processor: With a tokenizer that has a pad token, and a chat template with a
            ``{% generation %}`` block around what the assistant says.
        object_text: Whether prompts name their objects, for records that do not say; None takes
            the processor's setting.
        max_length: Longest sequence in tokens; longer ones are cut. A cut through an image, or one
            that leaves nothing of an answer, is an error.
        pad_to_multiple_of: Pad lengths to a multiple of this.

    Example:
        ``DataLoader(dataset, batch_size=8, collate_fn=CrayonCollator(processor))``
    """

    def __init__(
        self,
        processor: CollavoProcessor,
        *,
        object_text: bool | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.processor = processor
        self.object_text = object_text
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            records: At least one; see ``collavo.train.dataset``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` int64 ``[B, L]`` (labels -100 outside
            the answers). If any record has an image, also ``pixel_values`` float32
            ``[images, 3, H, W]``, ``crayon_index`` int32 ``[B, P]``, ``crayon_class`` and
            ``crayon_number`` int32 ``[B, R]``; records without one have index -1 and class -1.

        Raises:
            ValueError: naming the record, if one is malformed, or an image or a whole answer would
                be cut.
        """
        if not records:
            raise ValueError("records: expected at least one, got none")
        checked = [check_record(record, f"records[{i}]") for i, record in enumerate(records)]
        images, maps, conversations = [], [], []
        for record in checked:
            own_images, own_maps = record_images(record)
            images += own_images
            maps += own_maps
            conversations.append(_with_images(record["conversation"], len(own_images)))
        default = self.processor.object_text if self.object_text is None else self.object_text
        options: dict[str, Any] = {"pad_to_multiple_of": self.pad_to_multiple_of}
        if self.max_length is not None:
            options |= {"truncation": True, "max_length": self.max_length}
        batch = self.processor.training_batch(
            conversations,
            images,
            maps,
            object_text=[bool(record.get("object_text", default)) for record in checked],
            **options,
        )
        _check_answers(batch["labels"], self.max_length)
        return dict(batch)


def _check_answers(labels: Tensor, max_length: int | None) -> None:
    # A batch without any label has a loss of 0 / 0, which would spoil every weight.
    empty = (labels == IGNORE_INDEX).all(1)
    if bool(empty.any()):
        raise ValueError(
            f"records[{int(empty.nonzero()[0])}]: nothing of its answer is left within max_length="
            f"{max_length}; allow longer sequences"
        )


def _with_images(conversation: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Put the record's images into the first user turn, unless the turns have their own."""
    turns = [dict(turn) for turn in conversation]
    own = sum(
        part.get("type") == "image"
        for turn in turns
        if not isinstance(turn["content"], str)
        for part in turn["content"]
    )
    if own or not count:
        return turns
    for turn in turns:
        if turn["role"] == "user":
            parts = turn["content"]
            if isinstance(parts, str):
                parts = [{"type": "text", "text": parts}]
            turn["content"] = [{"type": "image"}] * count + list(parts)
            break
    return turns
