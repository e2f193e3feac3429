"""A step of each of LLaVA's stages beside stock LLaVA with PEFT and torch's AdamW.

The peer has the same weights, 4-bit ones dequantised, in float32 and in float64: loss, gradients
and weights after three steps may be off twice as much as plain PyTorch's. Tensors are small here,
so that one run's error may be next to nothing by chance: it is the largest of three ways to sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_collavo import MixedRecords, make_collavo
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, default_data_collator

from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.grouping import Place
from collavo.train.stages import prepare_stage
from collavo.train.trainer import CollavoTrainer
from collavo_kernels import NF4Weight
from collavo_kernels.testing import assert_within_budget
from tests.collavo.model.tiny_crayon_model import IMAGE, make_batch, make_model
from tests.fuzz.stock_crayon import LINEARS, StockWithCrayon, layers_of

ADAPTER, RANK, ALPHA, RATE = "tuned", 4, 8.0, 1e-3
# Large enough that a step is a smooth function of the gradient: with 1e-8, an element whose
# gradient is nothing but rounding takes a whole step, up or down.
EPS = 1e-2


class Way(NamedTuple):
    """One way to train.

    Attributes:
        stage: Of the table.
        parts: What is trained.
        quantize: Whether the decoder has 4 bits.
        projector: Its type.
    """

    stage: str
    parts: tuple[str, ...]
    quantize: bool = False
    projector: str = "mlp2x_gelu"


WAYS = {
    "align": Way("align", ("projector",)),
    "align over 4 bits": Way("align", ("projector",), quantize=True),
    "instruct": Way("instruct", ("projector", "decoder")),
    "instruct, LoRA": Way("instruct", ("projector", "adapters")),
    "instruct, 4 bits and LoRA": Way("instruct", ("projector", "adapters"), quantize=True),
    "instruct, with crayon": Way("instruct", ("projector", "adapters", "crayon"), quantize=True),
    "instruct, dense with crayon": Way("instruct", ("projector", "decoder", "crayon")),
}


def batch_of(way: Way) -> dict[str, Tensor]:
    """Two samples, the second shorter at the left; answers of different lengths."""
    batch = make_batch()
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    labels[1, 6:7] = -100
    batch["labels"] = torch.where(labels == IMAGE, -100, labels)
    if "crayon" not in way.parts:
        batch = {name: value for name, value in batch.items() if "crayon" not in name}
    return batch


def mine(way: Way, dtype: torch.dtype = torch.float32) -> Any:
    """Our model, ready for the stage."""
    mode = "attention" if "crayon" in way.parts else "none"
    # Without zero factors: an adapter whose B is zero has no gradient on the other side.
    model: Any = make_model(text={"crayon_mode": mode, "hidden_size": 64, "intermediate_size": 128})
    return ready(model, way, dtype)


def ready(model: Any, way: Way, dtype: torch.dtype = torch.float32) -> Any:
    """Give a model what the stage trains, and prepare it."""
    adapters = (ADAPTER,) if "adapters" in way.parts else ()
    if adapters or way.quantize:
        model.add_dual_qlora(adapters, rank=RANK, alpha=ALPHA, quantize=way.quantize)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(dtype)
    prepare_stage(model, way.stage, way.parts, adapters or None)  # type: ignore[arg-type]
    return model.train()


def stock_of(model: Any, attention: str) -> Any:
    """Stock LLaVA with the weights of ours, those of 4 bits dequantised."""
    text = copy.deepcopy(model.config.text_config).to_dict()
    text = {name: value for name, value in text.items() if "crayon" not in name}
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=model.config.vision_config,
            text_config={**text, "model_type": "llama"},
            image_token_index=model.config.image_token_index,
            vision_feature_layer=-1,
            attn_implementation=attention,
        )
    )
    own = dict(model.state_dict())
    for layer, (theirs, ours) in enumerate(zip(layers_of(stock), layers_of(model), strict=True)):
        for place in ("self_attn", "mlp"):
            for name in LINEARS:
                if hasattr(getattr(theirs, place), name):
                    base = getattr(getattr(ours, place), name).base()
                    dense = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base
                    own[f"model.language_model.layers.{layer}.{place}.{name}.weight"] = dense
    wanted = stock.state_dict()
    stock.load_state_dict({name: own[name] for name in wanted})
    return stock


Step = Callable[[], Tensor]
Named = Mapping[str, nn.Parameter]


def peer_of(
    model: Any,
    way: Way,
    batches: list[dict[str, Tensor]],
    dtype: torch.dtype,
    attention: str = "sdpa",
) -> tuple[Step, Named]:
    """Return how the peer's next loss is computed, and its trained parameters by ours's names."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    peer: Any = stock_of(model, attention)
    hooked: StockWithCrayon | None = None
    if "crayon" in way.parts:
        adapters = (ADAPTER,) if "adapters" in way.parts else ()
        hooked = StockWithCrayon(peer, model, adapters, (), ALPHA / RANK)
        hooked.to(dtype)
        named = dict(peer.named_parameters())
        for name in trained - named.keys():
            key = name.split("crayon_prompt.")[-1].split("_model.layers.")[-1]
            named[name] = hooked.of(key)
    elif "adapters" in way.parts:
        peft = pytest.importorskip("peft")
        targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        peer = peft.get_peft_model(peer, config, adapter_name=ADAPTER).to(dtype)
        prefix = "base_model.model."
        named = {name.removeprefix(prefix): p for name, p in peer.named_parameters()}
        own = dict(model.named_parameters())
        for name in trained:
            named[name].data.copy_(own[name])
    else:
        named = dict(peer.to(dtype).named_parameters())
    chosen = {name: named[name] for name in trained}
    for parameter in named.values():
        parameter.requires_grad_(any(parameter is one for one in chosen.values()))
    peer.train()
    coming = iter(batches)

    def step() -> Tensor:
        batch = next(coming)
        inputs = {name: x for name, x in batch.items() if "crayon" not in name}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        if hooked is not None:
            hooked.crayon = {name: x for name, x in batch.items() if "crayon" in name}
        loss: Tensor = peer(**inputs).loss
        return loss

    return step, chosen


