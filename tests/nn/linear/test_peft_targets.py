"""PEFT's own adapters on our layers: what PEFT computes on the dense weight, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from collavo_kernels import NF4Weight
from collavo_kernels.nn import (
    DualQLoRALinear,
    load_peft_adapter,
    peft_lora_config,
    save_peft_adapter,
)
from collavo_kernels.testing import assert_within_budget

K, N, RANK = 64, 32, 4
NAMES = ["q_proj", "v_proj"]


class Net(nn.Module):
    """Two layers one after the other."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.q_proj, self.v_proj = make(K, N), make(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))  # type: ignore[no-any-return]


def net(quantized: bool = True, adapters: tuple[str, ...] = ("image",)) -> Net:
    torch.manual_seed(0)

    def make(k: int, n: int) -> DualQLoRALinear:
        layer = DualQLoRALinear(
            k, n, bias=True, adapters=adapters, rank=2, quantized=quantized, block_size=64
        )
        for name in adapters:
            nn.init.normal_(layer.adapter(name).b, std=0.2)
        return layer

    return Net(make)


def dense_like(source: Net, dtype: torch.dtype) -> Net:
    """Return plain layers with the dequantised weights, the layers' own adapters folded in."""

    def fold(layer: DualQLoRALinear) -> nn.Linear:
        made = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
        base = layer.base()
        weight = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base
        weight = weight.detach().to(torch.float64)
        for name in layer.adapter_names:
            a, b, scaling = layer.adapter(name)
            weight = weight + scaling * (b.double() @ a.double()).detach()
        made.weight.data.copy_(weight)
        assert layer.bias is not None
        made.bias.data.copy_(layer.bias.detach())
        return made

    plain = copy.deepcopy(source)
    plain.q_proj, plain.v_proj = fold(source.q_proj), fold(source.v_proj)
    return plain


