"""Layers whose weights accelerate keeps elsewhere, and dtypes that stand beside each other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collavo_kernels.nn import (
    CrayonPrompt,
    DualQLoRALinear,
    has_own_forward,
    load_peft_adapter,
    save_peft_adapter,
)
from collavo_kernels.nn.attention.projections import project, project_with_rows
from collavo_kernels.ops.panoptic_lookup import CrayonMap

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


def make_layer(bias: bool = True, **options: Any) -> DualQLoRALinear:
    torch.manual_seed(0)
    layer = DualQLoRALinear(64, 48, bias, rank=4, **options)
    for factor in layer.lora_B.values():
        factor.weight.data.normal_()
    return layer


def offload(module: nn.Module, folder: Path | None) -> None:
    if folder is None:
        accelerate.cpu_offload(module, execution_device=CPU)
    else:
        accelerate.disk_offload(module, str(folder), execution_device=CPU)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_an_offloaded_layer(
    quantized: bool, double_quant: bool, packed: bool, on_disk: bool, tmp_path: Path
) -> None:
    """Offload stores the state dict, where the scales have other names and panels are rows."""
    layer, x = make_layer(quantized=quantized, double_quant=double_quant), torch.randn(5, 64)
    if packed:
        layer(x)
    twin = copy.deepcopy(layer)
    mask = torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8)
    expected = layer(x, mask)
    offload(layer, tmp_path if on_disk else None)
    assert layer.weight.is_meta and layer.lora_A["image"].weight.is_meta
    for _ in range(2):
        assert torch.equal(layer(x, mask), expected)
        assert layer.weight.is_meta
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)
    assert torch.equal(layer(x, mask), expected)
    own, other = layer.state_dict(), twin.state_dict()
    assert list(own) == list(other) and all(torch.equal(own[n], other[n]) for n in own)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_whose_hook_took_its_parameters(double_quant: bool, packed: bool) -> None:
    """Values are then stored by parameter, in panels where they lay so; a save has the entries."""
    layer, x = make_layer(bias=False, double_quant=double_quant), torch.randn(5, 64)
    if packed:
        layer(x)
    expected, saved = layer(x), layer.state_dict()
    hook = accelerate.hooks.AlignDevicesHook(CPU, offload=True)
    accelerate.hooks.add_hook_to_module(layer, hook)
    for _ in range(2):
        own = layer.state_dict()
        assert list(own) == list(saved) and all(torch.equal(own[n], saved[n]) for n in own)
        assert torch.equal(layer(x), expected) and layer.weight.is_meta


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_get_no_bias_where_it_is_offloaded(quantized: bool) -> None:
    """A bias that is read beside the layer is not there."""
    layer, x = make_layer(quantized=quantized), torch.randn(7, 64)
    expected = project_with_rows(layer, x, None, 4)
    offload(layer, None)
    assert torch.equal(project_with_rows(layer, x, None, 4), expected)
    with pytest.raises(ValueError, match="tokens: expected None beside row_table"):
        layer(x, None, x, torch.zeros(7, dtype=torch.int32), 4)
    plain = nn.Linear(64, 48)
    offload(plain, None)
    with pytest.raises(ValueError, match="projections: the bias of a Linear is offloaded"):
        project_with_rows(plain, x, None, 4)


def test_an_offloaded_prompt() -> None:
    crayon = CrayonMap(*[torch.zeros(2, 3, dtype=torch.int32)], *[torch.tensor([0, 2])] * 6)
    prompt = CrayonPrompt(embed_dim=8, hidden_size=16, zero_init=False)
    expected = prompt(crayon)
    offload(prompt, None)
    assert torch.equal(prompt(crayon), expected)


def test_what_would_be_lost_under_offload_is_refused(tmp_path: Path) -> None:
    layer, x = make_layer(), torch.randn(3, 64)
    state = {key: torch.randn_like(v) for key, v in layer.peft_state_dict("vl").items()}
    expected = layer(x)
    offload(layer, None)
    saved = layer.peft_state_dict("vl")
    assert not any(value.is_meta for value in saved.values())
    with pytest.raises(ValueError, match="materialise the model, or take offloading off"):
        layer.load_peft_adapter(state, "vl", config={"r": 4, "lora_alpha": 4})
    with pytest.raises(ValueError, match="merge before the model is offloaded"):
        layer.merge()
    assert torch.equal(layer(x), expected)


def test_a_load_into_a_partly_offloaded_model_changes_nothing(tmp_path: Path) -> None:
    """The hook of the last layer brings its values back whenever the layer is asked for them."""
    model = nn.Sequential(make_layer(), make_layer())
    save_peft_adapter(model, tmp_path, "vl")
    offload(model[1], None)
    nn.init.zeros_(model[0].adapter("vl").b)
    with pytest.raises(ValueError, match="1: its adapter is on the meta device"):
        load_peft_adapter(model, tmp_path, "vl")
    assert not model[0].adapter("vl").b.any()


def test_a_forward_of_the_instance() -> None:
    layer = nn.Linear(2, 2)
    assert not has_own_forward(layer)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert has_own_forward(layer)
    accelerate.hooks.remove_hook_from_module(layer)
    assert "forward" in vars(layer) and not has_own_forward(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_bias_adapters_and_table_in_another_16_bit_dtype(
    quantized: bool, other: torch.dtype, dtype: torch.dtype
) -> None:
    """bitsandbytes' layers bring their bias to the compute dtype, whatever x is; PEFT's any x."""
    layer = make_layer(quantized=quantized, dtype=dtype, adapter_dtype=other)
    assert layer.bias is not None
    layer.bias.data = layer.bias.data.to(other)
    x, table = torch.randn(5, 64).to(dtype), torch.randn(2, 48).to(other)
    index = torch.tensor([0, -1, 1, 0, 0], dtype=torch.int32)
    wide = copy.deepcopy(layer)
    for parameter in (wide.bias, *wide.lora_A.parameters(), *wide.lora_B.parameters()):
        assert parameter is not None
        parameter.data = parameter.data.float()  # exact: the same values
    found = layer(x, None, table, index)
    expected = wide(x, None, table.float(), index)
    assert found.dtype == dtype
    slack = 0.0 if other != dtype else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        found, expected, atol=slack * float(expected.detach().abs().max()), rtol=0
    )
    found.sum().backward()
    assert layer.bias.grad is not None and layer.bias.grad.dtype == other
    assert layer.lora_A["vl"].weight.grad is not None


def test_a_table_of_another_dtype_beside_a_plain_layer() -> None:
    layer, x = nn.Linear(8, 6).to(torch.bfloat16), torch.randn(3, 8).to(torch.bfloat16)
    table, index = torch.randn(1, 6).half(), torch.tensor([0, -1, 0], dtype=torch.int32)
    found: Tensor = project(layer, x, None, table, index)
    expected = layer(x).double() + torch.where(index[:, None] >= 0, table.double(), 0)
    eps = torch.finfo(torch.bfloat16).eps
    assert float((found - expected).abs().max()) <= 2 * eps * float(expected.abs().max())
