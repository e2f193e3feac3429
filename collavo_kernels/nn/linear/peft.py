"""LoRA adapters in PEFT's folders: loaded whole or not at all, saved so that PEFT loads them."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels._validation import describe, expect_choice
from collavo_kernels.nn.linear.frozen import gathered, sharded_like
from collavo_kernels.nn.linear.peft_config import (
    CONFIG_FILE,
    AdapterConfig,
    check_config,
    read_config,
)

if TYPE_CHECKING:
    from collavo_kernels.nn.linear.module import DualQLoRALinear

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_LLAVA_EXTRAS = "non_lora_trainables.bin"
# Of torch.compile, of checkpointing, and of PEFT around a layer.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "base_layer")

_LAYOUTS = (
    ("", ""),
    ("language_model.model.", "model.language_model."),  # LLaVA in transformers before 4.52
    ("model.", "model.language_model."),  # LLaVA's original repository, and a decoder by itself
)
"""How names begin in a file and in the model: the first pair that fits all entries is taken."""


class NewAdapter(NamedTuple):
    """What a layer's adapter is to become; all of it is there before any layer changes.

    Attributes:
        a: ``[R, K]``, on the adapter's device, in its dtype, sharded as it is.
        b: ``[N, R]``, likewise.
        scaling: Of the branch.
    """

    a: Tensor
    b: Tensor
    scaling: float


def factor_keys(module_name: str) -> tuple[str, str]:
    """Return the keys under which PEFT saves a layer's A and B."""
    stem = f"{_PREFIX}{module_name}." if module_name else ""
    return f"{stem}lora_A.weight", f"{stem}lora_B.weight"


def read_layer(
    layer: DualQLoRALinear,
    slot: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    module_name: str,
) -> NewAdapter:
    """Return what a layer's adapter is to become after a saved one, and change nothing yet.

    Raises:
        ValueError: if an entry is missing, does not fit, or PEFT would compute something else with
            the adapter; it is named.
    """
    what = module_name or "adapter"
    factors = _factors(state, check_config(config), module_name, module_name, what)
    return prepare(layer, slot, factors, what)


def load_peft_adapter(model: nn.Module, folder: str | Path, slot: str) -> list[str]:
    """Load a LoRA adapter that PEFT saved into one slot of a model: whole, or nothing changes.

    Afterwards the slot holds this adapter alone: layers that it does not cover get a new A and a
    zero B. Adapters of LLaVA from transformers before 4.52 and from LLaVA's original repository
    load too. Parameters keep their identity where the rank stays; where it changes they are new
    ones, so load before an optimizer, DDP or FSDP takes hold of them. ``lora_dropout`` is not
    taken over: a layer has one dropout for all its adapters.

    Args:
        model: Its module names are those of the model that the adapter was trained on.
        folder: Holds ``adapter_model.safetensors`` and ``adapter_config.json``.
        slot: The name of the adapter to fill; it takes rank and scaling of what is loaded.

    Returns:
        The names of the layers that were filled.

    Raises:
        TypeError: if ``model`` is no module or ``folder`` no path.
        OSError: if a file is missing.
        ValueError: naming the file and the setting or entry, if one is damaged, the adapter
            belongs to other layers than the model's, or PEFT would compute something else with
            it than ``DualQLoRALinear`` does (DoRA, PiSSA, aLoRA, a field that is not known, ...).

    Example:
        >>> import tempfile, torch
        >>> from collavo_kernels.nn import DualQLoRALinear, save_peft_adapter
        >>> model = torch.nn.Sequential(DualQLoRALinear(64, 32, rank=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft_adapter(model, folder, "image")
        ...     load_peft_adapter(model, folder, "vl")
        ['0']
    """
    layers = _layers(model)
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(f"folder: expected the path of an adapter, got {type(folder).__name__}")
    slots = _with_slot(layers, slot)
    path = Path(folder)
    config = read_config(path / CONFIG_FILE)
    weights = path / _WEIGHTS
    state = _read_weights(weights)
    names = _names_in_file(state, layers, weights)
    covered = _covered(config, names, state, weights)
    new: dict[str, NewAdapter] = {}
    for name in covered:
        if name not in slots:
            raise ValueError(
                f"slot: {name} has no adapter {slot!r} and {weights} brings one for it; it has "
                f"{list(layers[name].adapter_names)}"
            )
        factors = _factors(state, config, names[name], name, str(weights))
        new[name] = prepare(layers[name], slot, factors, f"{weights}: {name}")
    size = Counter((each.a.shape[0], each.scaling) for each in new.values()).most_common(1)[0][0]
    for seed, (name, layer) in enumerate(slots.items()):
        if name not in new:
            new[name] = prepare(layer, slot, _fresh(layer, *size, seed), name)
    if (path / _LLAVA_EXTRAS).exists():
        warnings.warn(
            f"{path / _LLAVA_EXTRAS}: not read; it holds what was trained beside the adapter "
            "(LLaVA's projector), without which the model is not the one that was trained",
            stacklevel=2,
        )
    for name, adapter in new.items():
        slots[name].set_adapter(slot, *adapter)
    return covered


