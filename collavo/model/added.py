"""What ``apply_to_llava`` added to a model, in files of its own: crayon, branches and adapters."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from collavo import writing
from collavo._arguments import expect_path
from collavo.configuration import decoder_settings
from collavo.model.described import describe_llava
from collavo.model.families import decoder_of
from collavo.model.files import fields_read
from collavo.model.layer import BRANCHES, HOOKS_OFF
from collavo.panoptic.json_files import read_object
from collavo_kernels import NF4Weight
from collavo_kernels.nn import DualQLoRALinear

WEIGHTS, SETTINGS = "collavo_added.safetensors", "collavo_added.json"
_PARTS = {"crayon_prompt", "lora_A", "lora_B", *BRANCHES}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# A cast to 16 bits moves a weight by 0.2 %, NF4 by 10 %; two models have nothing in common.
_DENSE, _IN_4_BITS = 0.01, 0.35
_VALUES = 16


def added_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what was added by its name in the model, scalings (``lora_scaling.<name>``) too.

    Args:
        model: A patched model.

    Raises:
        ValueError: if one of them is offloaded.
    """
    # Not from the state dict: it would bring every 4-bit weight into its saved order.
    named = dict(model.named_parameters())
    added = {name: p.detach() for name, p in named.items() if _PARTS & set(name.split("."))}
    for name, value in added.items():
        if value.is_meta:
            raise ValueError(
                f"added_state_dict: {name} is offloaded and has no values here; take the hooks "
                f"off first ({HOOKS_OFF})"
            )
    for name, module in model.named_modules():
        if isinstance(module, DualQLoRALinear):
            added |= module.scaling_state_dict(f"{name}.")
    return added


def save_added(model: Any, folder: str | PathLike[str]) -> None:
    """Save what was added to a model, its settings, and what it belongs to.

    Args:
        model: A patched model.
        folder: Made if needed; gets ``collavo_added.safetensors`` and ``collavo_added.json``.

    Raises:
        TypeError: if the folder is no path.
        ValueError: if the additions are offloaded, or PEFT's layers stand around the decoder's.
    """
    expect_path("folder", folder, "the folder of what was added")
    crayon = dict(describe_llava(model, model.decoder_settings()).crayon or {})
    crayon.pop("base")
    crayon["decoder"] = {**crayon["decoder"], "quantize": None}
    tensors = {n: v.cpu().contiguous() for n, v in added_tensors(model).items()}
    # The same word in both files: of two saves into one folder none is half read.
    token = secrets.token_hex(8)
    facts = {"save": token, "crayon": crayon, "base": _sizes(model), "samples": _samples(model)}
    with writing.written_folder(folder, ()) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt", "save": token})
        content = json.dumps(facts, indent=1) + "\n"
        (partial / SETTINGS).write_text(content, encoding="utf-8")


def read_added(folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors that ``save_added`` wrote.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the file that is damaged, or of another save than the other one.
    """
    expect_path("folder", folder, "the folder of what was added")
    weights, settings = Path(folder) / WEIGHTS, Path(folder) / SETTINGS
    for path in (settings, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; save_added writes it")
    facts = read_object(settings, utf8=True)
    for name in ("crayon", "base", "samples"):
        if not isinstance(facts.get(name), dict):
            raise ValueError(f"{settings}: {name}: expected an object as save_added writes it")
    for name, sample in facts["samples"].items():
        if not _is_sample(sample):
            raise ValueError(f"{settings}: samples: {name}: expected bits and values")
    try:
        with safe_open(weights, "pt") as file:
            token = (file.metadata() or {}).get("save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{weights}: not a whole safetensors file ({error}); copy it anew"
        ) from error
    if token != facts.get("save"):
        raise ValueError(f"{weights}: is not of the same save as {SETTINGS}; copy both anew")
    return facts, tensors


def load_tensors(model: Any, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Load additions into a patched model, or raise before anything changes.

    Args:
        model: Has crayon and adapters of the same kind; ranks and scalings may be others.
        facts: Of ``read_added``.
        tensors: Of ``read_added``.

    Raises:
        ValueError: naming what does not fit: a setting, a tensor, or the model around.
    """
    check_base(model, facts)
    _check_settings(model, facts["crayon"])
    own = added_tensors(model)
    missing, surplus = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    for what, names in (("are missing", missing), ("have no place in the model", surplus)):
        if names:
            raise ValueError(f"{WEIGHTS}: {len(names)} tensors {what}, the first is {names[0]}")
    for name, value in tensors.items():
        _check_tensor(name, value, own[name])
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and b is not None and b.shape[1:] != value.shape[:1]:
            raise ValueError(
                f"{WEIGHTS}: {name}: expected the rank of its B {list(b.shape)}, got "
                f"{list(value.shape)}; copy both files anew"
            )
    model.load_state_dict(tensors, strict=False)


def check_base(model: Any, facts: Mapping[str, Any]) -> None:
    """Raise unless additions belong to this model: its family, its sizes, its weights.

    Args:
        model: Patched or not.
        facts: Of ``read_added``.

    Raises:
        ValueError: naming the size or the weight that is another's.
    """
    own, theirs = _sizes(model), facts["base"]
    for name, value in own.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{SETTINGS}: was saved from a model with {name} {theirs.get(name)!r}, and this "
                f"one has {value!r}; load it into the model it was trained with"
            )
    samples, compared = _samples(model), 0
    for name, (bits, values) in facts["samples"].items():
        if name not in samples or len(samples[name][1]) != len(values):
            continue  # offloaded, or quantised by another package
        bound = _IN_4_BITS if bits == 4 or samples[name][0] == 4 else _DENSE
        wanted, found = torch.tensor(values), torch.tensor(samples[name][1])
        compared += 1
        if not (found - wanted).norm() <= bound * wanted.norm() + 1e-6:
            raise ValueError(
                f"{SETTINGS}: was saved from a model with another {name}; load it into the model "
                "it was trained with"
            )
    if not compared:
        raise ValueError(
            f"{SETTINGS}: has no weight to tell the model by that this one has values of; take "
            f"offload off first ({HOOKS_OFF})"
        )


