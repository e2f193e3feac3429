"""The recorded official model: converted weights give its tensors back."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from collavo.configuration import CollavoConfig
from collavo.conversion import convert_state_dict, resize_position_embedding, unpack_wqkv
from collavo.model.llava import CollavoForConditionalGeneration
from collavo_kernels.testing import assert_within_budget

HEADS, GROUPS, CELLS, IMAGE = 4, 2, 25, 300
# float32, three layers; the record names a second computation that differed by 8.4e-6.
LOGITS = 2e-5


class Recorded(NamedTuple):
    model: CollavoForConditionalGeneration
    config: CollavoConfig
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    inputs: dict[str, Tensor]
    valid: Tensor


def _merge(tokens: Tensor, values: Tensor) -> Tensor:
    """Repeat what belongs to the image placeholder once per cell, as current LLaVA inputs do."""
    counts = torch.where(tokens == IMAGE, CELLS, 1)
    rows = [v.repeat_interleave(n) for v, n in zip(values, counts, strict=True)]
    return torch.stack(rows)


def crayon_inputs(classes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """Rows and row index from the recorded class and number of every cell."""
    per_sample = []
    for sample in range(classes.shape[0]):
        cells = torch.stack([classes[sample], numbers[sample]], dim=1)
        per_sample.append(cells.unique(dim=0, return_inverse=True))
    rows = max(len(pairs) for pairs, _ in per_sample)
    padded = torch.full((len(per_sample), rows, 2), -1, dtype=torch.int32)
    for sample, (pairs, _) in enumerate(per_sample):
        padded[sample, : len(pairs)] = pairs
    return {
        "crayon_index": torch.stack([index for _, index in per_sample]).int(),
        "crayon_class": padded[..., 0],
        "crayon_number": padded[..., 1],
    }


def build(tensors: dict[str, Tensor], facts: dict[str, Any], **changes: float) -> Any:
    """Convert and load; ``changes`` scale the official tensors whose names contain the key."""
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    for part, factor in changes.items():
        official |= {k: v * factor for k, v in official.items() if f"{part}." in k}
    config, state = convert_state_dict(official, facts)
    model = CollavoForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), config


@pytest.fixture(scope="module")
def recorded(golden: Any) -> Recorded:
    tensors, facts = golden("model")
    model, config = build(tensors, facts)
    tokens, mask = tensors["in.input_ids"], tensors["in.attention_mask"]
    inputs = {
        "input_ids": _merge(tokens, tokens),
        "attention_mask": _merge(tokens, mask),
        "pixel_values": tensors["in.pixel_values"],
        **crayon_inputs(tensors["in.seg_semantic"], tensors["in.seg_number"]),
    }
    valid = tensors["fwd.merged_attention_mask"].bool()
    assert torch.equal(inputs["attention_mask"].bool(), valid)
    return Recorded(model, config, tensors, facts, inputs, valid)


def computed(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return what the record has of a forward, by its names."""
    seen: dict[str, Tensor] = {}
    layers = model.model.language_model.layers
    hooks = [
        layers[0].self_attn.register_forward_hook(lambda m, a, o: seen.update(attention=o[0])),
        layers[0].mlp.register_forward_hook(lambda m, a, o: seen.update(mlp=o)),
        layers[2].register_forward_hook(lambda m, a, o: seen.update(last=o)),
    ]
    with torch.no_grad():
        out = model(**inputs, labels=labels, use_cache=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    caches = {
        f"cache_{name}.{index}": value.transpose(1, 2)
        for index, cached in enumerate(out.past_key_values.layers)
        for name, value in (("k", cached.keys), ("v", cached.values))
    }
    return caches | {
        "merged_embeds": out.hidden_states[0],
        "attention_out.0": seen["attention"],
        "feed_forward_out.0": seen["mlp"],
        "layer_out.0": out.hidden_states[1],
        "layer_out.1": out.hidden_states[2],
        "layer_out.2": seen["last"],
        "final_norm": out.hidden_states[3],
        "logits": out.logits,
        "image_features": torch.stack(list(out.image_hidden_states)),
        "loss": out.loss,
    }


def test_forward_gives_every_recorded_tensor(recorded: Recorded) -> None:
    """As near to float64 as the record itself, twice over; and the record is near our float64."""
    model, _, tensors, _, inputs, valid = recorded
    labels = tensors["in.labels"]
    found = computed(model, inputs, labels)
    double = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    exact = computed(copy.deepcopy(model).double(), double, labels)
    for name, value in found.items():
        expected = tensors[f"fwd.{name}"]
        if name.startswith("cache_"):
            expected = expected.transpose(1, 2)
        each = [x.view_as(expected) for x in (value, expected, exact[name])]
        if expected.shape[:2] == valid.shape:
            each = [x[valid] for x in each]
        assert (each[1] - each[2]).abs().max() < LOGITS, name
        # Of one number the record's own distance may be nothing by chance.
        terms = expected.abs() / 3 if expected.dim() == 0 else None
        assert_within_budget(*each, name=name, terms=terms)


def test_crayon_rows_are_the_recorded_features(recorded: Recorded) -> None:
    inputs = recorded.inputs
    rows = recorded.model.model.crayon_prompt.project(
        inputs["crayon_class"], inputs["crayon_number"]
    )
    index = inputs["crayon_index"].long()[..., None].expand(-1, -1, rows.shape[-1])
    torch.testing.assert_close(
        rows.gather(1, index), recorded.tensors["fwd.seg_features"], atol=1e-6, rtol=0
    )


def test_eager_attention_gives_the_recorded_probabilities(recorded: Recorded) -> None:
    model, _, tensors, _, inputs, valid = recorded
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    found = out.attentions[0].transpose(1, 2)[valid]
    expected = tensors["fwd.attn_probs.0"].transpose(1, 2)[valid]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (out.logits - tensors["fwd.logits"])[valid].abs().max() < LOGITS


def test_single_row_without_padding(recorded: Recorded) -> None:
    start = int((~recorded.valid[1]).sum())
    single = {name: value[1:2] for name, value in recorded.inputs.items()}
    for name in ("input_ids", "attention_mask"):
        single[name] = single[name][:, start:]
    with torch.no_grad():
        logits = recorded.model(**single).logits[:, -8:]
    assert (logits - recorded.tensors["single1.logits_last8"]).abs().max() < LOGITS


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("segzero", {}),  # every cell unknown
        ("segB_zero", {"Plora_seg_B": 0.0}),
        ("all_lora_zero", {"Plora_seg_B": 0.0, "Plora_B": 0.0}),
    ],
)
def test_recorded_ablations(recorded: Recorded, name: str, changes: dict[str, float]) -> None:
    model, _ = build(recorded.tensors, recorded.facts, **changes)
    inputs = dict(recorded.inputs)
    if name == "segzero":
        zeros = torch.zeros_like(recorded.tensors["in.seg_semantic"])
        inputs |= crayon_inputs(zeros, zeros)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -8:]
    assert (logits - recorded.tensors[f"{name}.logits_last8"]).abs().max() < LOGITS


