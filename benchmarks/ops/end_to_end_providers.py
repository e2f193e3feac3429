"""Who runs a whole model: ours, and stock LLaVA with the same mathematics.

The peer is transformers' LLaVA with bitsandbytes' 4-bit layers, two PEFT adapters and the crayon as
one would add it without this package: a vector per image *token*, from two embeddings and an MLP,
added in front of every layer's q, k and v projections. Both have the same weights, and adapters in
float32, which both make unless told otherwise.
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
from benchmarks.ops.end_to_end_cases import (
    CASES,
    DTYPES,
    IMAGE_TOKEN,
    NAMES,
    VOCABULARY,
    Case,
    batch,
)
from benchmarks.registry import Call, Row
from collavo import CollavoConfig, CollavoForConditionalGeneration
from collavo_kernels.testing import relative_error

LOGITS: dict[tuple[Case, torch.dtype], Tensor] = {}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    # A GPU makes and quantises weights in a hundredth of a CPU's time.
    with stock.device:
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
        with device:
            self.stock = stock_model(case)
        self.stock.to(device, dtype)
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


@functools.lru_cache(maxsize=1)
def models(case: Case, dtype: torch.dtype, device: torch.device, training: bool) -> Models:
    """Return the pair of models; the former one is let go."""
    return Models(case, dtype, device)


def exact(pair: Models) -> Tensor:
    """Return a case's float64 logits, worked out from the first of its pairs before that runs."""
    key = (pair.case, pair.dtype)
    if key not in LOGITS:
        LOGITS.clear()
        LOGITS[key] = pair.exact()
    return LOGITS[key]


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return the prompt's forward."""
    model.eval()

    def forward() -> Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=True).logits

    return forward


def decode(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return one step, always the same: the last token of the batch after all before it."""
    model.eval()
    tokens = inputs["input_ids"]
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        cache = model(**{**prompt, "input_ids": tokens[:, :-1]}, use_cache=True).past_key_values

    def step() -> Tensor:
        # A layer of the cache makes new tensors, so that a copy of it leaves the old ones alone.
        past = copy.copy(cache)
        past.layers = [copy.copy(layer) for layer in cache.layers]
        with torch.no_grad():
            output = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        return output.logits

    return step


def train(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a training step; its rate is zero, so that every step is the same."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> Tensor:
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output.logits.detach()

    return step


WORK = {"train": train, "prefill": prefill, "decode": decode}
PROVIDERS: dict[str, Callable[[Models], nn.Module]] = {
    NAMES[0]: lambda pair: pair.ours,
    NAMES[1]: lambda pair: pair.peer,
}


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call.

    The work counted is that of the decoder's frozen linear layers, twice in training: their weights
    have no gradient.
    """
    case, dtype, training = CASES[row.case], DTYPES[row.dtype], row.mode == "train"
    pair = models(case, dtype, device, training)
    expected = exact(pair)
    run = WORK[row.mode](PROVIDERS[row.provider](pair), pair.inputs)
    passes = 2 if training else 1
    tokens = case.batch if row.mode == "decode" else pair.inputs["input_ids"].numel()
    wanted = expected[:, -1:] if row.mode == "decode" else expected
    return Call(
        run,
        dtype=dtype,
        bytes=int(passes * pair.weights * (0.5 + 1 / 64)),
        flops=passes * 2 * pair.weights * tokens,
        error=lambda: relative_error(run(), wanted),
        capture=False,
        config=vars(case),
    )