def prepare(
    layer: DualQLoRALinear, slot: str, factors: tuple[Tensor, Tensor, float], what: str
) -> NewAdapter:
    """Bring factors to the place and dtype of a layer's adapter, and change nothing yet.

    Raises:
        ValueError: if they do not fit the layer, or the layer cannot take them.
    """
    a, b, scaling = factors
    expect_choice("adapter", slot, layer.adapter_names)
    # The parameters themselves: a call of the layer would bring offloaded ones back for a moment.
    own = [layer._factor(factors, slot) for factors in (layer.lora_A, layer.lora_B)]
    if a.shape[1] != layer.in_features or b.shape[0] != layer.out_features:
        raise ValueError(
            f"{what}: expected lora_A [R, {layer.in_features}] and lora_B "
            f"[{layer.out_features}, R], got {list(a.shape)} and {list(b.shape)}; "
            "the adapter belongs to another model"
        )
    if slot in layer.image_adapters:
        raise ValueError(
            f"slot: {slot!r} acts on image tokens alone and an adapter of PEFT on all tokens; "
            "load it into another slot"
        )
    made = []
    for parameter, value in zip(own, (a, b), strict=True):
        if parameter.is_meta:
            raise ValueError(
                f"model: {what}: its adapter is on the meta device, where nothing can be loaded; "
                "materialise the model, or take offloading off it, first"
            )
        filled = value.to(parameter.device, parameter.dtype, copy=True).contiguous()
        if filled.shape != parameter.shape and hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"{what}: expected the sharded adapter's shape {list(parameter.shape)}, got "
                f"{list(filled.shape)}; load the adapter before the model is sharded"
            )
        made.append(sharded_like(filled, parameter))
    return NewAdapter(made[0], made[1], scaling)


