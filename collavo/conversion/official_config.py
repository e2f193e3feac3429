"""The official CoLLaVO's ``config.json`` read, and written for the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from collavo.configuration import CollavoConfig, CollavoTextConfig
from collavo.conversion.kinds import ImageToken
from collavo.conversion.official_layout import EMBEDDING, IMAGE_ADAPTER, VISION, square_side
from collavo.conversion.plan import Tensors

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
_VISION_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "projection_dim")
_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def read_config(
    tensors: Tensors, values: Mapping[str, Any], image_token: ImageToken | None
) -> CollavoConfig:
    """Return this package's configuration of an official model, in projection mode.

    Args:
        tensors: Its tensors, which show the sizes that its configuration lacks.
        values: As ``official_config`` of ``convert_state_dict``.
        image_token: The tokenizer's; without, ``special`` of ``values`` says it, or the rows do.

    Raises:
        ValueError: naming the tensor or field.
    """
    try:
        return _read_config(tensors, values, image_token)
    except (TypeError, KeyError, AttributeError, OverflowError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"official_config: a field is of another kind than expected ({reason})"
        ) from error


def _read_config(
    tensors: Tensors, values: Mapping[str, Any], image_token: ImageToken | None
) -> CollavoConfig:
    text = dict(values.get("config", values))
    for name in _REQUIRED:
        _expect_count(name, text.get(name))
    _expect_count("max_position_embeddings", text.get("max_position_embeddings", 1))
    for fields in (text, _vision_values(values)):
        if (known := fields.get("hidden_act", "silu")) not in ACT2FN:
            raise ValueError(f"official_config: hidden_act: expected a known one, got {known!r}")
    vocabulary, _ = tensors.shape("output.weight", 2)
    if text.get("tie_word_embeddings"):
        raise ValueError(
            "official_config: tie_word_embeddings: expected false, got "
            f"{text['tie_word_embeddings']!r}; the official model has a head of its own"
        )
    token, rows = _image_token(tensors, values.get("special") or {}, image_token)
    rank, _ = tensors.shape("model.layers.0.attention.wqkv.Plora_A.weight", 2)
    crayon_rank, _ = tensors.shape("model.layers.0.attention.wqkv.Plora_seg_A.weight", 2)
    classes, width = tensors.shape("seg_prompt_embed.weight", 2)
    numbers, _ = tensors.shape("seg_num_embed.weight", 2)
    for name, size in (("Plora_A", rank), ("Plora_seg_A", crayon_rank)):
        _expect_count(f"rows of {name}", size)
    scaling = _scaling(values.get("lora", {}), rank)
    if (padding := text.get("pad_token_id")) is not None:
        _expect_between("pad_token_id", padding, -vocabulary, vocabulary - 1)
    vision = _vision_config(tensors, values)
    layer, layers = _vision_values(values).get("select_layer", -1), vision["num_hidden_layers"]
    _expect_between("select_layer", layer, -layers - 1, layers)
    grid = vision["image_size"] // vision["patch_size"]
    return CollavoConfig(
        text_config=CollavoTextConfig(
            **{name: text[name] for name in _TEXT_FIELDS if name in text},
            num_key_value_heads=_kv_heads(text),
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
        image_token_index=token,
        image_seq_length=grid * grid,
        vision_feature_layer=layer,
        num_crayon_classes=classes - 1,
        max_crayon_number=numbers - 1,
        crayon_embed_dim=width,
        architectures=["CollavoForConditionalGeneration"],
    )


def official_values(config: CollavoConfig) -> dict[str, Any]:
    """Return the official ``config.json`` of a model, with what the official one leaves to code.

    ``vision_config``, ``lora`` and ``special`` are not read by the official code, which has these
    values written in it; :func:`read_config` reads them.

    Args:
        config: The model's.
    """
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters or {})
    dynamic = {"type": "dynamic", "factor": rope.get("factor", 1.0)}
    rank, alpha = text.adapter_size(IMAGE_ADAPTER)
    return {
        "architectures": ["CoLLaVOModel"],
        "model_type": "internlm",
        **{name: getattr(text, name) for name in _TEXT_FIELDS},
        "vocab_size": text.vocab_size,
        "num_key_value_heads": text.num_key_value_heads,
        "bias": text.attention_bias,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": dynamic if rope.get("rope_type") == "dynamic" else None,
        "tie_word_embeddings": False,
        "lora": {"r": rank, "alpha": alpha},
        "special": {"image_token_index": config.image_token_index},
        "vision_config": {
            **{name: getattr(vision, name) for name in _VISION_FIELDS},
            "select_layer": config.vision_feature_layer,
        },
    }


def official_image_token(values: Mapping[str, Any]) -> int | None:
    """Return the image token's id that :func:`official_values` wrote, None where nothing did.

    Args:
        values: ``config.json``.
    """
    special = values.get("special")
    token = special.get("image_token_index") if isinstance(special, Mapping) else None
    return token if type(token) is int else None


def _expect_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(
            f"official_config: {name}: expected a positive whole number, got {value!r}"
        )


def _expect_between(name: str, value: object, first: int, last: int) -> None:
    if type(value) is not int or not first <= value <= last:
        wanted = f"a whole number from {first} to {last}"
        raise ValueError(f"official_config: {name}: expected {wanted}, got {value!r}")


def _kv_heads(text: Mapping[str, Any]) -> int:
    heads: int = text["num_attention_heads"]
    kv_heads: int = text.get("num_key_value_heads") or heads
    _expect_count("num_key_value_heads", kv_heads)
    for name, whole, part in (
        ("num_attention_heads", "hidden_size", heads),
        ("num_key_value_heads", "num_attention_heads", kv_heads),
    ):
        if text[whole] % part:
            raise ValueError(
                f"official_config: {name}: expected a divisor of {whole} {text[whole]}, got {part}"
            )
    return kv_heads


def _image_token(
    tensors: Tensors, special: Mapping[str, Any], known: ImageToken | None
) -> tuple[int, int]:
    """Return the image token's id and how many rows the embedding has with it."""
    rows, _ = tensors.shape(EMBEDDING, 2)
    vocabulary, _ = tensors.shape("output.weight", 2)
    if rows < vocabulary:
        raise ValueError(
            f"{tensors.where}: expected at least the head's {vocabulary} rows in {EMBEDDING}, got "
            f"{rows}"
        )
    if known is not None:
        _expect_vocabulary(tensors, known, vocabulary, rows)
        return known.token_id, max(rows, known.token_id + 1)
    token = special.get("image_token_index")
    if token is None:
        token = rows - 1 if rows > vocabulary else rows
    if type(token) is not int or not 0 <= token <= rows:
        raise ValueError(
            "official_config: special: expected an image_token_index from 0 to the embedding's "
            f"{rows} rows, got {token!r}; give the tokenizer's id of <image>"
        )
    return token, max(rows, token + 1)


