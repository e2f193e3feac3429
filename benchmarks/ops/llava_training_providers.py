"""Who trains in LLaVA's stages: ours, and stock LLaVA with PEFT, on bitsandbytes' layers or dense.

All start from the same bfloat16 weights. Ours has them in 4 bits, in both stages; of the peers one
has bitsandbytes' 4 bits and the other keeps them. The vision tower is one layer: nobody trains it,
and it is the same for all.

A peer's models are made for training and never evaluated: bitsandbytes' CPU layer, once it has
served a forward without gradients, leaves the gradient through its weight out. What a peer trains
is looked at before it is timed: the projector's gradient has to be that of ours, and ours's that of
float64 where that fits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import peers
from benchmarks.ops.end_to_end_providers import LINEARS
from benchmarks.ops.llava_training_cases import (
    ALPHA,
    CASES,
    CRAYON,
    LORA,
    QLORA,
    RANK,
    Case,
    batch,
    crayon,
)
from benchmarks.registry import Call, Row
from collavo import CollavoConfig, CollavoForConditionalGeneration
from collavo.train.stages import prepare_stage
from collavo_kernels.testing import relative_error

ADAPTER = "instruct"
# Six roundings of bfloat16 to a layer, forward and back, in two different orders.
FAR = 0.05
# Beyond so many layers float64 does not fit beside the rest.
EXACT_LAYERS = 4


def configuration(kind: Any, text: Any, case: Case) -> Any:
    """Return a LLaVA's configuration with a tower of one layer."""
    vision = CLIPVisionConfig(
        hidden_size=case.vision,
        intermediate_size=case.vision,
        num_hidden_layers=1,
        num_attention_heads=case.vision // 64 or 1,
        image_size=4 * case.grid,
        patch_size=4,
    )
    return kind(
        vision_config=vision,
        text_config=text,
        image_token_index=case.vocabulary - 1,
        vision_feature_layer=-1,
    )


def stock_model(case: Case) -> LlavaForConditionalGeneration:
    """Build transformers' LLaVA with random weights."""
    text = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // case.head_dim,
    )
    return LlavaForConditionalGeneration(configuration(LlavaConfig, text, case))


class Setting:
    """The weights of a case and a batch; models are made of copies of them.

    Args:
        case: The sizes.
        mode: The stage.
        device: Where it runs.
    """

    def __init__(self, case: Case, mode: str, device: torch.device) -> None:
        """Draw the weights, the batch, and where the adapters start: B is not zero."""
        torch.manual_seed(0)
        self.case, self.mode, self.device = case, mode, device
        with device:
            self.stock = stock_model(case)
        self.stock.to(device, torch.bfloat16)
        layers = self.stock.model.language_model.layers
        self.weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        self.inputs = batch(case, device)
        self.crayon = crayon(case, device)
        self.made: dict[str, nn.Module] = {}
        self.gradients: dict[str, Tensor] = {}

    def model(self, provider: str) -> nn.Module:
        """Return a provider's model, made once."""
        if provider not in self.made:
            self.made[provider] = PROVIDERS[provider](self)
        return self.made[provider].train()

    def batch_of(self, provider: str) -> dict[str, Tensor]:
        """Return what a provider's model is given."""
        return {**self.inputs, **self.crayon} if provider == CRAYON else self.inputs

    @functools.cached_property
    def exact(self) -> Tensor | None:
        """The projector's gradient in float64, of stock LLaVA with ours's weights as one matrix."""
        if self.case.layers > EXACT_LAYERS:
            return None
        model = copy.deepcopy(self.stock).double().requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        own = self.model("ours").model.language_model.layers
        for layer, given in zip(model.model.language_model.layers, own, strict=True):
            for name in LINEARS:
                place = "self_attn" if hasattr(layer.self_attn, name) else "mlp"
                dense, mine = (getattr(getattr(each, place), name) for each in (layer, given))
                weight = mine.base().dequantize(torch.float32).double()
                for adapter in mine.lora_A:
                    a, b = mine.lora_A[adapter].weight, mine.lora_B[adapter].weight
                    weight += b.double() @ a.double() * (ALPHA / RANK)
                dense.weight.data = weight
        inputs = {**self.inputs, "pixel_values": self.inputs["pixel_values"].double()}
        model(**inputs).loss.backward()
        return projector_gradient(model)


def ours(setting: Setting, with_crayon: bool = False) -> nn.Module:
    """Build our model: a 4-bit decoder, for ``instruct`` an adapter, and a crayon or none."""
    stock, case = setting.stock, setting.case
    mode = "attention" if with_crayon else "none"
    text = {**stock.config.text_config.to_dict(), "crayon_mode": mode}
    torch.manual_seed(1)
    with setting.device:
        model = CollavoForConditionalGeneration(configuration(CollavoConfig, text, case))
    model.load_state_dict(stock.state_dict(), strict=False)
    model.to(torch.bfloat16)
    adapters = (ADAPTER,) if setting.mode == "instruct" else ()
    model.add_dual_qlora(adapters, rank=RANK, alpha=ALPHA, dtype=torch.float32)
    for parameter in (p for name in adapters for p in model.adapter_parameters(name)):
        parameter.data.normal_(0.0, 0.02)
    parts = ["projector", *(["adapters"] if adapters else []), *(["crayon"] * with_crayon)]
    prepare_stage(model, setting.mode, parts=parts, adapters=adapters)
    return model.to(setting.device)


