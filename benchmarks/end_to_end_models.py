"""The models of ``bench_end_to_end``: ours, and stock LLaVA with the same mathematics."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import peers
from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration

VOCABULARY, IMAGE_TOKEN, ROWS = 512, 511, 12
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Sizes of a model and a batch; an ``intermediate`` of 0 is 11/4 of ``hidden``."""

    hidden: int
    layers: int
    grid: int
    text: int
    batch: int
    rank: int
    head_dim: int = 64
    intermediate: int = 0

    def __str__(self) -> str:
        return f"h{self.hidden}-l{self.layers}-b{self.batch}-image{self.grid**2}-text{self.text}"


def stock_model(case: Case) -> LlavaForConditionalGeneration:
    """Build transformers' LLaVA with random weights and a one-layer vision tower."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4 * case.grid,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate or case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // case.head_dim,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def ours(stock: LlavaForConditionalGeneration, case: Case) -> CollavoForConditionalGeneration:
    """Build our model with the stock model's weights, 4-bit decoder, two adapters and a crayon."""
    text = {**stock.config.text_config.to_dict(), "crayon_mode": "attention"}
    config = CollavoConfig(
        vision_config=stock.config.vision_config,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    model = CollavoForConditionalGeneration(config)
    model.load_state_dict(stock.state_dict(), strict=False)
    model.to(stock.dtype)
    # PEFT, too, keeps adapters in float32 beside a bfloat16 model.
    model.add_dual_qlora(rank=case.rank, alpha=float(case.rank), dtype=torch.float32)
    trained = [*model.adapter_parameters("image"), *model.adapter_parameters("vl")]
    trained += model.crayon_parameters()
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True).data.normal_(0.0, 0.02)
    return model


class TokenCrayon(nn.Module):
    """Stock LLaVA with the crayon computed and added per image token."""

    def __init__(self, model: nn.Module, crayon: nn.Module) -> None:
        super().__init__()
        self.model, self.crayon = model, crayon
        self.added: Tensor | None = None
        for name, module in model.named_modules():
            if name.endswith("self_attn") and "language_model" in name:
                module.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.added is None:
            return None
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden + self.added.to(hidden.dtype)}

    def forward(self, crayon_index: Tensor | None = None, **inputs: Any) -> Any:
        """Run the model; inputs as ``CollavoForConditionalGeneration`` takes them."""
        if crayon_index is None:  # no image among the tokens: a decoding step
            self.added = None
            return self.model(**inputs)
        classes, numbers = inputs.pop("crayon_class"), inputs.pop("crayon_number")
        index = crayon_index.long()
        vectors = self.crayon.class_embedding(classes.gather(1, index))
        vectors = self.crayon.mlp(vectors + self.crayon.number_embedding(numbers.gather(1, index)))
        images = inputs["input_ids"] == IMAGE_TOKEN
        blank = vectors.new_zeros(*images.shape, vectors.shape[-1])
        self.added = blank.masked_scatter(images[..., None], vectors)
        return self.model(**inputs)


def peer(
    stock: LlavaForConditionalGeneration, mine: CollavoForConditionalGeneration, case: Case
) -> nn.Module:
    """Build the peer: bitsandbytes' 4-bit layers, PEFT's adapters, ours's weights."""
    bnb, peft = peers.require("bitsandbytes"), peers.require("peft")
    device, dtype = stock.device, stock.dtype
    for layer in stock.model.language_model.layers:
        for name in LINEARS:
            parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            dense = getattr(parent, name)
            four = bnb.nn.Linear4bit(
                dense.in_features,
                dense.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            four.weight = bnb.nn.Params4bit(
                dense.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            setattr(parent, name, four.to(device))
    stock.is_loaded_in_4bit = True
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        target_modules=rf".*language_model.*\.({'|'.join(LINEARS)})",
    )
    model = peft.get_peft_model(stock, config, adapter_name="image")
    model.add_adapter("vl", config)
    model.base_model.set_adapter(["image", "vl"])
    own = dict(mine.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(own[name.removeprefix("base_model.model.")])
            parameter.requires_grad_(True)
    return TokenCrayon(model, copy.deepcopy(mine.model.crayon_prompt))


def batch(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw a batch: an image in front of the text, a dozen segments."""
    cells = case.grid**2
    tokens = torch.randint(1, IMAGE_TOKEN, (case.batch, cells + case.text))
    tokens[:, :cells] = IMAGE_TOKEN
    labels = tokens.clone()
    labels[:, : cells + case.text // 2] = -100
    shape = (case.batch, ROWS)
    inputs = {
        "input_ids": tokens,
        "labels": labels,
        "pixel_values": torch.randn(case.batch, 3, 4 * case.grid, 4 * case.grid).to(dtype),
        "crayon_index": torch.randint(0, ROWS, (case.batch, cells), dtype=torch.int32),
        "crayon_class": torch.randint(0, 134, shape, dtype=torch.int32),
        "crayon_number": torch.randint(0, 21, shape, dtype=torch.int32),
    }
    return {name: value.to(device) for name, value in inputs.items()}


class Models:
    """Both models of a case with the same weights, and a batch.

    One of these is for training and another for the rest: after a forward in ``eval`` without
    gradients bitsandbytes' CPU layer has packed its weight for a product that autograd cannot
    follow, and a training step leaves out the gradient through every base weight, with a warning.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        """Draw the weights and the batch, the same at each call."""
        torch.manual_seed(0)
        self.case, self.dtype = case, dtype
        self.stock = stock_model(case).to(dtype).to(device)
        layers = self.stock.model.language_model.layers
        self.weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        self.ours = ours(self.stock, case).to(device)
        self.inputs = batch(case, device, dtype)

    @functools.cached_property
    def peer(self) -> nn.Module:
        """The peer, made of the stock model; skips where it is absent."""
        return peer(self.stock, self.ours, self.case)

    def exact(self) -> Tensor:
        """Return ours's logits in float64."""
        inputs = {**self.inputs, "pixel_values": self.inputs["pixel_values"].double()}
        with torch.no_grad():
            return copy.deepcopy(self.ours).double().eval()(**inputs).logits
