"""Reading the released CoLLaVO weights: InternLM2 with PLoRA becomes LLaMA with an adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collavo._arguments import expect_like
from collavo.configuration import CollavoConfig, CollavoTextConfig

logger = logging.getLogger(__name__)

IMAGE_ADAPTER = "plora"
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Official name -> ours. The second word of a pair is where the layer's crayon branch lives.
_LINEARS = {
    "attention.wo": ("self_attn.o_proj", "self_attn.crayon_o"),
    "feed_forward.w1": ("mlp.gate_proj", "mlp.crayon_gate"),
    "feed_forward.w3": ("mlp.up_proj", "mlp.crayon_up"),
    "feed_forward.w2": ("mlp.down_proj", None),
}
_NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_OUTER = {
    "model.tok_embeddings.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
    "seg_prompt_embed.weight": "model.crayon_prompt.class_embedding.weight",
    "seg_num_embed.weight": "model.crayon_prompt.number_embedding.weight",
}
_CONNECTORS = {
    "vision_proj.0": "model.multi_modal_projector.linear_1",
    "vision_proj.2": "model.multi_modal_projector.linear_2",
    "vision_proj_for_seg.0": "model.crayon_prompt.mlp.0",
    "vision_proj_for_seg.2": "model.crayon_prompt.mlp.2",
}
_VISION = "vit.vision_tower.vision_model."
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


class _Official:
    """The official tensors, taken one by one, so that what is missing or left over has a name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {k: v for k, v in tensors.items() if not k.endswith(_BUFFERS)}
        self.missing: list[str] = []

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.missing.append(name)
            return torch.empty(0)
        return self.tensors.pop(name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"official_state_dict: tensor {name!r} is missing")
        return tuple(self.tensors[name].shape)

    def finish(self) -> None:
        for what, names in (("is missing", self.missing), ("has no place", sorted(self.tensors))):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise ValueError(f"official_state_dict: {what}: {', '.join(names[:8])}{more}")


def convert_state_dict(
    official_state_dict: Mapping[str, Tensor], official_config: Mapping[str, Any]
) -> tuple[CollavoConfig, dict[str, Tensor]]:
    """Turn the official model's tensors and configuration into this package's.

    The packed ``wqkv`` is taken apart, PLoRA's A and B become the adapter ``"plora"`` on image
    tokens (q, k and v get a copy each of the A they share), and its ``seg`` pair the crayon
    branches of projection mode. The ``seg`` pair of every ``feed_forward.w2`` is dropped: the
    official code never calls it, and its shapes do not allow it to be called.

    Args:
        official_state_dict: The tensors by their official names.
        official_config: The official ``config.json`` as a dictionary. It may also hold
            ``vision_config`` (CLIP's fields; sizes that the tensors show are read from them),
            ``lora`` (``{"alpha": ...}``, by default the rank) and ``special``
            (``{"image_token_index": ...}``, the id of the image token), or hold all of these as
            ``{"config": ..., "clip_config": ..., "lora": ..., "special": ...}``. By default the
            image token is the embedding's last row, beyond the words that the head can say; the
            official loader adds that row after loading, so where there is none a row of zeros is
            added, which the image's features replace.

    Returns:
        The configuration and a state dict for
        ``CollavoForConditionalGeneration.load_state_dict(..., strict=True)``. Tensors that need no
        rearranging are the given ones, not copies.

    Raises:
        TypeError: if an argument is no dictionary.
        ValueError: naming the tensors that are missing or that have no place, or the field of the
            configuration.

    Source: released CoLLaVO code, InternLM2 with PLoRA.
    """
    for name, value in (
        ("official_state_dict", official_state_dict),
        ("official_config", official_config),
    ):
        expect_like(name, value, "a dictionary", has=("items", "get"), hint="load the file first")
    official = _Official(official_state_dict)
    text = dict(official_config.get("config", official_config))
    config = _config(official, text, official_config)
    state: dict[str, Tensor] = {}
    for index in range(config.text_config.num_hidden_layers):
        _convert_layer(official, state, index, config)
    for old, new in _OUTER.items():
        state[new] = official.take(old)
    _add_image_token(state, config)
    for old, new in _CONNECTORS.items():
        for part in ("weight", "bias"):
            state[f"{new}.{part}"] = official.take(f"{old}.{part}")
    for name in [name for name in official.tensors if name.startswith(_VISION)]:
        state["model.vision_tower." + name.removeprefix(_VISION)] = official.take(name)
    official.finish()
    _fit_vision_positions(state, config)
    return config, state


