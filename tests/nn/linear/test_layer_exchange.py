"""Real bitsandbytes layers and PEFT QLoRA adapters go in and come out again, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels import NF4Weight
from collavo_kernels.nn import DualQLoRALinear, load_peft_adapter, save_peft_adapter

bnb = pytest.importorskip("bitsandbytes")
NAMES = ("o_proj", "q_proj")
WIDTH, INNER = 64, 128


def four_bit(k: int, n: int, **options: Any) -> Any:
    dense = nn.Linear(k, n)
    made = bnb.nn.Linear4bit(k, n, quant_type="nf4", compute_dtype=torch.float32, **options)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")


class Model(nn.Module):
    """Two linear layers under names that PEFT looks for."""

    is_loaded_in_4bit = True  # where PEFT asks whether to make its 4-bit layers

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj, self.o_proj = four_bit(WIDTH, INNER), four_bit(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(F.gelu(self.q_proj(x)))
        return out


def converted() -> Model:
    model = Model()
    for name in NAMES:
        setattr(model, name, DualQLoRALinear.from_bitsandbytes(getattr(model, name), rank=2))
    return model


@pytest.mark.parametrize("slot", ["image", "vl"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_peft_qlora_adapter_in_either_slot_and_back(
    tmp_path: Path, slot: str, packed: bool
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(NAMES),
        rank_pattern={"o_proj": 8},
        init_lora_weights=False,
    )
    # In eval mode bitsandbytes' layers would repack themselves for their CPU kernel.
    theirs = peft.get_peft_model(Model(), config).train()
    assert type(theirs.base_model.model.q_proj).__module__ == "peft.tuners.lora.bnb"
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = converted(), torch.randn(5, WIDTH)
    layers = [getattr(ours, name) for name in NAMES]
    for layer in layers:
        assert layer.pack() if packed else layer.unpack()
    other = "vl" if slot == "image" else "image"
    kept = [layer.peft_state_dict(other)["lora_A.weight"].clone() for layer in layers]
    assert load_peft_adapter(ours, tmp_path / "theirs", slot) == list(NAMES)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    for layer, a in zip(layers, kept, strict=True):
        assert torch.equal(layer.peft_state_dict(other)["lora_A.weight"], a)
    save_peft_adapter(ours, tmp_path / "ours", slot)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    back = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours").train()
    assert torch.equal(back(x), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_go_through_files_in_both_directions(tmp_path: Path, double_quant: bool) -> None:
    theirs = four_bit(INNER, WIDTH, compress_statistics=double_quant)
    recorded = {name: value.clone() for name, value in theirs.state_dict().items()}
    save_file(recorded, tmp_path / "theirs.safetensors")
    ours = DualQLoRALinear(INNER, WIDTH, bias=True, adapters=())
    ours.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    ours(torch.randn(2, INNER))
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    state = load_file(tmp_path / "ours.safetensors")
    assert state.keys() == recorded.keys()
    assert all(torch.equal(value, recorded[name]) for name, value in state.items())
    stats = {name: value for name, value in state.items() if name.startswith("weight.")}
    again = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    dense = bnb.functional.dequantize_4bit(again.data, again.quant_state)
    base = ours.pack().base()
    assert isinstance(base, NF4Weight) and base.in_panels
    assert torch.equal(base.dequantize(), dense)
    parameter = base.to_bitsandbytes()
    assert torch.equal(parameter.data, theirs.weight.data)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_that_ran_bitsandbytes_own_kernel_is_refused(double_quant: bool) -> None:
    """It rounds the scales to bfloat16 and forgets them, so no path gives the old bytes back."""
    layer = four_bit(INNER, WIDTH, compress_statistics=double_quant)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    early = DualQLoRALinear.from_bitsandbytes(layer, adapters=())
    with torch.no_grad():
        layer.eval()(torch.randn(2, INNER))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes has no packed kernel for this processor")
    codes = layer.weight.data.clone()
    with pytest.raises(ValueError, match=r"weight: expected bitsandbytes' original bytes, got .*"):
        DualQLoRALinear.from_bitsandbytes(layer)
    assert torch.equal(layer.weight.data, codes), "a refusal changes nothing"
    # What was converted before has bytes of its own.
    state = early.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.items())
    # Should bitsandbytes come to keep its scales, this fails: then the refusal can go.
    after = layer.state_dict()
    assert torch.equal(after["weight"], before["weight"])
    assert after["weight.absmax"].shape != before["weight.absmax"].shape or not torch.equal(
        after["weight.absmax"], before["weight.absmax"]
    )


def test_merging_a_packed_layer() -> None:
    layer, x = DualQLoRALinear.from_linear(nn.Linear(INNER, WIDTH), rank=4), torch.randn(3, INNER)
    for name in layer.adapter_names:
        nn.init.normal_(layer.adapter(name).b, std=0.1)
    dense = layer.merge().merged_weight
    before = layer.unmerge().pack()(x)
    weight = layer.weight
    assert torch.equal(layer.merge().merged_weight, dense)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    assert layer.unmerge().weight is weight and torch.equal(layer(x), before)


STORAGE = ("uint8", "int8", "bfloat16", "float16", "float32", "float64")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", STORAGE)
def test_storage_is_a_way_to_see_the_same_bytes(storage: str, double_quant: bool) -> None:
    """FSDP shards parameters of one dtype, so its QLoRA recipes see the codes as bfloat16."""
    dense = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))

    def made(dtype: torch.dtype) -> Any:
        layer = bnb.nn.Linear4bit(
            64,
            48,
            bias=False,
            quant_type="nf4",
            compress_statistics=double_quant,
            quant_storage=dtype,
        )
        layer.weight = bnb.nn.Params4bit(
            dense.clone(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=double_quant,
            quant_storage=dtype,
            module=layer,
        )
        return layer.to("cpu")

    plain, seen = made(torch.uint8), made(getattr(torch, storage))
    assert seen.weight.dtype == getattr(torch, storage)
    base = DualQLoRALinear.from_bitsandbytes(plain, adapters=()).state_dict()
    layer = DualQLoRALinear.from_bitsandbytes(seen, adapters=())
    assert layer.state_dict().keys() == base.keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, base[name]), name
    # What bitsandbytes saves has its storage too, and so has a folder of it.
    saved = {f"q.{name}": value for name, value in seen.state_dict().items()}
    read = NF4Weight.from_state_dict(saved, "q.weight")
    assert torch.equal(read.packed, layer.weight) and torch.equal(read.scales, layer.weight_scales)
    assert torch.equal(layer.unpack().weight, plain.weight), "no byte of the layer was moved"


def test_fp4_is_refused_by_name() -> None:
    """The default of BitsAndBytesConfig: the same codes, for other values."""
    layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match=r"expected quant_type 'nf4', got 'fp4'.*quant_type='nf4'"):
        DualQLoRALinear.from_bitsandbytes(layer)
    saved = {f"q.{name}": value for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"q\.weight\.quant_state\.bitsandbytes__nf4: missing"):
        NF4Weight.from_state_dict(saved, "q.weight")
