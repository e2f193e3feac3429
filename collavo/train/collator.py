"""Records become padded batches of plain, batch-first tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from collavo._arguments import expect_like
from collavo.conversations.records import check_record, record_images, record_name
from collavo.panoptic.maps import MapInput
from collavo.processing.processor import CollavoProcessor
from collavo.processing.stretches import place_images


class CrayonCollator:
    """Make a training batch: inputs, and labels on the answers and their stop tokens only.

    It may be pickled and used by any number of workers.

    Args:
        processor: With a tokenizer that has a pad token, and a chat template with a
            ``{% generation %}`` block around what the assistant says, or one that only adds text
            with each turn.
        object_text: Whether prompts name their objects, for records that do not say; None takes
            the processor's setting.
        max_length: Longest sequence in tokens, those of images included.
        overlong: What becomes of a longer one: ``"cut"`` behind its last whole answer that fits,
            or ``"raise"``.
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
        overlong: str = "cut",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        expect_like(
            "processor", processor, "a CollavoProcessor", has=("tokenizer", "image_processor")
        )
        self.processor = processor
        self.object_text = object_text
        self.max_length = max_length
        self.overlong = overlong
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
            OverlongError: naming the record, if it is too long and not to be cut, or no whole
                answer of it fits.
            ValueError: naming the record, if one is malformed or has nothing to learn.
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
            conversations.append(place_images(record["conversation"], len(own_images)))
        default = self.processor.names_objects if self.object_text is None else self.object_text
        batch = self.processor.training_batch(
            conversations,
            images,
            maps,
            object_text=[bool(record.get("object_text", default)) for record in checked],
            max_length=self.max_length,
            overlong=self.overlong,
            pad_to_multiple_of=self.pad_to_multiple_of,
            names=names,
            pixels=pixels,
        )
        return dict(batch)