def _config(official: _Official, text: dict[str, Any], given: Mapping[str, Any]) -> CollavoConfig:
    vocabulary, _ = official.shape("output.weight")
    image_token, rows = _image_token(official, given.get("special") or {})
    rank, _ = official.shape("model.layers.0.attention.wqkv.Plora_A.weight")
    crayon_rank, _ = official.shape("model.layers.0.attention.wqkv.Plora_seg_A.weight")
    classes, width = official.shape("seg_prompt_embed.weight")
    numbers, _ = official.shape("seg_num_embed.weight")
    lora = given.get("lora", {})
    scaling = lora.get("alpha", rank) / rank
    if missing := [
        name for name in ("num_attention_heads", "num_hidden_layers") if name not in text
    ]:
        raise ValueError(f"official_config: expected the field {missing[0]!r}")
    vision = _vision_config(official, given)
    grid = vision["image_size"] // vision["patch_size"]
    return CollavoConfig(
        text_config=CollavoTextConfig(
            **{name: text[name] for name in _TEXT_FIELDS if name in text},
            num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            attention_bias=bool(text.get("bias", False)),
            rope_parameters=_rope(text),
            vocab_size=vocabulary,
            extra_embeddings=rows - vocabulary,
            crayon_mode="projection",
            crayon_rank=crayon_rank,
            crayon_alpha=scaling * crayon_rank,
            adapters=(IMAGE_ADAPTER,),
            image_adapters=(IMAGE_ADAPTER,),
            lora_rank=rank,
            lora_alpha=scaling * rank,
        ),
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=image_token,
        image_seq_length=grid * grid,
        vision_feature_layer=vision.get("select_layer", -1),
        num_crayon_classes=classes - 1,
        max_crayon_number=numbers - 1,
        crayon_embed_dim=width,
        architectures=["CollavoForConditionalGeneration"],
    )


def _image_token(official: _Official, special: Mapping[str, Any]) -> tuple[int, int]:
    """Return the image token's id and how many rows the embedding has with it."""
    rows, _ = official.shape("model.tok_embeddings.weight")
    vocabulary, _ = official.shape("output.weight")
    if rows < vocabulary:
        raise ValueError(
            f"official_state_dict: expected at least the head's {vocabulary} rows in "
            f"model.tok_embeddings.weight, got {rows}"
        )
    token = special.get("image_token_index")
    if token is None:
        token = rows - 1 if rows > vocabulary else rows
    if type(token) is not int or not 0 <= token <= rows:
        raise ValueError(
            "official_config: special: expected an image_token_index from 0 to the embedding's "
            f"{rows} rows, got {token!r}; give the tokenizer's id of <image>"
        )
    return token, max(rows, token + 1)


def _add_image_token(state: dict[str, Tensor], config: CollavoConfig) -> None:
    """Add the image token's row to an embedding that was saved before the token was added."""
    name = _OUTER["model.tok_embeddings.weight"]
    table = state[name]
    if 0 < table.shape[0] <= config.image_token_index:
        logger.info("model.tok_embeddings.weight: a row is added for the image token")
        state[name] = torch.cat([table, table.new_zeros(1, table.shape[1])])