def save_peft_adapter(
    model: nn.Module, folder: str | Path, slot: str, base_model: str = ""
) -> None:
    """Save one slot of every ``DualQLoRALinear`` of a model so that PEFT loads it.

    Args:
        model: The model.
        folder: Made if needed; gets ``adapter_model.safetensors`` and ``adapter_config.json``.
            A save that breaks off leaves no folder that could be taken for a whole one.
        slot: The name of the adapter to save.
        base_model: Recorded as ``base_model_name_or_path``.

    Raises:
        ValueError: if no layer of the model has such an adapter, or it acts on image tokens alone,
            which PEFT has no word for.
    """
    layers = _with_slot(_layers(model), slot)
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if slot in layer.image_adapters:
            raise ValueError(
                f"slot: {slot!r} acts on image tokens alone, and PEFT would apply it to all "
                "tokens; save_pretrained of the whole model keeps it"
            )
        entries = layer.peft_state_dict(slot, name)
        state |= {key: gathered(value).contiguous() for key, value in entries.items()}
    config = _config_of(model, layers, slot) | {"base_model_name_or_path": base_model or None}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # Sharded factors are gathered in all processes, which then write the same files.
    # Those of other nodes on a shared disk may have the same process id.
    own = secrets.token_hex(8)
    parts = {name: path / f".{name}.{own}.partial" for name in (_WEIGHTS, CONFIG_FILE)}
    try:
        save_file(state, parts[_WEIGHTS], metadata={"format": "pt"})
        parts[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for part in parts.values():
            _sync(part)
        # The old settings go first: beside new weights they would give another adapter.
        (path / CONFIG_FILE).unlink(missing_ok=True)
        for name, part in parts.items():
            os.replace(part, path / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file to the disk: after a crash a rename may be there and its content not."""
    with path.open("r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            # Some file systems cannot.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise


def _config_of(
    model: nn.Module, layers: Mapping[str, DualQLoRALinear], slot: str
) -> dict[str, Any]:
    sizes = {name: layer.adapter_size(slot) for name, layer in layers.items()}
    rank = Counter(size[0] for size in sizes.values()).most_common(1)[0][0]
    alpha = Counter(size[1] for size in sizes.values()).most_common(1)[0][0]
    # A pattern fits every name that ends as it does, unless it says where the name begins.
    anchored = {name: f"^{re.escape(name)}" for name in layers}
    targets: list[str] | str = sorted(layers)
    others = [name for name in _modules(model) if name not in layers]
    if any(other.endswith(f".{name}") for other in others for name in layers):
        targets = "|".join(re.escape(name) for name in sorted(layers))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchored[n]: size[0] for n, size in sizes.items() if size[0] != rank},
        "alpha_pattern": {anchored[n]: size[1] for n, size in sizes.items() if size[1] != alpha},
        "target_modules": targets,
        "lora_dropout": next(iter(layers.values())).dropout,
        "bias": "none",
        "inference_mode": True,
    }


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules by their names without what wraps around modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
    }


def _layers(model: nn.Module) -> dict[str, DualQLoRALinear]:
    from collavo_kernels.nn.linear.module import DualQLoRALinear

    return {n: m for n, m in _modules(model).items() if isinstance(m, DualQLoRALinear)}


def _with_slot(layers: Mapping[str, DualQLoRALinear], slot: str) -> dict[str, DualQLoRALinear]:
    found = {name: layer for name, layer in layers.items() if slot in layer.adapter_names}
    if not found:
        known = sorted({name for layer in layers.values() for name in layer.adapter_names})
        raise ValueError(
            f"slot: no layer of the model has an adapter {slot!r}; "
            + (f"there are {', '.join(known)}" if known else "the model has no adapters")
        )
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        message = f"{path}: missing from the adapter's folder"
        if path.with_name(_PICKLED).is_file():
            message += (
                f"; {_PICKLED} is a pickle, which is not read: read its tensors with torch.load "
                f"and weights_only=True, and save them as {_WEIGHTS} with safetensors' save_file"
            )
        raise FileNotFoundError(message)
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = f"not a complete safetensors file ({error})"
        raise ValueError(f"{path}: {reason}; copy it anew") from error
    if not state:
        raise ValueError(f"{path}: expected the factors of an adapter, got no entry at all")
    return state


def _names_in_file(
    state: Mapping[str, Tensor], layers: Mapping[str, DualQLoRALinear], path: Path
) -> dict[str, str]:
    """Return what the file calls each layer, by its name in the model."""
    surplus: list[str] = []
    for inside, outside in _LAYOUTS:
        names = {
            name: inside + name.removeprefix(outside) for name in layers if name.startswith(outside)
        }
        left = set(state) - {key for own in names.values() for key in factor_keys(own)}
        if not left:
            return names
        surplus = surplus or sorted(left)
    raise ValueError(
        f"{path}: {len(surplus)} entries belong to no DualQLoRALinear of the model, the first is "
        f"{surplus[0]}; train with target_modules that name the decoder's linear layers alone"
    )


def _covered(
    config: AdapterConfig, names: Mapping[str, str], state: Mapping[str, Tensor], path: Path
) -> list[str]:
    """Return the layers in the file, which have to be those that PEFT would give an adapter."""
    found = []
    for name, inside in names.items():
        present = any(key in state for key in factor_keys(inside))
        wanted = config.covers(inside) or config.covers(name)
        if present and not wanted:
            raise ValueError(
                f"{config.source}: target_modules: {name} is not among them and {path.name} has "
                "entries for it, which PEFT would not use; the files are not of one adapter"
            )
        if wanted and not present:
            raise ValueError(
                f"{path}: target_modules of {CONFIG_FILE} covers {name} and there is no entry for "
                "it; the file is not whole, or the adapter belongs to another model"
            )
        if present:
            found.append(name)
    return sorted(found)


def _factors(
    state: Mapping[str, Tensor], config: AdapterConfig, inside: str, name: str, source: str
) -> tuple[Tensor, Tensor, float]:
    for key in factor_keys(inside):
        if key not in state:
            raise ValueError(f"{source}: {key}: missing from the adapter; copy it anew")
        if not state[key].is_floating_point():
            raise ValueError(
                f"{source}: {key}: expected floating values, got {describe(state[key])}; "
                "copy it anew"
            )
    a, b = (state[key] for key in factor_keys(inside))
    rank, scaling = config.size((inside, name))
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{source}: {name or 'the layer'}: expected rank {rank} as r and rank_pattern of "
            f"{CONFIG_FILE} say, got lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        )
    return a, b, scaling


def _fresh(
    layer: DualQLoRALinear, rank: int, scaling: float, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Return an adapter without effect, the same in every process: A drawn, B zero."""
    bound = 1 / max(layer.in_features, 1) ** 0.5
    # Whatever torch's default device and dtype are: the generator is the CPU's.
    kind: Any = {"device": "cpu", "dtype": torch.float32}
    generator = torch.Generator("cpu").manual_seed(seed)
    a = torch.empty(rank, layer.in_features, **kind).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(layer.out_features, rank, **kind), scaling
