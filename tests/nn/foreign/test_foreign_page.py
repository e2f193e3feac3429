"""The page on somebody else's models: its code as pasted, on a stand-in of the original LLaVA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from collavo_kernels.nn import DualQLoRALinear
from tests.nn.foreign.llava_stand_in import stand_in
from tests.nn.foreign.stand_in_batch import IDS, LABELS, MASK, images

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "collavo_kernels" / "nn" / "foreign" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def lines_of(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip()]


def test_the_code_runs_as_pasted_and_is_short() -> None:
    training, answering, swapping, crops = BLOCKS
    assert len(lines_of(training)) <= 10
    assert len(lines_of(answering)) + len(lines_of(swapping)) <= 6
    model = stand_in().train()
    maps = torch.tensor([[[7, 7, 7], [7, 2, 2], [0, 2, 2]]] * 2, dtype=torch.int32)
    given: dict[str, Any] = {
        "model": model,
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": LABELS,
        "images": images(),
        "segment_maps": maps,
        "segment_ids": [torch.tensor([2, 7], dtype=torch.int32)] * 2,
        "segment_classes": [torch.tensor([5, 0], dtype=torch.int32)] * 2,
    }
    exec(training, given)
    last = model.crayon_prompt.mlp[2].weight  # zeros: the factor that the first step reaches
    assert last.grad is not None and last.grad.abs().sum() > 0
    for parameter in model.crayon_prompt.parameters():
        torch.nn.init.normal_(parameter)
    model.eval()
    plain = model.generate(IDS, images=images(), attention_mask=MASK)
    exec(answering, given)
    assert given["tokens"].shape == plain.shape and not torch.equal(given["tokens"], plain)
    exec(swapping, given)
    assert sum(isinstance(m, DualQLoRALinear) for m in model.modules()) == 14
    given |= {"squared_map": maps[:1], "lines": 3, "columns": 3}
    exec(crops, given)
    # Rows of the picture: unknown, 2, 7; each of three lines ends with a newline.
    (index,) = given["row_index"]
    assert index[:4].tolist() == given["coarse"].row_index[0].tolist()
    assert index[4:].tolist() == [2, 2, 2, -1, 2, 1, 1, -1, 0, 1, 1, -1]
