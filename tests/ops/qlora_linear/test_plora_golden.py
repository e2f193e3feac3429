"""The PLoRA layers of the released code: outputs and gradients through ``qlora_linear``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collavo_kernels import LoRAAdapter, qlora_linear
from collavo_kernels.testing import relative_error

NAMES = ("Plora_A.weight", "Plora_B.weight", "Plora_main.weight", "Plora_main.bias")
SEGMENT_NAMES = ("Plora_seg_A.weight", "Plora_seg_B.weight")


def run(
    leaves: dict[str, Tensor], mask: Tensor | None, scaling: float, segments: bool, backend: str
) -> Tensor:
    """The layer: the adapter on image tokens only, the seg adapters as a table of rows."""
    table, index = None, None
    if segments and mask is not None:
        rows = leaves["seg"].flatten(0, 1)  # one row per image token, in reading order
        hidden = F.linear(rows, leaves["Plora_seg_A.weight"])
        table = scaling * F.linear(hidden, leaves["Plora_seg_B.weight"])
        order = mask.flatten().cumsum(0).view(mask.shape) - 1
        index = torch.where(mask, order, -1).int()
    adapter = LoRAAdapter(leaves["Plora_A.weight"], leaves["Plora_B.weight"], scaling)
    return qlora_linear(
        leaves["x"],
        leaves["Plora_main.weight"],
        [] if mask is None else [adapter],
        adapter_mask=None if mask is None else mask.to(torch.uint8),
        row_table=table,
        row_index=index,
        bias=leaves.get("Plora_main.bias"),
        backend=backend,
    )


def leaves_of(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    found = {n: tensors.get(f"{prefix}w.{n}") for n in (*NAMES, *SEGMENT_NAMES)}
    found |= {"x": tensors[f"{prefix}x"], "seg": tensors["seg"]}
    return {n: t.clone().requires_grad_() for n, t in found.items() if t is not None}


@pytest.mark.parametrize(
    "case", ["both", "seg_none", "no_image", "mask_none", "uneven", "w2.seg_none"]
)
@pytest.mark.parametrize("backend", ["", "reference"])
def test_recorded_layer(golden: Any, case: str, backend: str) -> None:
    tensors, facts = golden("plora")
    prefix = "w2." if case.startswith("w2.") else ""
    leaves = leaves_of(tensors, prefix)
    mask: Tensor | None = tensors["im_mask_uneven" if case == "uneven" else "im_mask"]
    if case == "mask_none":
        mask = None
    elif case == "no_image":
        mask = torch.zeros_like(tensors["im_mask"])
    scaling = facts["w2_dims" if prefix else "dims"]["scaling"]
    out = run(leaves, mask, scaling, case in ("both", "uneven"), backend)
    assert relative_error(out, tensors[f"{case}.out"]) < 1e-5
    out.backward(tensors[f"{prefix}gout"])
    checked = 0
    for name, leaf in leaves.items():
        recorded = tensors.get(f"{case}.grad.{name}")
        if recorded is None:
            continue
        assert leaf.grad is not None
        assert relative_error(leaf.grad, recorded) < 1e-5, name
        checked += 1
    assert checked >= 2


def test_recorded_layer_in_bfloat16(golden: Any) -> None:
    tensors, facts = golden("plora")
    leaves = {n: t.detach().bfloat16() for n, t in leaves_of(tensors).items()}
    out = run(leaves, tensors["im_mask"], facts["dims"]["scaling"], True, "")
    exact = tensors["both.out"].double()
    recorded = (tensors["both.out_bf16"].double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * recorded


def test_an_idle_adapter_cannot_poison_a_token() -> None:
    # The released code adds 0 * B(A(x)) when there is no image: an infinity in it gives NaN.
    x = torch.ones(3, 64)
    bad = LoRAAdapter(torch.full((2, 64), float("inf")), torch.ones(8, 2), 1.0)
    mask = torch.zeros(3, dtype=torch.uint8)
    weight = torch.ones(8, 64)
    assert torch.equal(qlora_linear(x, weight, [bad], adapter_mask=mask), x @ weight.T)