def three_steps(step: Step, trained: Named) -> dict[str, Tensor]:
    """Return the first loss and gradients, and the weights after three steps of AdamW."""
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0, eps=EPS)
    found: dict[str, Tensor] = {}
    for number in range(3):
        loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
        if not number:
            found["loss"] = loss.detach()
            for name, parameter in trained.items():
                if parameter.grad is not None:  # the projector has none of a step of text
                    found[f"gradient of {name}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"{name} after": p.detach().clone() for name, p in trained.items()}


def float32_ways(model: Any, way: Way, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the peer's results as it is, with its own attention, and with samples turned."""
    turned = [{name: value.flip(0) for name, value in batch.items()} for batch in batches]
    return [
        three_steps(*peer_of(model, way, batches, torch.float32)),
        three_steps(*peer_of(model, way, batches, torch.float32, attention="eager")),
        three_steps(*peer_of(model, way, turned, torch.float32)),
    ]


def farthest(ways: list[Tensor], exact: Tensor) -> Tensor:
    """Return for each element the value that is farthest from the exact one."""
    stacked = torch.stack(ways)
    worst = (stacked.double() - exact).abs().argmax(0, keepdim=True)
    return stacked.gather(0, worst)[0]


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what is not trained, 4-bit weights dequantised."""
    found = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for name, module in model.named_modules():
        if hasattr(module, "base") and isinstance(module.base(), NF4Weight):
            found[name] = module.base().dequantize(torch.float32)
    return {
        name: value.detach().clone() for name, value in found.items() if not value.requires_grad
    }


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_three_steps_are_the_peers(way: Way) -> None:
    batch, model = batch_of(way), mine(way)
    low = float32_ways(model, way, [batch] * 3)
    exact = three_steps(*peer_of(model, way, [batch] * 3, torch.float64))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before, frozen = {name: p.detach().clone() for name, p in trained.items()}, frozen_of(model)
    found = three_steps(lambda: model(**batch).loss, trained)
    assert found.keys() == exact.keys()
    assert len(found) == 1 + 2 * len(trained)
    for name, value in found.items():
        worst = farthest([one[name] for one in low], exact[name])
        assert_within_budget(value, worst, exact[name], name=name)
    assert not any(torch.equal(trained[name], value) for name, value in before.items())
    assert all(torch.equal(frozen_of(model)[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_three_steps_of_the_trainer_are_the_peers(way: Way, tmp_path: Path) -> None:
    """Two micro-batches to a step, of images or of text, in the trainer's order."""
    plain = make_collavo("attention" if "crayon" in way.parts else "none", adapters=False)
    model = ready(plain, way)
    adapters = [ADAPTER] if "adapters" in way.parts else None
    arguments = CollavoTrainingArguments(
        output_dir=str(tmp_path),
        stage=way.stage,
        parts=list(way.parts),
        adapters=adapters,
        global_batch=4,
        per_device_train_batch_size=2,
        learning_rate=RATE,
        projector_learning_rate=RATE,
        adam_epsilon=EPS,
        lr_scheduler_type="constant",
        warmup_steps=0.0,
        max_grad_norm=0.0,
        max_steps=3,
        bf16=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = MixedRecords(12, text_every=0 if way.stage == "align" else 3)
    trainer = CollavoTrainer(model, arguments, data)
    order = trainer.train_dataset
    batches = [
        default_data_collator(
            [order[Place(index)].record for index in trainer.schedule.samples(step)]
        )
        for step in range(3)
    ]
    kinds = {"pixel_values" in batch for batch in batches}
    assert kinds == ({True} if way.stage == "align" else {True, False})
    low = float32_ways(model, way, batches)
    exact = three_steps(*peer_of(model, way, batches, torch.float64))
    trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = f"{name} after"
            worst = farthest([one[key] for one in low], exact[key])
            assert_within_budget(parameter.detach(), worst, exact[key], name=key)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_trained_is_float32_and_moves_under_autocast(way: Way) -> None:
    """A step of 2e-5 is below half the distance of most weights of 16 bits to the next."""
    model = mine(way, dtype=torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5, weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of(way)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in trained.items()}
    optimizer.step()
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32, name
        gradient = gradients[name]
        assert gradient is not None and gradient.dtype == torch.float32, name
        moves = gradient.abs() > 1e-6
        assert bool(moves.any()), name
        assert bool((parameter != before[name])[moves].all()), name
    weight = before["model.multi_modal_projector.linear_2.weight"].bfloat16()
    assert (weight - 2e-5 == weight).float().mean() > 0.5  # as it would be without float32