def draw(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def results(model: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return a model's output and the gradients of PEFT's adapters."""
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = model(x)
    out.square().sum().backward()
    factors = [p for name, p in model.named_parameters() if ".default." in name]
    return [out.detach(), *(p.grad.double() for p in factors)]


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}, {"lora_alpha": 1}]
)
@pytest.mark.parametrize("quantized", [True, False])
def test_it_computes_what_peft_does_on_the_dense_weight(
    quantized: bool, options: dict[str, Any]
) -> None:
    settings = {"r": RANK, "target_modules": NAMES, **options}
    ours = net(quantized)
    found, low, exact = [], [], []
    for target, model, dtype in (
        (found, get_peft_model(copy.deepcopy(ours), peft_lora_config(**settings)), torch.float32),
        (
            low,
            get_peft_model(dense_like(ours, torch.float32), LoraConfig(**settings)),
            torch.float32,
        ),
        (
            exact,
            get_peft_model(dense_like(ours, torch.float64), LoraConfig(**settings)),
            torch.float64,
        ),
    ):
        draw(model)
        target += results(model, dtype)
    assert len(found) == 5
    for ours_, plain, truth in zip(found, low, exact, strict=True):
        assert_within_budget(ours_, plain, truth)


def test_peft_trains_its_own_alone() -> None:
    """The layer's own adapters are the base of PEFT's, which does not save them."""
    model = net(False)
    model.q_proj.set_trainable("image")
    tuned = get_peft_model(model, peft_lora_config(r=RANK, target_modules=NAMES))
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)


def test_masks_and_rows_reach_the_layer_inside() -> None:
    """A mask switches the layer's own adapters; PEFT's act on all tokens, and on rows behind."""
    plain = net(adapters=("image", "vl")).q_proj
    tuned = get_peft_model(
        copy.deepcopy(nn.ModuleDict({"q_proj": plain})),
        peft_lora_config(r=RANK, target_modules=NAMES),
    )
    draw(tuned)
    layer: Any = tuned.base_model.model["q_proj"]
    generator = torch.Generator().manual_seed(2)
    x, table = torch.randn(6, K, generator=generator), torch.randn(2, N, generator=generator)
    mask = torch.tensor([0, 1, 2, 3, 3, 1], dtype=torch.uint8)
    index = torch.tensor([-1, 0, 1, 1, -1, 0], dtype=torch.int32)
    branch = layer.get_delta_weight("default")
    for arguments in ((mask,), (mask, table, index), (mask, None, None, 4)):
        expected = plain(x, *arguments) + x @ branch.T
        torch.testing.assert_close(layer(x, *arguments), expected)


def test_a_folder_of_peft_loads_through_the_helper(tmp_path: Path) -> None:
    """PEFT does not save the way to our layers; read without the helper they are refused."""
    x = torch.randn(4, K)
    for init in (True, "gaussian", "eva"):
        folder = tmp_path / str(init)
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": 3, "use_rslora": True}
        config = peft_lora_config(target_modules=NAMES, init_lora_weights=init, **settings)
        tuned = get_peft_model(net(), config)
        draw(tuned)
        tuned.save_pretrained(folder)
        again = PeftModel.from_pretrained(net(), folder, config=peft_lora_config(folder))
        assert torch.equal(again(x), tuned(x))
        again.load_adapter(folder, "second")
        again.set_adapter("second")
        assert torch.equal(again(x), tuned(x))
        assert torch.equal(again.unload()(x), net()(x))
        slots = net(adapters=("image", "vl"))
        for layer in (slots.q_proj, slots.v_proj):
            nn.init.zeros_(layer.adapter("image").b)
        own = net(adapters=())
        bare = PeftModel.from_pretrained(own, folder, config=peft_lora_config(folder))
        load_peft_adapter(slots, folder, "vl")
        for name in NAMES:  # the same bytes under another adapter's draw
            left, right = getattr(slots, name), getattr(own, name).base_layer
            right.load_state_dict(
                {k: v for k, v in left.state_dict().items() if "lora_" not in k}, strict=False
            )
        torch.testing.assert_close(slots(x), bare(x))
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(net(), folder)


def test_a_slot_is_saved_from_under_peft(tmp_path: Path) -> None:
    """Names are those of the model without PEFT around its layers."""
    model, other = net(), net()
    get_peft_model(model, peft_lora_config(r=RANK, target_modules=["q_proj"]))
    save_peft_adapter(model, tmp_path, "image")
    for layer in (other.q_proj, other.v_proj):
        nn.init.zeros_(layer.adapter("image").b)
    assert load_peft_adapter(other, tmp_path, "image") == NAMES
    x = torch.randn(4, K)
    assert torch.equal(other(x), net()(x))


def test_merging() -> None:
    """A dense weight takes the branches; a 4-bit one would be rounded again and is left."""
    x = torch.randn(4, K)
    tuned = get_peft_model(net(False), peft_lora_config(r=RANK, target_modules=NAMES))
    draw(tuned)
    expected = tuned(x).detach()
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(x), expected)
    tuned.unmerge_adapter()
    torch.testing.assert_close(tuned(x), expected)
    merged = tuned.merge_and_unload()
    assert type(merged.q_proj) is DualQLoRALinear
    torch.testing.assert_close(merged(x), expected)

    tuned = get_peft_model(net(), peft_lora_config(r=RANK, target_modules=NAMES))
    draw(tuned)
    expected = tuned(x).detach()
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(ValueError, match=r"merge: expected a dense weight.*load_peft_adapter"):
            merge()
        assert torch.equal(tuned(x), expected)
    model = net(False)
    model.q_proj.merge()
    tuned = get_peft_model(model, peft_lora_config(r=RANK, target_modules=NAMES))
    with pytest.raises(ValueError, match=r"its unmerge\(\) first"):
        tuned.merge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is set.*DoRA.*leave it out"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"init_lora_weights": "pissa"}, "PiSSA.*leave it out"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights: expected"),
        ({"target_modules": "all-linear"}, "target_modules: .*nn.Linear"),
    ],
)
def test_what_a_four_bit_layer_cannot_have_is_refused(
    options: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"r": RANK, "target_modules": NAMES, **options}
    with pytest.raises(ValueError, match=message):
        peft_lora_config(**settings)
    with pytest.raises(ValueError, match=message):
        peft_lora_config(LoraConfig(**settings))


def test_what_is_added_later_is_refused_too(tmp_path: Path) -> None:
    tuned = get_peft_model(net(), peft_lora_config(r=RANK, target_modules=NAMES))
    with pytest.raises(ValueError, match="use_dora"):
        tuned.add_adapter("dora", LoraConfig(use_dora=True, target_modules=NAMES))
    with pytest.raises(ValueError, match="adapter_name: 'image'"):
        get_peft_model(net(), peft_lora_config(target_modules=NAMES), adapter_name="image")
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(
            net(), peft_lora_config(target_modules=[], target_parameters=["q_proj.weight"])
        )
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: missing"):
        peft_lora_config(tmp_path)
    with pytest.raises(TypeError, match="options: expected none beside source, got r"):
        peft_lora_config(tmp_path, r=2)
    with pytest.raises(TypeError, match="source: expected a LoraConfig"):
        peft_lora_config(7)  # type: ignore[arg-type]


def test_a_configuration_is_copied() -> None:
    """Nothing global changes, nor the configuration that was given."""
    given = LoraConfig(r=RANK, target_modules=NAMES)
    assert peft_lora_config(given)._custom_modules and not given._custom_modules
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(net(), given)
