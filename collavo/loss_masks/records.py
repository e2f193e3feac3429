"""Records of LLaVA's format, one after the other, without their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from collavo.conversations.files import read_entries
from collavo.conversations.llava import ImageOrder, draw_order, order_images, read_llava
from collavo.conversations.mixture import read_sources
from collavo.conversations.records import Record, entry_name
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
        for number, entry, fault in read_entries(source.path):
            name = entry_name(entry, f"{source.path}: [{number}]")
            try:
                if fault:
                    raise ValueError(fault)
                record = read_llava(entry, name)
            except ValueError as error:
                yield Skipped(name, str(error).removeprefix(f"{name}: "))
                continue
            draw = draw_order(seed, number) if image_order == "random" else 0
            turns = order_images(record["conversation"], image_order, draw=draw)
            yield {**record, "conversation": turns}
