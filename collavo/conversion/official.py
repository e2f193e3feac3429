"""The released CoLLaVO, InternLM2 with PLoRA, as a source: LLaMA with an adapter comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor

from collavo._arguments import expect_like
from collavo.configuration import CollavoConfig
from collavo.conversion.changes import say_dtypes
from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.official_config import read_config
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
    resize_position_embedding,
    square_side,
    unpack_wqkv,
)
from collavo.conversion.plan import Header, Output, Plan, Tensors
from collavo.conversion.shapes import Shapes, decoder_weights, shapes_of
from collavo.model.inventory import part_of


def convert_state_dict(
    official_state_dict: Mapping[str, Tensor], official_config: Mapping[str, Any]
) -> tuple[CollavoConfig, dict[str, Tensor]]:
    """Turn the official model's tensors and configuration into this package's.

    The packed ``wqkv`` is taken apart, PLoRA's A and B become the adapter ``"plora"`` on image
    tokens (q, k and v get a copy each of the A they share), and its ``seg`` pair the crayon
    branches of projection mode. The ``seg`` pair of every ``feed_forward.w2`` is dropped: the
    official code never calls it, and its shapes do not allow it to be called. ``collavo convert``
    does the same from folder to folder, shard by shard.

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
        The configuration, whose ``dtype`` is that of most tensors, and a state dict for
        ``CollavoForConditionalGeneration(config).load_state_dict(..., strict=True)``. Tensors that
        need no rearranging are the given ones, not copies.

    Raises:
        TypeError: if an argument is no dictionary.
        ValueError: naming the tensors that are missing, have another shape or have no place, or
            the field of the configuration.

    Source: released CoLLaVO code, InternLM2 with PLoRA.
    """
    for name, value in (
        ("official_state_dict", official_state_dict),
        ("official_config", official_config),
    ):
        expect_like(name, value, "a dictionary", has=("items", "get"), hint="load the file first")
    headers = {n: Header(tuple(t.shape), t.dtype) for n, t in official_state_dict.items()}
    config, plan = plan_official("official_state_dict", headers, official_config, Options(), None)
    config = say_dtypes(config, plan)
    state: dict[str, Tensor] = {}
    for entry in plan.entries:
        made = entry.make(*(official_state_dict[name] for name in entry.sources))
        state |= {output.name: value for output, value in zip(entry.outputs, made, strict=True)}
    return config, state


def plan_official(
    where: str,
    headers: Mapping[str, Header],
    values: Mapping[str, Any],
    options: Options,
    image_token: ImageToken | None,
) -> tuple[CollavoConfig, Plan]:
    """Plan what becomes of the official tensors; see ``SourceKind.plan``.

    Args:
        where: What they are of.
        headers: The tensors by their official names.
        values: As ``official_config`` of :func:`convert_state_dict`.
        options: Its ``crayon_mode`` is ``"projection"``, the official model's, or ``"none"``.
        image_token: The tokenizer's.

    Raises:
        ValueError: naming the tensors, the field of the configuration, or the option.
    """
    tensors = Tensors(headers, where)
    if image_token is None and options.image_token is not None:
        values = {**values, "special": {"image_token_index": options.image_token}}
    config = read_config(tensors, values, image_token)
    shapes = shapes_of(config)
    _plan_embedding(tensors, shapes, config)
    for index in range(config.text_config.num_hidden_layers):
        _plan_layer(tensors, shapes, index, config)
    for old, new in (OUTER | PROMPT).items():
        tensors.copy(new, old, shapes[new])
    _plan_vision(tensors, shapes, config)
    tensors.note("feed_forward.w2: Plora_seg is dropped, the official model never uses it")
    plan = tensors.plan(decoder_weights(config))
    config.text_config.quantize = options.quantize
    if (options.crayon_mode or config.crayon_mode) == config.crayon_mode:
        return config, plan
    return _without_crayon(config, plan, options)


def _without_crayon(
    config: CollavoConfig, plan: Plan, options: Options
) -> tuple[CollavoConfig, Plan]:
    if options.crayon_mode != "none":
        raise ValueError(
            f"--crayon-mode: expected 'projection', as the official model was trained, or 'none', "
            f"got {options.crayon_mode!r}"
        )
    config.text_config.crayon_mode = "none"
    kept = [e for e in plan.entries if not str(part_of(e.outputs[0].name)).startswith("crayon")]
    said = "the crayon (Plora_seg, seg_*, vision_proj_for_seg) is dropped"
    return config, plan._replace(entries=tuple(kept), notes=(*plan.notes, said))


def _plan_embedding(tensors: Tensors, shapes: Shapes, config: CollavoConfig) -> None:
    """Take the embedding; saved before the image token was added, it has no row for it."""
    rows, _ = tensors.shape(EMBEDDING, 2)
    added = shapes[OWN_EMBEDDING][0] - rows
    dtype = tensors.take(EMBEDDING, (rows, *shapes[OWN_EMBEDDING][1:]))

    def grown(table: Tensor) -> tuple[Tensor]:
        return (torch.cat([table, table.new_zeros(added, table.shape[1])]) if added else table,)

    tensors.make([Output(OWN_EMBEDDING, shapes[OWN_EMBEDDING], dtype)], [EMBEDDING], grown)
    if added:
        token = config.image_token_index
        tensors.note(f"{EMBEDDING}: a row of zeros is added for the image token, id {token}")


def _plan_layer(tensors: Tensors, shapes: Shapes, index: int, config: CollavoConfig) -> None:
    old, new = f"model.layers.{index}.", f"model.language_model.layers.{index}."
    for name, ours in NORMS.items():
        tensors.copy(new + ours, old + name, shapes[new + ours])
    _plan_wqkv(tensors, shapes, old + "attention.wqkv.", new + "self_attn.", config)
    for linear in LINEARS:
        source, target = f"{old}{linear.official}.", f"{new}{linear.own}."
        for part in ("weight", "bias"):
            if target + part in shapes:
                name = f"{source}Plora_main.{part}"
                tensors.copy(target + part, name, shapes[target + part])
        rank = config.crayon_rank
        unused = {
            "A": (rank, config.text_config.intermediate_size),
            "B": (config.text_config.hidden_size, rank),
        }
        for factor in ("A", "B"):
            adapter = f"{target}lora_{factor}.{IMAGE_ADAPTER}.weight"
            tensors.copy(adapter, f"{source}Plora_{factor}.weight", shapes[adapter])
            seg = f"{source}Plora_seg_{factor}.weight"
            if linear.branch is None:
                tensors.take(seg, unused[factor])
            else:
                branch = f"{new}{linear.branch}.{factor}.weight"
                tensors.copy(branch, seg, shapes[branch])


def _plan_wqkv(tensors: Tensors, shapes: Shapes, old: str, new: str, config: CollavoConfig) -> None:
    heads = config.text_config.num_attention_heads
    unpack = partial(
        unpack_wqkv, heads=heads, kv_heads=config.text_config.num_key_value_heads or heads
    )

    def unpacked(official: str, own: list[str]) -> None:
        each = [shapes[name] for name in own]
        dtype = tensors.take(official, (sum(s[0] for s in each), *each[0][1:]))
        outputs = [Output(name, shape, dtype) for name, shape in zip(own, each, strict=True)]
        tensors.make(outputs, [official], unpack)

    unpacked(f"{old}Plora_main.weight", [f"{new}{linear}.weight" for linear in QKV])
    if config.text_config.attention_bias:
        unpacked(f"{old}Plora_main.bias", [f"{new}{linear}.bias" for linear in QKV])
    adapters = [f"{new}{linear}.lora_{{}}.{IMAGE_ADAPTER}.weight" for linear in QKV]
    unpacked(f"{old}Plora_B.weight", [name.format("B") for name in adapters])
    shared, copies = f"{old}Plora_A.weight", [name.format("A") for name in adapters]
    dtype = tensors.take(shared, shapes[copies[0]])
    outputs = [Output(name, shapes[name], dtype) for name in copies]
    tensors.make(outputs, [shared], lambda a: (a.clone(), a.clone(), a.clone()))
    a, b = f"{new}crayon_qkv.A.weight", f"{new}crayon_qkv.B.weight"
    tensors.copy(a, f"{old}Plora_seg_A.weight", shapes[a])
    dtype = tensors.take(f"{old}Plora_seg_B.weight", shapes[b])
    tensors.make(
        [Output(b, shapes[b], dtype)],
        [f"{old}Plora_seg_B.weight"],
        lambda packed: (torch.cat(unpack(packed)),),
    )


def _plan_vision(tensors: Tensors, shapes: Shapes, config: CollavoConfig) -> None:
    for name, shape in shapes.items():
        if not name.startswith(OWN_VISION):
            continue
        official = VISION + name.removeprefix(OWN_VISION)
        if not name.endswith("position_embedding.weight"):
            tensors.copy(name, official, shape)
            continue
        rows, _ = tensors.shape(official, 2)
        if rows == shape[0]:
            tensors.copy(name, official, shape)
            continue
        old_side, side = square_side(rows, official), square_side(shape[0])
        dtype = tensors.take(official, (rows, *shape[1:]))
        resize = partial(_resized, grid=side)
        tensors.make([Output(name, shape, dtype)], [official], resize)
        tensors.note(f"{official}: resized from {old_side} to {side} cells a side")


def _resized(table: Tensor, grid: int) -> tuple[Tensor]:
    return (resize_position_embedding(table, grid),)