def _is_sample(sample: Any) -> bool:
    pair = isinstance(sample, list) and len(sample) == 2 and isinstance(sample[1], list)
    return pair and all(type(value) in (int, float) for value in sample[1])


def _check_settings(model: Any, crayon: Mapping[str, Any]) -> None:
    own = describe_llava(model, model.decoder_settings()).crayon or {}
    with fields_read(SETTINGS):
        theirs = decoder_settings(crayon)
    names = ("crayon_mode", "crayon_rank", "crayon_alpha", "adapters", "image_adapters")
    pairs = {name: (getattr(theirs, name), own["decoder"][name]) for name in names}
    if theirs.crayon_mode != "projection":
        del pairs["crayon_rank"], pairs["crayon_alpha"]
    sizes = ("num_crayon_classes", "max_crayon_number", "crayon_embed_dim")
    pairs |= {name: (crayon.get(name), own.get(name)) for name in sizes}
    for name, (there, here) in pairs.items():
        if isinstance(here, list | tuple):
            there, here = list(there), list(here)
        if there != here:
            raise ValueError(
                f"{SETTINGS}: has {name} {there!r}, and the model was patched with {here!r}; undo "
                "and give the model to collavo.load_added, which takes the file's settings"
            )


def _check_tensor(name: str, value: Tensor, own: Tensor) -> None:
    parts = name.split(".")
    shape, wanted = list(value.shape), list(own.shape)
    for factor, rank in (("lora_A", 0), ("lora_B", 1)):
        if factor in parts and len(shape) == 2:
            wanted[rank] = shape[rank]  # a rank is taken over
    if shape != wanted or not value.is_floating_point():
        raise ValueError(
            f"{WEIGHTS}: {name}: expected floating values {wanted}, got {value.dtype} {shape}"
        )
    if "lora_scaling" not in parts and torch.promote_types(value.dtype, own.dtype) != own.dtype:
        raise ValueError(
            f"{WEIGHTS}: {name}: is in {value.dtype} and the model's in {own.dtype}, which would "
            f"round it; patch with adapter_dtype={value.dtype}"
        )


def _sizes(model: Any) -> dict[str, Any]:
    text = model.config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    return {"model_type": model.config.model_type, "decoder": text.model_type, **sizes}


def _samples(model: Any) -> dict[str, tuple[int, list[float]]]:
    """Return a few values of matrices by name, each with how many bits a weight has there.

    Of the decoder's layers those of the first and the last: a 4-bit weight is decoded for them.
    """
    decoder = decoder_of(model.model)
    layers = list(cast(nn.ModuleList, decoder.layers))
    skipped = {id(p) for layer in layers[1:-1] for p in layer.parameters()}
    found: dict[str, tuple[int, list[float]]] = {}
    for name, parameter in model.named_parameters():
        words = set(name.split("."))
        if id(parameter) in skipped or parameter.dim() < 2 or parameter.is_meta or words & _PARTS:
            continue
        if parameter.is_floating_point():
            found[name.replace(".base_layer.", ".")] = 16, _spread(parameter)
    for name, module in model.named_modules():
        weight = module.base() if isinstance(module, DualQLoRALinear) else _bitsandbytes(module)
        if not isinstance(weight, NF4Weight) or id(module.weight) in skipped:
            continue
        if not module.weight.is_meta:
            dense = weight.dequantize(torch.float32)
            found[f"{name}.weight".replace(".base_layer.", ".")] = 4, _spread(dense)
    return found


def _bitsandbytes(module: nn.Module) -> NF4Weight | None:
    if type(module).__name__ != "Linear4bit" or getattr(module.weight, "quant_state", None) is None:
        return None
    try:
        return NF4Weight.from_bitsandbytes(cast(Any, module.weight))
    except ValueError:  # fp4, or bytes repacked for a CPU: not compared
        return None


def _spread(values: Tensor) -> list[float]:
    # Among the first elements: an embedding that has got more rows since is the same model's.
    flat = values.detach().reshape(-1)[:65536]
    step = max(1, flat.numel() // _VALUES)
    chosen = flat[::step][:_VALUES].float().cpu()
    return [float(f"{value:.6g}") for value in chosen.tolist()]