def _expect_vocabulary(tensors: Tensors, known: ImageToken, vocabulary: int, rows: int) -> None:
    """Raise unless the tokenizer has the head's words: the image token may be one more."""
    last = known.token_id == known.vocabulary - 1
    words = known.vocabulary - 1 if last else known.vocabulary
    if vocabulary not in (words, known.vocabulary) or known.token_id > rows:
        raise ValueError(
            f"{tensors.where}: its tokenizer has {words} ids beside {known.word!r} (id "
            f"{known.token_id}), and output.weight {vocabulary} rows; the tokenizer is another "
            "model's, or lacks tokens that were added to it"
        )


def _scaling(lora: Mapping[str, Any], rank: int) -> float:
    alpha = _expect_number("lora: alpha", lora.get("alpha", rank), least=-math.inf)
    if lora.get("r", rank) != rank:
        raise ValueError(
            f"official_config: lora: r: expected {rank}, the rows of Plora_A, got {lora['r']!r}"
        )
    return alpha / rank


def _expect_number(name: str, value: object, least: float = 0.0) -> float:
    if type(value) not in (int, float) or not math.inf > cast(float, value) > least:
        wanted = "a finite number" if least < 0 else "a positive number"
        raise ValueError(f"official_config: {name}: expected {wanted}, got {value!r}")
    return float(cast(float, value))


def _vision_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values.get("vision_config", values.get("clip_config", {})))


def _vision_config(tensors: Tensors, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return CLIP's fields: sizes from the tensors, the rest as given, else heads of 64."""
    fields = _vision_values(values)
    table = f"{VISION}embeddings.position_embedding.weight"
    positions, hidden = tensors.shape(table, 2)
    patch = tensors.shape(f"{VISION}embeddings.patch_embedding.weight", 4)[-1]
    layers = {
        name.removeprefix(VISION).split(".")[2]
        for name in tensors.names(f"{VISION}encoder.layers.")
    }
    inner, _ = tensors.shape(f"{VISION}encoder.layers.0.mlp.fc1.weight", 2)
    grid = fields.get("grid") or square_side(positions, table)
    for name, size in (("grid", grid), ("patch", patch)):
        _expect_count(name, size)
    return {
        "num_attention_heads": max(2, hidden // 64),
        **{name: fields[name] for name in _VISION_FIELDS if name in fields},
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
        "rope_theta": _expect_number("rope_theta", text.get("rope_theta", 10000.0)),
    }
    if scaling:
        if scaling.get("type") != "dynamic":
            raise ValueError(
                "official_config: rope_scaling: expected None or type 'dynamic' (the model rejects "
                f"others), got {scaling}"
            )
        factor = _expect_number("rope_scaling: factor", scaling.get("factor"))
        rope |= {"rope_type": "dynamic", "factor": factor}
    return rope