def peer(setting: Setting, four_bits: bool) -> nn.Module:
    """Build a peer: bitsandbytes' layers or dense ones, PEFT's adapters, ours's weights."""
    peft = peers.require("peft")
    bnb = peers.require("bitsandbytes") if four_bits else None
    model: Any = copy.deepcopy(setting.stock).requires_grad_(False)
    if bnb is not None:
        for layer in model.model.language_model.layers:
            for name in LINEARS:
                parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                setattr(parent, name, four_bit_layer(bnb, getattr(parent, name), setting.device))
        model.is_loaded_in_4bit = True
    if setting.mode == "instruct":
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=rf".*language_model.*\.({'|'.join(LINEARS)})",
        )
        model = peft.get_peft_model(model, config, adapter_name=ADAPTER)
        own = dict(setting.model("ours").named_parameters())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = own[name.removeprefix("base_model.model.")].detach().clone()
                parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    trained: nn.Module = model
    return trained


def four_bit_layer(bnb: Any, dense: nn.Linear, device: torch.device) -> nn.Module:
    """Return bitsandbytes' layer of a dense one, its scales quantised too, as ours are."""
    four = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=True,
    )
    four.weight = bnb.nn.Params4bit(
        dense.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer: nn.Module = four.to(device)
    return layer


PROVIDERS: dict[str, Callable[[Setting], nn.Module]] = {
    "ours": ours,
    CRAYON: functools.partial(ours, with_crayon=True),
    QLORA: functools.partial(peer, four_bits=True),
    LORA: functools.partial(peer, four_bits=False),
}


@functools.lru_cache(maxsize=1)
def settings(case: Case, mode: str, device: torch.device) -> Setting:
    """Return the setting of a task; the former one is let go."""
    return Setting(case, mode, device)


def projector_gradient(model: nn.Module) -> Tensor:
    """Return the gradient of the projector's last weight.

    Raises:
        RuntimeError: if there is none.
    """
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, name.endswith("projector.linear_2.weight")
        if wanted and gradient is not None and bool(gradient.count_nonzero()):
            return gradient.detach().clone()
    raise RuntimeError(f"{type(model).__name__}: expected a gradient of the projector, got none")


def loss(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """Return a batch's loss, under autocast as the trainers run it."""
    with torch.autocast(device.type, torch.bfloat16):
        found: Tensor = model(**inputs).loss
    return found


def checked_error(setting: Setting, provider: str) -> float:
    """Return the error of the projector's gradient, relative to float64 or to ours.

    Raises:
        RuntimeError: if a peer has no such gradient, or another: it would train something else.
    """
    if provider not in setting.gradients:
        model = setting.model(provider)
        loss(model, setting.batch_of(provider), setting.device).backward()
        setting.gradients[provider] = projector_gradient(model)
        model.zero_grad()
    found = setting.gradients[provider]
    expected = setting.exact
    if expected is None:
        expected = setting.gradients["ours"].double() if provider != "ours" else found.double()
    error = relative_error(found, expected)
    # A crayon is another model; dense weights are others than their 4 bits.
    if provider in ("ours", QLORA) and error > FAR:
        raise RuntimeError(
            f"{provider}: expected the projector's gradient within {FAR} of the exact one, got "
            f"{error:.3g}"
        )
    return error


def step_of(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Callable[[], Any]:
    """Return a training step; its rate is zero, so that every step is the same."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Fused, as transformers' Trainer has it unless told otherwise.
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        loss(model, inputs, device).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def held_megabytes(model: nn.Module) -> float:
    """Return what a model's tensors hold, bitsandbytes' scales among them."""
    held = {id(x): x for x in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for each in (state, getattr(state, "state2", None)):
            if each is not None:
                held[id(each.absmax)] = each.absmax
    return sum(x.numel() * x.element_size() for x in held.values()) / 1e6


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call; a peer's projector gradient is there and right, or it raises.

    The work counted is that of the decoder's frozen linear layers, there and back.
    """
    setting = settings(CASES[row.case], row.mode, device)
    checked_error(setting, "ours")
    error = checked_error(setting, row.provider)
    model = setting.model(row.provider)
    return Call(
        step_of(model, setting.batch_of(row.provider), device),
        dtype=torch.bfloat16,
        bytes=int(2 * setting.weights * (0.5 + 1 / 64)),
        flops=2 * 2 * setting.weights * setting.case.tokens,
        error=(lambda: error) if row.provider in ("ours", QLORA) else None,
        capture=False,
        config={
            **vars(setting.case),
            "tokens": setting.case.tokens,
            "model_mb": held_megabytes(model),
        },
    )
