"""Folders as the official CoLLaVO's code saves them, of any size, with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ENDINGS = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}
POSITIONS = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Sizes:
    """An official model's sizes; ``rows`` is the embedding's, ``vocabulary`` the head's."""

    hidden: int = 64
    inner: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 50
    rows: int = 50
    rank: int = 4
    bias: bool = False
    width: int = 64
    vision_layers: int = 1
    grid: int = 3
    patch: int = 4
    classes: int = 133
    numbers: int = 20


RELEASED = Sizes(
    hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocabulary=92544, rows=92545,
    rank=256, width=1024, vision_layers=24, grid=35, patch=14,
)  # fmt: skip


def official_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape; ``feed_forward.w2`` has a branch that nothing calls."""
    packed = (s.heads + 2 * s.kv_heads) * (s.hidden // s.heads)
    linears = {
        "attention.wqkv": (packed, s.hidden, s.bias),
        "attention.wo": (s.hidden, s.hidden, s.bias),
        "feed_forward.w1": (s.inner, s.hidden, False),
        "feed_forward.w2": (s.hidden, s.inner, False),
        "feed_forward.w3": (s.inner, s.hidden, False),
    }
    found: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (s.rows, s.hidden)}
    for layer in range(s.layers):
        for name, (outputs, inputs, bias) in linears.items():
            prefix = f"model.layers.{layer}.{name}.Plora_"
            found[f"{prefix}main.weight"] = (outputs, inputs)
            if bias:
                found[f"{prefix}main.bias"] = (outputs,)
            for branch in ("", "seg_"):
                found[f"{prefix}{branch}A.weight"] = (s.rank, inputs)
                found[f"{prefix}{branch}B.weight"] = (outputs, s.rank)
        for norm in ("attention_norm", "ffn_norm"):
            found[f"model.layers.{layer}.{norm}.weight"] = (s.hidden,)
    found |= {"model.norm.weight": (s.hidden,), "output.weight": (s.vocabulary, s.hidden)}
    found["seg_prompt_embed.weight"] = (s.classes + 1, s.width)
    found["seg_num_embed.weight"] = (s.numbers + 1, s.width)
    for projector in ("vision_proj", "vision_proj_for_seg"):
        for index, inputs in ((0, s.width), (2, s.hidden)):
            found[f"{projector}.{index}.weight"] = (s.hidden, inputs)
            found[f"{projector}.{index}.bias"] = (s.hidden,)
    return found | dict(_vision_shapes(s))


def _vision_shapes(s: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    tower, width, inner = "vit.vision_tower.vision_model.", s.width, 4 * s.width
    yield f"{tower}embeddings.class_embedding", (width,)
    yield f"{tower}embeddings.patch_embedding.weight", (width, 3, s.patch, s.patch)
    yield POSITIONS, (1 + s.grid**2, width)
    layers = [f"{tower}encoder.layers.{layer}." for layer in range(s.vision_layers)]
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    linears = {}
    for prefix in layers:
        norms += [f"{prefix}layer_norm1", f"{prefix}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linears[f"{prefix}self_attn.{name}"] = (width, width)
        linears |= {f"{prefix}mlp.fc1": (inner, width), f"{prefix}mlp.fc2": (width, inner)}
    for name, shape in ({norm: (width,) for norm in norms} | linears).items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def official_tensors(
    sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Draw an official model's tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for name, shape in official_shapes(sizes).items()
    }


def official_config(s: Sizes, **changes: Any) -> dict[str, Any]:
    """Return the ``config.json`` of an official folder."""
    return {
        "architectures": ["CoLLaVOModel"],
        "model_type": "internlm",
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "intermediate_size": s.inner,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "hidden_act": "silu",
        "bias": s.bias,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        **changes,
    }


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Write a folder in one file or in shards, neighbours in different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if kind == "safetensors" else torch.save
    single = ENDINGS[kind]
    if shards == 1:
        save(dict(tensors), folder / single)
        return folder
    stem, ending = single.rsplit(".", 1)
    names = [f"{stem}-{n:05d}-of-{shards:05d}.{ending}" for n in range(1, shards + 1)]
    placed = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file_name in names:
        part = {name: tensors[name] for name, place in placed.items() if place == file_name}
        save(part, folder / file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / f"{single}.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read all safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
