"""Training from prepared shards: the batches, and the model, that the PNGs would have given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from toy_model import make_toy

from collavo.panoptic import (
    TEMPLATES,
    CocoPanopticDataset,
    PreparedDataset,
    PrepareSettings,
    SampleStream,
    Skipped,
    parse_instruction,
    prepare_folder,
    write_panoptic_png,
)
from collavo.panoptic.coco_index import CocoFolder
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset, CrayonInstructionDataset
from collavo.train.picture_maps import PictureMaps
from collavo.train.sampler import JoinedDataset
from collavo.train.trainer import CollavoTrainer


def prepare(coco: Path, out: Path, **settings: Any) -> PreparedDataset:
    parts = CocoFolder(coco / "images", coco / "panoptic", coco / "panoptic.json")
    prepare_folder(parts, out, PrepareSettings(**{"grid": (4, 4), **settings}))
    return PreparedDataset(out, coco / "images")


@pytest.fixture
def shards(coco_folder: Path, tmp_path: Path) -> PreparedDataset:
    return prepare(coco_folder, tmp_path / "out", images_per_shard=2)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize("object_text", [False, True])
def test_batches_are_those_of_the_pngs(
    coco_dataset: CocoPanopticDataset,
    shards: PreparedDataset,
    tiny_processor: Callable[..., Any],
    object_text: bool,
) -> None:
    """Every template is drawn in some epoch, by both alike."""
    collator = CrayonCollator(tiny_processor())
    options = {"seed": 3, "object_text": object_text}
    pngs = CrayonInstructionDataset(coco_dataset, **options)
    stored = CrayonInstructionDataset(shards, **options)
    drawn = set()
    for epoch in range(8):
        pngs.set_epoch(epoch)
        stored.set_epoch(epoch)
        records = [stored[i] for i in range(3)]
        turns = [record["conversation"] for record in records]
        drawn |= {parse_instruction(*(one["content"] for one in both)).template for both in turns}
        assert_same(collator(records), collator([pngs[i] for i in range(3)]))
    assert drawn == set(TEMPLATES)


def test_both_kinds_in_one_batch(
    coco_dataset: CocoPanopticDataset,
    shards: PreparedDataset,
    tiny_processor: Callable[..., Any],
) -> None:
    """Crayons and maps take turns, with an image without either: rows are those of one lookup."""
    processor = tiny_processor()
    images = [coco_dataset[i].image for i in (0, 1, 2, 0, 1)]
    maps = [coco_dataset.panoptic_map(i) for i in range(3)]
    plain = [maps[0], maps[1], maps[2], None, maps[1]]
    mixed = [maps[0], shards.crayon(1), shards.crayon(2), None, maps[1]]
    text = ["<image>What", "<image><image>", "<image>", "<image>"]
    batches = [
        processor(text=text, images=images, panoptic=each, padding=True, return_tensors="pt")
        for each in (plain, mixed)
    ]
    assert_same(*batches)


def test_workers_read_shards(shards: PreparedDataset, tiny_processor: Callable[..., Any]) -> None:
    data = CrayonInstructionDataset(shards, seed=1)
    collator = CrayonCollator(tiny_processor())
    for workers in (1, 2):
        loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collator)
        (batch,) = list(loader)
        assert_same(batch, collator([data[i] for i in range(3)]))


def test_a_stream_of_instructions_goes_past_broken_images(
    shards: PreparedDataset, coco_folder: Path
) -> None:
    """What training meets among 100,000 files; the stream's epoch is the instructions' too."""
    (coco_folder / "images" / "002.png").write_bytes(b"")
    data = CrayonInstructionDataset(shards, seed=1)
    skipped: list[Skipped] = []
    stream = SampleStream(data, on_unreadable=skipped.append)
    stream.set_epoch(4)
    found = [record["conversation"] for record in stream]
    assert [one.name for one in skipped] == ["002.png"]
    fresh = CrayonInstructionDataset(shards, seed=1)
    fresh.set_epoch(4)
    assert found == [fresh[i]["conversation"] for i in (0, 2)]


def test_images_without_objects_are_left_out(coco_folder: Path, tmp_path: Path) -> None:
    empty = torch.zeros(20, 18, dtype=torch.int32)
    write_panoptic_png(coco_folder / "panoptic" / "002.png", empty)
    data = CrayonInstructionDataset(prepare(coco_folder, tmp_path / "out"))
    assert len(data) == 2 and data[1]["image"].size == (30, 16)
    for number in ("001", "003"):
        path = coco_folder / "panoptic" / f"{number}.png"
        write_panoptic_png(path, torch.zeros({"001": (12, 16), "003": (16, 30)}[number]).int())
    with pytest.raises(ValueError, match=r"samples: no image of .*none has a segment"):
        CrayonInstructionDataset(prepare(coco_folder, tmp_path / "none"))


def test_what_was_not_prepared_cannot_be_drawn(coco_folder: Path, tmp_path: Path) -> None:
    samples = prepare(coco_folder, tmp_path / "out", templates=("names",))
    with pytest.raises(ValueError, match=r"templates: expected some of names, with .*out was"):
        CrayonInstructionDataset(samples)
    with pytest.raises(ValueError, match=r"max_number: expected 20, with which .*out was"):
        CrayonInstructionDataset(samples, templates=["names"], max_number=9)
    assert len(CrayonInstructionDataset(samples, templates=["names"])) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"grid": (8, 2)}, "was prepared with grid"), ({"reduce": "nearest"}, "prepared with reduce")],
)
def test_the_trainer_refuses_crayons_of_another_processor(
    coco_folder: Path,
    tmp_path: Path,
    tiny_processor: Callable[..., Any],
    change: dict[str, Any],
    message: str,
) -> None:
    """As many cells, so that no single crayon would be refused."""
    data = CrayonInstructionDataset(prepare(coco_folder, tmp_path / "out", **change))
    args = CollavoTrainingArguments(output_dir=str(tmp_path / "run"), stage="cpt", use_cpu=True)
    collator = CrayonCollator(tiny_processor())
    with pytest.raises(ValueError, match=message):
        CollavoTrainer(make_toy(), args, data, data_collator=collator)
    fits = CrayonInstructionDataset(prepare(coco_folder, tmp_path / "fits"))
    CollavoTrainer(make_toy(), args, fits, data_collator=collator)
    padded = CrayonCollator(tiny_processor(mode="pad", box_frame="padded"))
    with pytest.raises(ValueError, match=r"box_frame: expected 'image' for crayon instructions"):
        CollavoTrainer(make_toy(), args, fits, data_collator=padded)


def test_a_map_of_uncovered_segments_raises_from_pngs_and_is_left_out_of_shards(
    coco_folder: Path, coco_dataset: CocoPanopticDataset, tmp_path: Path
) -> None:
    empty = torch.zeros(20, 18, dtype=torch.int32)
    write_panoptic_png(coco_folder / "panoptic" / "002.png", empty)
    pngs = CrayonInstructionDataset(coco_dataset)
    assert len(pngs) == 3
    with pytest.raises(ValueError, match=r"002\.png: none of its listed segments covers a pixel"):
        pngs[1]
    assert len(CrayonInstructionDataset(prepare(coco_folder, tmp_path / "out"))) == 2


def test_a_copy_shares_its_epoch_with_workers_too(shards: PreparedDataset) -> None:
    copied = copy.deepcopy(CrayonInstructionDataset(shards))
    assert copied._epoch.is_shared()


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_shards_of_whole_pictures_are_refused_where_pictures_are_not(
    shards: PreparedDataset,
    coco_folder: Path,
    tmp_path: Path,
    tiny_processor: Callable[..., Any],
    mode: str,
) -> None:
    """One by one all pictures but squares would be left out, and a run be trained on the rest."""
    turns = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    path = coco_folder / "images" / "001.png"
    talks = ConversationDataset([{"conversation": turns, "image": str(path)}])
    talks.panoptic = PictureMaps(shards, [path])
    args = CollavoTrainingArguments(
        output_dir=str(tmp_path / "run"), stage="align", parts=["crayon"], use_cpu=True
    )
    collator = CrayonCollator(tiny_processor(mode=mode))
    message = {
        "pad": r"out: was prepared with image_mode 'squash', the processor has 'pad'",
        "crop": r"out: was prepared for processors that show all of an image, .*--panoptic",
    }[mode]
    for data in (talks, JoinedDataset([talks])):
        with pytest.raises(ValueError, match=message):
            CollavoTrainer(make_toy(), args, data, data_collator=collator)
    CollavoTrainer(make_toy(), args, talks, data_collator=CrayonCollator(tiny_processor()))