def _unpacked(packed: Tensor) -> list[Tensor]:
    return list(unpack_wqkv(packed, HEADS, GROUPS))


def _own_gradient(model: Any, official: str) -> tuple[Tensor, Any]:
    """This model's gradient under an official name, and what to do with the recorded one."""
    named = {name: p.grad for name, p in model.named_parameters()}
    outer = {
        "seg_prompt_embed.weight": "model.crayon_prompt.class_embedding.weight",
        "seg_num_embed.weight": "model.crayon_prompt.number_embedding.weight",
        "vision_proj_for_seg.0.weight": "model.crayon_prompt.mlp.0.weight",
        "vision_proj_for_seg.2.bias": "model.crayon_prompt.mlp.2.bias",
        "vision_proj.0.weight": "model.multi_modal_projector.linear_1.weight",
        "vision_proj.2.bias": "model.multi_modal_projector.linear_2.bias",
        "model.norm.weight": "model.language_model.norm.weight",
    }
    if official in outer:
        return named[outer[official]], lambda x: x
    _, _, index, rest = official.split(".", 3)
    prefix = f"model.language_model.layers.{index}."
    norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    block, part = rest.rsplit(".", 2)[0], rest.split(".")[-2]
    if part in norms:
        return named[f"{prefix}{norms[part]}.weight"], lambda x: x
    linears = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj"}
    linears |= {"feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
    branches = {"attention.wo": "self_attn.crayon_o", "feed_forward.w1": "mlp.crayon_gate"}
    branches |= {"feed_forward.w3": "mlp.crayon_up", "attention.wqkv": "self_attn.crayon_qkv"}
    suffix = {"Plora_A": "lora_A.plora", "Plora_B": "lora_B.plora"}.get(part, "")
    if part.startswith("Plora_seg"):
        own = named[f"{prefix}{branches[block]}.{part[-1]}.weight"]
        packed = block == "attention.wqkv" and part == "Plora_seg_B"
        return own, (lambda x: torch.cat(_unpacked(x))) if packed else (lambda x: x)
    if block != "attention.wqkv":
        return named[f"{prefix}{linears[block]}.{suffix}.weight"], lambda x: x
    names = [f"{prefix}self_attn.{x}_proj.{suffix + '.' if suffix else ''}weight" for x in "qkv"]
    three = [named[name] for name in names]
    if part == "Plora_A":  # q, k and v share it officially; here each has a copy
        return sum(three[1:], three[0]), lambda x: x
    return torch.cat(three), lambda x: torch.cat(_unpacked(x))


def test_gradients(recorded: Recorded) -> None:
    model = recorded.model
    model.zero_grad()
    model(**recorded.inputs, labels=recorded.tensors["in.labels"]).loss.backward()
    names = [k.removeprefix("grad.") for k in recorded.tensors if k.startswith("grad.")]
    assert len(names) == 46
    for name in names:
        own, prepare = _own_gradient(model, name)
        expected = prepare(recorded.tensors[f"grad.{name}"])
        error = (own - expected).abs().max()
        assert error < 1e-5 * max(1.0, float(expected.abs().max())), f"{name}: {error:.2e}"
    model.zero_grad()


def test_generation(recorded: Recorded) -> None:
    prompt = recorded.inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 8}
    greedy = recorded.model.generate(**recorded.inputs, **options)[:, prompt:]
    assert torch.equal(greedy, recorded.tensors["dec.tokens"])
    assert torch.equal(greedy, recorded.tensors["gen.greedy"][:, -8:])
    options = {"do_sample": False, "max_new_tokens": 5, "num_beams": 3}
    beams = recorded.model.generate(**recorded.inputs, **options)[:, prompt:]
    assert torch.equal(beams, recorded.tensors["gen.beam3"][:, -5:])