def _vision_config(official: _Official, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return CLIP's fields: sizes from the tensors, the rest as given, else heads of 64."""
    fields = dict(given.get("vision_config", given.get("clip_config", {})))
    positions, hidden = official.shape(_VISION + "embeddings.position_embedding.weight")
    patch = official.shape(_VISION + "embeddings.patch_embedding.weight")[-1]
    layers = {
        name.removeprefix(_VISION).split(".")[2]
        for name in official.tensors
        if name.startswith(_VISION + "encoder.layers.")
    }
    inner, _ = official.shape(_VISION + "encoder.layers.0.mlp.fc1.weight")
    grid = fields.get("grid") or round((positions - 1) ** 0.5)
    known = (
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "projection_dim",
        "select_layer",
    )
    return {
        "num_attention_heads": max(2, hidden // 64),
        **{name: fields[name] for name in known if name in fields},
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "patch_size": patch,
        "image_size": grid * patch,
    }


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    scaling = text.get("rope_scaling")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(text.get("rope_theta", 10000.0)),
    }
    if scaling:
        if scaling.get("type") != "dynamic":
            raise ValueError(
                "official_config: rope_scaling: expected None or type 'dynamic' (the model rejects "
                f"others), got {scaling}"
            )
        rope |= {"rope_type": "dynamic", "factor": float(scaling["factor"])}
    return rope


def _convert_layer(
    official: _Official, state: dict[str, Tensor], index: int, config: CollavoConfig
) -> None:
    old, new = f"model.layers.{index}.", f"model.language_model.layers.{index}."
    for name, ours in _NORMS.items():
        state[new + ours] = official.take(old + name)
    _convert_wqkv(official, state, old + "attention.wqkv.", new + "self_attn.", config)
    for name, (linear, branch) in _LINEARS.items():
        prefix = f"{old}{name}."
        state[f"{new}{linear}.weight"] = official.take(prefix + "Plora_main.weight")
        if linear == "self_attn.o_proj" and config.text_config.attention_bias:
            state[f"{new}{linear}.bias"] = official.take(prefix + "Plora_main.bias")
        for part in ("A", "B"):
            adapter = f"{new}{linear}.lora_{part}.{IMAGE_ADAPTER}.weight"
            state[adapter] = official.take(f"{prefix}Plora_{part}.weight")
            crayon = official.take(f"{prefix}Plora_seg_{part}.weight")
            if branch is not None:
                state[f"{new}{branch}.{part}.weight"] = crayon
            elif index == 0 and part == "A":
                logger.info(
                    "feed_forward.w2: Plora_seg is dropped, the official model never uses it"
                )


def _convert_wqkv(
    official: _Official, state: dict[str, Tensor], old: str, new: str, config: CollavoConfig
) -> None:
    names = ("q_proj", "k_proj", "v_proj")

    heads = config.text_config.num_attention_heads
    kv_heads = config.text_config.num_key_value_heads or heads

    def unpacked(name: str) -> tuple[Tensor, ...]:
        return unpack_wqkv(official.take(old + name), heads, kv_heads)

    for linear, weight in zip(names, unpacked("Plora_main.weight"), strict=True):
        state[f"{new}{linear}.weight"] = weight
    if config.text_config.attention_bias:
        for linear, bias in zip(names, unpacked("Plora_main.bias"), strict=True):
            state[f"{new}{linear}.bias"] = bias
    shared = official.take(old + "Plora_A.weight")
    for linear, b in zip(names, unpacked("Plora_B.weight"), strict=True):
        state[f"{new}{linear}.lora_A.{IMAGE_ADAPTER}.weight"] = shared.clone()
        state[f"{new}{linear}.lora_B.{IMAGE_ADAPTER}.weight"] = b
    state[f"{new}crayon_qkv.A.weight"] = official.take(old + "Plora_seg_A.weight")
    state[f"{new}crayon_qkv.B.weight"] = torch.cat(unpacked("Plora_seg_B.weight"))


def unpack_wqkv(packed: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take InternLM2's packed rows apart: per key head its query heads, the key, the value.

    Args:
        packed: ``[(H + 2 G) D, ...]``, any dtype.
        heads: H.
        kv_heads: G.

    Returns:
        The rows of q ``[H D, ...]``, k ``[G D, ...]`` and v ``[G D, ...]``.

    Example:
        >>> import torch
        >>> [x.tolist() for x in unpack_wqkv(torch.arange(8), heads=4, kv_heads=2)]
        [[0, 1, 4, 5], [2, 6], [3, 7]]
    """
    if packed.numel() == 0:
        return packed, packed, packed
    share = heads // kv_heads
    blocks = packed.reshape(kv_heads, share + 2, -1, *packed.shape[1:])
    q, k, v = blocks[:, :share], blocks[:, share : share + 1], blocks[:, share + 1 :]
    flat = [x.reshape(-1, *packed.shape[1:]).contiguous() for x in (q, k, v)]
    return flat[0], flat[1], flat[2]


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """Resize CLIP's position table to another grid, as the official code does.

    Patches are interpolated bicubically (``align_corners=False``) and rounded to float16, as in the
    released model; the class token's row is kept.

    Args:
        table: ``[1 + g g, hidden]``.
        grid: The new grid's side.

    Returns:
        ``[1 + grid grid, hidden]``, table's dtype.

    Raises:
        ValueError: if the table is not that of a square grid.

    Example:
        >>> import torch
        >>> resize_position_embedding(torch.randn(1 + 24 * 24, 8), 35).shape
        torch.Size([1226, 8])
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side != table.shape[0] - 1:
        raise ValueError(f"table: expected 1 + g * g rows, got {table.shape[0]}")
    patches = table[1:].reshape(side, side, -1).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        patches, size=(grid, grid), mode="bicubic", align_corners=False
    )
    flat = resized[0].flatten(1).T.half().to(table.dtype)
    return torch.cat([table[:1], flat])


def _fit_vision_positions(state: dict[str, Tensor], config: CollavoConfig) -> None:
    """Bring the position table to the configured grid, if the checkpoint has CLIP's own."""
    vision = config.vision_config
    grid = vision.image_size // vision.patch_size
    name = "model.vision_tower.embeddings.position_embedding.weight"
    if state[name].shape[0] != 1 + grid * grid:
        state[name] = resize_position_embedding(state[name], grid)
