"""NF4 bytes as bitsandbytes makes them, and dense values as it should make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collavo_kernels import NF4Weight, quantize_nf4
from collavo_kernels.ops.qlora_linear.nf4.format import NF4_CODE, block_count, block_scales
from collavo_kernels.ops.qlora_linear.nf4.quantize import dynamic_code


def test_codes(golden: Any) -> None:
    tensors, _ = golden("nf4")
    assert tensors["nf4_code"].tolist() == list(NF4_CODE)
    assert torch.equal(dynamic_code(), tensors["nested_code"])


def test_every_recorded_matrix(golden: Any) -> None:
    tensors, _ = golden("nf4")
    checked = 0
    for key, packed in tensors.items():
        if not key.endswith(".packed"):
            continue
        name, mode, _ = key.rsplit(".", 2)
        nested = mode == "nested"
        block_size = int(mode[2:]) if mode.startswith("bs") else 64
        weight = quantize_nf4(tensors[f"{name}.A"], block_size, nested)
        stem = f"{name}.{mode}"
        assert torch.equal(weight.packed, packed), stem
        # The recorded notes allow a neighbouring code here; ours are the very bytes.
        assert torch.equal(weight.parts.absmax, tensors[f"{stem}.absmax"]), stem
        if nested:
            for part in ("offset", "nested_absmax"):
                assert torch.equal(getattr(weight.parts, part), tensors[f"{stem}.{part}"]), stem
            blocks = block_count(weight.shape, block_size)
            scales = block_scales(weight.scales, blocks, True)
            assert torch.equal(scales, tensors[f"{stem}.absmax_dequant"]), stem
        # Where bitsandbytes' CPU kernel takes a wrong scale the flat formula was recorded beside.
        dense = tensors.get(f"{stem}.dequant_flat_ref", tensors.get(f"{stem}.dequant"))
        if dense is not None:
            assert torch.equal(weight.dequantize(), dense), stem
        checked += 1
    assert checked > 50


def test_bytes_do_not_depend_on_threads() -> None:
    # 65536 scales: more than torch sums on one thread when it has two.
    matrix = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    scales = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scales.append(quantize_nf4(matrix).scales)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*scales)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (7, 9), (300, 64), (12, 160)])
def test_bitsandbytes_round_trip(shape: tuple[int, int], double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(shape)
    packed, state = functional.quantize_4bit(
        matrix, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    weight = NF4Weight.from_bitsandbytes(packed, state)
    own = quantize_nf4(matrix, 64, double_quant)
    assert torch.equal(weight.packed, own.packed) and torch.equal(weight.scales, own.scales)
    back = weight.to_bitsandbytes()
    theirs, ours = state.as_dict(packed=True), back.quant_state.as_dict(packed=True)
    assert torch.equal(back.data, packed) and list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    entries = weight.state_dict("w")
    assert all(torch.equal(entries[f"w.{key}"], value) for key, value in theirs.items())
    again = NF4Weight.from_state_dict(entries, "w")
    assert torch.equal(again.scales, weight.scales) and again.shape == shape


def test_layers_that_are_not_nf4_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="not quantised yet"):
        NF4Weight.from_bitsandbytes(bnb.nn.Linear4bit(64, 64, quant_type="nf4").weight)
    fp4 = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="expected quant_type 'nf4', got 'fp4'"):
        NF4Weight.from_bitsandbytes(fp4.weight)


def test_values_that_are_not_finite_stay_in_their_block() -> None:
    matrix = torch.randn(2, 64)
    matrix[0, 3] = float("nan")
    dense = quantize_nf4(matrix, double_quant=False).dequantize()
    assert dense[0].isnan().all() and dense[1].isfinite().all()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("w.absmax", None, r"w\.absmax: missing from the state dict"),
        ("w.absmax", lambda t: t[:-1], r"w\.absmax: expected 64 values of uint8"),
        ("w", lambda t: t[:-5], r"w: expected 2048 bytes \(uint8\)"),
        # As many bytes, and every code is one of two.
        ("w", lambda t: t.bool(), r"w: expected the bytes of 4-bit codes as uint8"),
        (
            "w.nested_absmax",
            lambda t: t.double(),
            r"nested_absmax: expected 1 values of float32",
        ),
        ("w.quant_map", lambda t: t.neg(), r"w\.quant_map: expected the 16 values of NF4"),
        ("w.quant_state.bitsandbytes__nf4", lambda t: t[:9], "expected JSON in bytes"),
    ],
)
def test_corrupt_state_dicts(key: str, change: Any, message: str) -> None:
    entries = quantize_nf4(torch.randn(64, 64)).state_dict("w")
    if change is None:
        del entries[key]
    else:
        entries[key] = change(entries[key])
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_state_dict(entries, "w")
