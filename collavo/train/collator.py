"""Records become padded batches of plain, batch-first tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from collavo._arguments import expect_like
from collavo.conversations.records import check_record, record_images, record_name
from collavo.panoptic.maps import MapInput
from collavo.processing.processor import IGNORE_INDEX, CollavoProcessor


class CrayonCollator:
    """Make a training batch: inputs, and labels on the answers and their stop tokens only.

    It may be pickled and used by any number of workers.

    Args:
        processor: With a tokenizer that has a pad token, and a chat template with a
            ``{% generation %}`` block around what the assistant says, or one that only adds text
            with each turn.
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
        expect_like(
            "processor", processor, "a CollavoProcessor", has=("tokenizer", "image_processor")
        )
        self.processor = processor
        self.object_text = object_text
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch.

        Args:
            records: At least one; see ``collavo.conversations.records``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` int64 ``[B, L]`` (labels -100 outside
            the answers). If any record has an image, also ``pixel_values`` float32
            ``[images, 3, H, W]``, ``crayon_index`` int32 ``[B, P]``, ``crayon_class`` and
            ``crayon_number`` int32 ``[B, R]``; records without one have index -1 and class -1.

        Raises:
            ValueError: naming the record, if one is malformed, or an image or a whole answer would
                be cut.
        """
        return self._batch(records, pixels=True)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise where a batch with this record would; its pictures are not resized for it.

        Args:
            record: As of a batch.

        Raises:
            ValueError: naming the record.
        """
        self._batch([record], pixels=False)

    def _batch(self, records: Sequence[Mapping[str, Any]], pixels: bool) -> dict[str, Tensor]:
        if not records:
            raise ValueError("records: expected at least one, got none")
        names = [record_name(record, f"records[{i}]") for i, record in enumerate(records)]
        checked = [check_record(*pair) for pair in zip(records, names, strict=True)]
        images: list[list[Any]] = []  # by record, so that none can take another's
        maps: list[MapInput | None] = []
        conversations = []
        for record in checked:
            own_images, own_maps = record_images(record)
            images.append(own_images)
            maps += own_maps
            conversations.append(_with_images(record["conversation"], len(own_images)))
        default = self.processor.object_text if self.object_text is None else self.object_text
        batch = self.processor.training_batch(
            conversations,
            images,
            maps,
            object_text=[bool(record.get("object_text", default)) for record in checked],
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            names=names,
            pixels=pixels,
        )
        self._check_answers(batch["labels"], names)
        return dict(batch)

    def _check_answers(self, labels: Tensor, names: Sequence[str]) -> None:
        # A batch without any label has a loss of 0 / 0, which would spoil every weight.
        empty = (labels == IGNORE_INDEX).all(1)
        if bool(empty.any()):
            name = names[int(empty.nonzero()[0])]
            if self.max_length is None:
                raise ValueError(f"{name}: expected an answer with a token to learn, got none")
            raise ValueError(
                f"{name}: nothing of its answer is left within max_length={self.max_length}; allow "
                "longer sequences"
            )


def _with_images(conversation: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Put the record's images into the first user turn, unless the turns have their own.

    A conversation that nobody but the model speaks in has them in its first turn.
    """
    turns = [dict(turn) for turn in conversation]
    own = sum(
        part.get("type") == "image"
        for turn in turns
        if not isinstance(turn["content"], str)
        for part in turn["content"]
    )
    if own or not count:
        return turns
    spoken = [turn for turn in turns if turn["role"] != "system"]
    first = next((turn for turn in spoken if turn["role"] == "user"), spoken[0])
    parts = first["content"]
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    first["content"] = [{"type": "image"}] * count + list(parts)
    return turns
