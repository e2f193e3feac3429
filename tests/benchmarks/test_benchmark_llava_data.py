"""The benchmark of LLaVA's data: the peers do the same work, to the last id, label and bit."""

from __future__ import annotations

import torch

from benchmarks.ops import llava_data_providers as bench
from benchmarks.ops.llava_data_cases import IMAGE, rows


def test_text_is_the_same() -> None:
    turns = bench.conversation()
    theirs = bench.TEXTS["transformers"](turns)()
    ours = bench.TEXTS["ours-batch"](turns)()
    assert ours["input_ids"][0, 1:].tolist() == theirs["input_ids"]  # without the start token
    mask = [label >= 0 for label in ours["labels"][0, 1:].tolist()]
    assert mask == [bool(one) for one in theirs["assistant_masks"]]
    measured = bench.TEXTS["ours"](turns)()
    assert (measured.tokens, measured.image_tokens) == (len(mask) + 1, 576)
    assert measured.targets == sum(mask)


def test_pixels_are_the_same() -> None:
    pixels = {}
    for row in rows("cpu"):
        if row.case == IMAGE:
            pixels[row.provider] = bench.prepare(row, torch.device("cpu")).run()
    assert pixels["ours"].shape == (1, 3, 336, 336)
    assert torch.equal(pixels["ours"], pixels["transformers"])
