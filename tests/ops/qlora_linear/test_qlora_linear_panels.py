"""The order that CPU kernels stream: lossless, and the same bits as the order of the rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from collavo_kernels import NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels._native import ISA_CODES, best_isa, native
from collavo_kernels.ops.qlora_linear.nf4.format import NF4_CODE
from collavo_kernels.testing import relative_error
from collavo_kernels.testing.cases.qlora_linear import CASES, QLoRACase, make_call

PACKABLE = [case for case in CASES if case.packable]
needs_native = pytest.mark.skipif(native() is None, reason="the compiled module is not there")
needs_bytes = pytest.mark.skipif(best_isa() != "avx512", reason="no AVX-512 byte products here")


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("shape", [(16, 64), (1, 64), (33, 192), (46, 320)], ids=str)
def test_rows_come_back(shape: tuple[int, int], block: int, nested: bool) -> None:
    # 33 and 46 rows do not fill the last panel; a block of 128 ends inside a row of 192 and of 320.
    weight = quantize_nf4(torch.randn(shape), block, nested)
    panels = weight.to_panels()
    assert panels.in_panels and not weight.in_panels
    assert panels.to_panels() is panels and weight.to_rows() is weight
    assert torch.equal(panels.to_rows().packed, weight.packed)
    assert torch.equal(panels.dequantize(), weight.dequantize())
    expected = weight.state_dict("w")
    found = panels.state_dict("w")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_tile_is_scales_and_turned_codes() -> None:
    weight = quantize_nf4(torch.randn(16, 64), double_quant=False)
    tile = weight.to_panels().packed[0, 0]
    assert torch.equal(tile[:64].view(torch.float32), weight.parts.absmax)
    rows = weight.packed.view(16, 8, 4)
    assert torch.equal(tile[64:].view(8, 16, 4), rows.transpose(0, 1))


def test_large_weights_begin_on_a_huge_page() -> None:
    panels = quantize_nf4(torch.randn(2048, 2048)).to_panels().packed
    assert panels.data_ptr() % (1 << 21) == 0


@pytest.mark.parametrize(
    ("shape", "block", "words"),
    [((8, 100), 64, "K = 100"), ((8, 64), 32, "blocks of 32")],
)
def test_what_cannot_lie_in_panels_says_why(shape: tuple[int, int], block: int, words: str) -> None:
    weight = quantize_nf4(torch.randn(shape), block)
    with pytest.raises(ValueError, match=f"weight: cannot lie in panels.*{words}"):
        weight.to_panels()


def test_other_devices_get_rows() -> None:
    weight = quantize_nf4(torch.randn(16, 64))
    moved = weight.to_panels().to("meta")
    assert moved.packed.shape == weight.packed.shape and moved.packed.is_meta
    with pytest.raises(ValueError, match="it is on meta, and panels are for CPU kernels"):
        moved.to_panels()


def test_panels_of_another_weight_are_refused() -> None:
    weight = quantize_nf4(torch.randn(16, 64)).to_panels()
    with pytest.raises(ValueError, match=r"packed: expected \[2, 1, 576\].*in panels"):
        NF4Weight(weight.packed, weight.scales, (32, 64))
    op = torch.ops.collavo.qlora_linear.default
    rest = (weight.scales, 16, 64, True, [], [], [], None, None, None, None)
    with pytest.raises(ValueError, match=r"weight: expected shape \[1, 1, 576\]"):
        op(torch.randn(2, 64), weight.packed[:, :, :-1], *rest)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("case", PACKABLE, ids=lambda c: c.name)
def test_same_bits_in_either_order(
    case: QLoRACase, isa: str, request: pytest.FixtureRequest
) -> None:
    module = native()
    assert module is not None
    if isa not in module.isas():
        pytest.skip(f"this processor or build has no {isa}")
    best = ISA_CODES[module.best_isa()]
    request.addfinalizer(lambda: module.use_isa(best))
    module.use_isa(ISA_CODES[isa])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = make_call(case, dtype)
        grad = torch.randn(*case.tokens, case.n).to(dtype)
        panels = call.weight.to_panels()
        out, grads = call.gradients(grad, "cpu")
        again, grads_again = call.__class__(**(vars(call) | {"weight": panels})).gradients(
            grad, "cpu"
        )
        for pair in zip([out, *grads], [again, *grads_again], strict=True):
            assert torch.equal(*pair)


def rounded_to_bytes(x: Tensor, weight: NF4Weight) -> Tensor:
    """What the 8-bit mode computes, in float64: both factors on their grids."""
    codes = torch.tensor([round(127 * code) / 127 for code in NF4_CODE], dtype=torch.float64)
    pairs = weight.packed.view(-1).int()
    dense = codes[torch.stack([pairs >> 4, pairs & 15], dim=1)].view(-1, 64)
    dense = (dense * weight_scales(weight).double()[:, None]).view(weight.shape)
    blocks = x.double().view(*x.shape[:-1], -1, 64)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    values = (blocks / step).round() * step
    return values.view(x.shape) @ dense.t()


def weight_scales(weight: NF4Weight) -> Tensor:
    """One scale per block of 64."""
    return weight.dequantize(torch.float32).view(-1, 64).abs().amax(1)


@needs_bytes
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 17, 64])
def test_bytes_are_what_their_grids_say(tokens: int) -> None:
    # A scale is a block's largest value, since quantisation always uses code 1 or -1 for it.
    weight = quantize_nf4(torch.randn(70, 256), double_quant=False)
    x = torch.randn(tokens, 256)
    with torch.no_grad():
        for each, dtype in itertools.product(
            (weight, weight.to_panels()), (torch.float32, torch.bfloat16)
        ):
            values = x.to(dtype)
            out = qlora_linear(values, each, int8_activations=True)
            # A product that falls between two steps may go either way in float32.
            limit = 2e-3 if dtype == torch.float32 else 2e-3 + 2**-8
            assert relative_error(out, rounded_to_bytes(values, weight)) < limit
            exact = values.double() @ weight.dequantize(torch.float64).t()
            assert relative_error(out, exact) < 0.02


@needs_bytes
def test_bytes_leave_the_adapters_exact() -> None:
    case = next(c for c in CASES if c.name == "few")
    call = make_call(case, torch.float32)
    options = {
        "adapter_mask": call.adapter_mask,
        "row_table": call.row_table,
        "row_index": call.row_index,
        "bias": call.bias,
    }
    with torch.no_grad():
        whole = qlora_linear(call.x, call.weight, call.adapters, **options, int8_activations=True)
        base = qlora_linear(call.x, call.weight, int8_activations=True)
        rest = call.run() - qlora_linear(call.x, call.weight)
    torch.testing.assert_close(whole - base, rest, atol=1e-5, rtol=1e-5)


@needs_bytes
def test_bytes_keep_a_bad_token_to_itself() -> None:
    weight = quantize_nf4(torch.randn(32, 128)).to_panels()
    x = torch.randn(4, 128)
    bad = x.clone()
    bad[1, 3], bad[2, 70] = float("nan"), float("inf")
    with torch.no_grad():
        good = qlora_linear(x, weight, int8_activations=True)
        out = qlora_linear(bad, weight, int8_activations=True)
    assert torch.equal(out[[0, 3]], good[[0, 3]])
    assert out[1:3].isnan().all()
    assert (qlora_linear(torch.zeros(2, 128), weight, int8_activations=True) == 0).all()


@needs_bytes
def test_bytes_of_nothing_and_of_next_to_nothing() -> None:
    weight = quantize_nf4(torch.randn(32, 64))
    assert qlora_linear(torch.empty(0, 64), weight, int8_activations=True).shape == (0, 32)
    tiny = qlora_linear(torch.full((1, 64), 1e-38), weight, int8_activations=True)
    assert (tiny == 0).all()


@needs_native
def test_bytes_are_refused_where_they_cannot_serve() -> None:
    weight = quantize_nf4(torch.randn(32, 64))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="int8_activations: it is for inference"):
        qlora_linear(x.requires_grad_(), weight, int8_activations=True)
    with pytest.raises(ValueError, match=r"up to 64 tokens, got 65|needs a processor"):
        qlora_linear(torch.randn(65, 64), weight, int8_activations=True)
    with pytest.raises(ValueError, match=r"K = 100|needs a processor"):
        qlora_linear(torch.randn(2, 100), quantize_nf4(torch.randn(8, 100)), int8_activations=True)
    with pytest.raises(ValueError, match="does not round x to 8 bits"):
        qlora_linear(x.detach(), weight, int8_activations=True, backend="reference")
