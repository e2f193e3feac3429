"""Records of LLaVA's format, one after the other, without their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from collavo.conversations.llava import ImageOrder, order_images, read_file
from collavo.conversations.mixture import read_sources
from collavo.conversations.records import Record, place_name
from collavo.panoptic.coco_index import Skipped


def read_records(
    paths: Sequence[Path], *, image_order: ImageOrder = "first", seed: int = 0
) -> Iterator[Record | Skipped]:
    """Read records as ``ConversationDataset.from_llava_json`` does, keeping none.

    Every record of a file comes once, whatever its weight or share in a mixture.

    Args:
        paths: As there.
        image_order: As there.
        seed: As there.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: naming the file, if it is no list of records.
    """
    for source in read_sources(list(paths)):
        for number, id_, record, fault in read_file(source.path):
            name = place_name(f"{source.path}: [{number}]", id_)
            if record is None:
                yield Skipped(name, fault)
                continue
            turns = record["conversation"]
            turns = order_images(turns, image_order, seed=seed, number=number)
            yield {**record, "conversation": turns, "name": name}
