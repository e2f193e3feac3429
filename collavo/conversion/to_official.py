"""The way back: a model of this package in the official CoLLaVO's layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor

from collavo.configuration import CollavoConfig
from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.official_config import official_values
from collavo.conversion.official_layout import (
    EMBEDDING,
    IMAGE_ADAPTER,
    LINEARS,
    NORMS,
    OUTER,
    OWN_EMBEDDING,
    OWN_VISION,
    PROMPT,
    QKV,
    VISION,
    pack_wqkv,
)
from collavo.conversion.plan import Header, Output, Plan, Tensors
from collavo.conversion.shapes import Shapes, shapes_of


def plan_to_official(
    where: str,
    headers: Mapping[str, Header],
    values: Mapping[str, Any],
    options: Options,
    image_token: ImageToken | None,
) -> tuple[dict[str, Any], Plan]:
    """Plan the official tensors of a model of this package; see ``SourceKind.plan``.

    q, k and v share one A there: it is taken where the model's three are equal, as they are until
    one is trained. The ``seg`` pair of ``feed_forward.w2``, which the official model has and never
    uses, is written as zeros. A last embedding row of zeros for the image token is left out: the
    official loader adds it.

    Args:
        where: The folder.
        headers: Its tensors.
        values: Its ``config.json``.
        options: Of which ``dtype`` alone has a meaning.
        image_token: Is not asked for: the configuration has it.

    Raises:
        ValueError: naming the setting for which the official layout has no place, or the tensors.
    """
    config = CollavoConfig.from_dict(dict(values))
    _expect_official(config, where)
    for name, given in (
        ("--quantize", options.quantize),
        ("--crayon-mode", options.crayon_mode),
        ("--image-token", options.image_token),
    ):
        if given is not None:
            raise ValueError(f"{name}: expected none beside --to-official, got {given!r}")
    tensors = Tensors(headers, where)
    shapes = shapes_of(config)
    _plan_embedding(tensors, shapes, config)
    for index in range(config.text_config.num_hidden_layers):
        _plan_layer(tensors, shapes, index, config)
    for official, own in (OUTER | PROMPT).items():
        tensors.copy(official, own, shapes[own])
    for own in shapes:
        if own.startswith(OWN_VISION):
            tensors.copy(VISION + own.removeprefix(OWN_VISION), own, shapes[own])
    tensors.note("feed_forward.w2: Plora_seg, which the official model never uses, is zeros")
    return official_values(config), tensors.plan()


def _expect_official(config: CollavoConfig, where: str) -> None:
    """Raise for what the official layout cannot say."""
    text, vision = config.text_config, config.vision_config
    names = [IMAGE_ADAPTER]
    head_dim = text.hidden_size // text.num_attention_heads
    rope = dict(text.rope_parameters or {}).get("rope_type", "default")
    found: tuple[tuple[str, object, object], ...] = (
        ("quantize", config.quantize, None),
        ("crayon_mode", config.crayon_mode, "projection"),
        ("adapters", list(config.adapters), names),
        ("image_adapters", list(config.image_adapters), names),
        ("lora_rank_pattern", text.lora_rank_pattern or None, None),
        ("lora_alpha_pattern", text.lora_alpha_pattern or None, None),
        ("tie_word_embeddings", bool(config.tie_word_embeddings), False),
        ("mlp_bias", text.mlp_bias, False),
        ("head_dim", text.head_dim or head_dim, head_dim),
        ("projector_type", config.projector_type, "mlp2x_gelu"),
        ("rope_type", rope if rope == "dynamic" else "default", rope),
        ("vision_config", vision.model_type, "clip_vision_model"),
    )
    for name, setting, wanted in found:
        if setting != wanted:
            raise ValueError(
                f"{where}: {name}: expected {wanted!r}, got {setting!r}; the official layout has "
                "no place for it"
            )
    rank, alpha = text.adapter_size(IMAGE_ADAPTER)
    crayon_scaling = 1.0 if text.crayon_alpha is None else text.crayon_alpha / text.crayon_rank
    if abs(crayon_scaling - alpha / rank) > 1e-12 * abs(crayon_scaling):
        raise ValueError(
            f"{where}: crayon_alpha: expected the adapter's scaling {alpha / rank}, which is the "
            f"official model's for both, got {crayon_scaling}"
        )


def _plan_embedding(tensors: Tensors, shapes: Shapes, config: CollavoConfig) -> None:
    rows, width = shapes[OWN_EMBEDDING]
    dtype = tensors.take(OWN_EMBEDDING, shapes[OWN_EMBEDDING])
    added = config.extra_embeddings == 1 and config.image_token_index == rows - 1

    def loaded(table: Tensor) -> tuple[Tensor]:
        return (table[:-1] if added and not table[-1].any() else table,)

    output = Output(EMBEDDING, (-1 if added else rows, width), dtype)
    tensors.make([output], [OWN_EMBEDDING], loaded)


def _plan_layer(tensors: Tensors, shapes: Shapes, index: int, config: CollavoConfig) -> None:
    official, own = f"model.layers.{index}.", f"model.language_model.layers.{index}."
    for name, ours in NORMS.items():
        tensors.copy(official + name, own + ours, shapes[own + ours])
    _plan_wqkv(tensors, shapes, f"{official}attention.wqkv.", f"{own}self_attn.", config)
    for linear in LINEARS:
        target, source = f"{official}{linear.official}.", f"{own}{linear.own}."
        for part in ("weight", "bias"):
            if source + part in shapes:
                tensors.copy(f"{target}Plora_main.{part}", source + part, shapes[source + part])
        for factor in ("A", "B"):
            adapter = f"{source}lora_{factor}.{IMAGE_ADAPTER}.weight"
            tensors.copy(f"{target}Plora_{factor}.weight", adapter, shapes[adapter])
            seg = f"{target}Plora_seg_{factor}.weight"
            if linear.branch is not None:
                branch = f"{own}{linear.branch}.{factor}.weight"
                tensors.copy(seg, branch, shapes[branch])
                continue
            rank, text = config.crayon_rank, config.text_config
            shape = (rank, text.intermediate_size) if factor == "A" else (text.hidden_size, rank)
            dtype = tensors.take(adapter, shapes[adapter])
            zeros = partial(_zeros, shape, dtype)
            tensors.make([Output(seg, shape, dtype)], [], zeros)


def _plan_wqkv(
    tensors: Tensors, shapes: Shapes, official: str, own: str, config: CollavoConfig
) -> None:
    heads = config.text_config.num_attention_heads
    kv_heads = config.text_config.num_key_value_heads or heads

    def packed(target: str, names: list[str]) -> None:
        dtypes = {name: tensors.take(name, shapes[name]) for name in names}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"{tensors.where}: expected one dtype for all of these, got {dtypes}")
        rows = sum(shapes[name][0] for name in names)
        output = Output(target, (rows, *shapes[names[0]][1:]), dtypes[names[0]])
        tensors.make([output], names, lambda q, k, v: (pack_wqkv(q, k, v, heads, kv_heads),))

    packed(f"{official}Plora_main.weight", [f"{own}{linear}.weight" for linear in QKV])
    if config.text_config.attention_bias:
        packed(f"{official}Plora_main.bias", [f"{own}{linear}.bias" for linear in QKV])
    adapters = [f"{own}{linear}.lora_{{}}.{IMAGE_ADAPTER}.weight" for linear in QKV]
    packed(f"{official}Plora_B.weight", [name.format("B") for name in adapters])
    copies = [name.format("A") for name in adapters]
    for name in copies[1:]:
        tensors.take(name, shapes[name])
    tensors.check(copies, partial(_expect_equal, copies))
    tensors.copy(f"{official}Plora_A.weight", copies[0], shapes[copies[0]])
    a, b = f"{own}crayon_qkv.A.weight", f"{own}crayon_qkv.B.weight"
    tensors.copy(f"{official}Plora_seg_A.weight", a, shapes[a])
    dim = shapes[f"{own}q_proj.weight"][0] // heads
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    output = Output(f"{official}Plora_seg_B.weight", shapes[b], tensors.take(b, shapes[b]))
    tensors.make([output], [b], partial(_packed, sizes, heads, kv_heads))


def _packed(sizes: list[int], heads: int, kv_heads: int, rows: Tensor) -> tuple[Tensor]:
    q, k, v = torch.split(rows, sizes)
    return (pack_wqkv(q, k, v, heads, kv_heads),)


def _expect_equal(names: list[str], first: Tensor, *others: Tensor) -> None:
    for name, other in zip(names[1:], others, strict=True):
        if not torch.equal(first, other):
            raise ValueError(
                f"{name}: expected the values of {names[0]}, got others; q, k and v share one A in "
                "the official layout, so what was trained here with three has no place there"
            )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.zeros(shape, dtype=dtype),)