def test_decode_step_logits(recorded: Recorded) -> None:
    out = recorded.model.generate(
        **recorded.inputs,
        do_sample=False,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)
    assert (logits - recorded.tensors["dec.logits"]).abs().max() < LOGITS


def test_position_embedding_resize(golden: Any) -> None:
    tensors, _ = golden("model")
    assert torch.equal(
        resize_position_embedding(tensors["posembed.in"], 5), tensors["posembed.out"]
    )


def test_checkpoint_with_clips_own_grid_is_resized(golden: Any) -> None:
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    name = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
    official[name] = tensors["posembed.in"]
    config, state = convert_state_dict(official, facts)
    assert config.vision_config.image_size == 20
    found = state["model.vision_tower.embeddings.position_embedding.weight"]
    assert torch.equal(found, tensors["posembed.out"])


def test_missing_and_surplus_official_tensors_are_named(golden: Any) -> None:
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    with pytest.raises(ValueError, match=r"has no place: model\.layers\.0\.mlp\.surplus"):
        convert_state_dict({**official, "model.layers.0.mlp.surplus": torch.zeros(1)}, facts)
    del official["model.layers.1.attention.wo.Plora_B.weight"]
    with pytest.raises(ValueError, match=r"is missing: model\.layers\.1\.attention\.wo\.Plora_B"):
        convert_state_dict(official, facts)
    del official["output.weight"]
    with pytest.raises(ValueError, match=r"'output\.weight' is missing"):
        convert_state_dict(official, facts)


def test_unknown_rope_scaling_is_refused(golden: Any) -> None:
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    config = {**facts["config"], "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ValueError, match="rope_scaling"):
        convert_state_dict(official, {**facts, "config": config})


def test_the_image_token_is_a_row_of_its_own(golden: Any) -> None:
    """The official loader adds it after loading: a checkpoint saved before has no row for it."""
    tensors, facts = golden("model")
    official = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    plain = {key: value for key, value in facts.items() if key != "special"}
    name, table = "model.tok_embeddings.weight", official["model.tok_embeddings.weight"]
    words = official["output.weight"].shape[0]
    for rows in (words, words + 1):
        official[name] = table[:rows]
        config, state = convert_state_dict(official, plain)
        assert (config.image_token_index, config.extra_embeddings) == (words, 1)
        embedding = state["model.language_model.embed_tokens.weight"]
        assert torch.equal(embedding[:words], table[:words])
        assert embedding.shape[0] == words + 1 and embedding.dtype == table.dtype
        CollavoForConditionalGeneration(config).load_state_dict(state)
    official[name] = table[:words]
    given = {**plain, "special": {"image_token_index": 5}}
    assert convert_state_dict(official, given)[0].image_token_index == 5
    for wrong in (words + 1, -1, "<image>"):
        with pytest.raises(ValueError, match="special: expected an image_token_index from 0"):
            convert_state_dict(official, {**plain, "special": {"image_token_index": wrong}})
    official[name] = table[: words - 1]
    with pytest.raises(ValueError, match="expected at least the head's"):
        convert_state_dict(official, plain)
