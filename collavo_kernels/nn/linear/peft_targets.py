"""``DualQLoRALinear`` as a layer that PEFT itself puts its adapters on."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collavo_kernels._requirements import require
from collavo_kernels.nn.linear.peft_config import CONFIG_FILE, KEEP_THE_BASE, check_branches

if TYPE_CHECKING:
    from peft import LoraConfig

OLDEST_PEFT = "0.18.1"


def peft_lora_config(
    source: LoraConfig | str | PathLike[str] | None = None, **options: Any
) -> LoraConfig:
    """Return a ``LoraConfig`` with which PEFT puts its adapters on ``DualQLoRALinear``.

    ``get_peft_model`` and ``add_adapter`` take it. PEFT does not save what it adds to the settings,
    so a folder that PEFT saved is read through it too:
    ``PeftModel.from_pretrained(model, folder, config=peft_lora_config(folder))``. PEFT's adapters
    act on all tokens; masks and rows reach the layer inside. ``merge_and_unload()`` works on dense
    weights and refuses 4-bit ones.

    Args:
        source: A ``LoraConfig``, which is copied, or a folder that PEFT saved an adapter in.
        **options: Without a source: what ``LoraConfig`` takes.

    Returns:
        The configuration; PEFT itself is not changed.

    Raises:
        ImportError: if PEFT is missing or older than 0.18.1.
        FileNotFoundError: if the folder has no ``adapter_config.json``.
        TypeError: if ``source`` is of another kind, or there are options beside it.
        ValueError: if the adapters would be more than branches ``s B A x`` (DoRA, PiSSA, ...), or
            ``target_modules`` is ``"all-linear"``, which PEFT reads as ``nn.Linear`` alone.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from collavo_kernels.nn import DualQLoRALinear
        >>> model = nn.ModuleDict({"q_proj": DualQLoRALinear(64, 32, rank=4)})
        >>> tuned = get_peft_model(model, peft_lora_config(r=2, target_modules=["q_proj"]))
        >>> [name for name, p in tuned.named_parameters() if p.requires_grad][0]
        'base_model.model.q_proj.lora_A.default.weight'
    """
    require("peft", OLDEST_PEFT, "peft_lora_config")
    from peft import LoraConfig

    from collavo_kernels.nn.linear.module import DualQLoRALinear
    from collavo_kernels.nn.linear.peft_layer import PeftDualQLoRALinear

    if source is None:
        config = LoraConfig(**options)
    elif options:
        raise TypeError(
            f"options: expected none beside source, got {', '.join(options)}; set them in a "
            "LoraConfig and give that"
        )
    elif isinstance(source, LoraConfig):
        config = copy.deepcopy(source)
    elif isinstance(source, str | PathLike):
        config = _read(Path(source), LoraConfig)
    else:
        raise TypeError(
            f"source: expected a LoraConfig or a folder of PEFT's, got {type(source).__name__}"
        )
    check_branches(config.to_dict())
    if config.target_modules == "all-linear":
        raise ValueError(
            "target_modules: expected names of layers, got 'all-linear', which PEFT reads as every "
            "nn.Linear, and a DualQLoRALinear is none; name them, e.g. ['q_proj', 'v_proj']"
        )
    config._register_custom_module({DualQLoRALinear: PeftDualQLoRALinear})
    return config


def _read(folder: Path, kind: Any) -> LoraConfig:
    # PEFT would look for a folder that is not there on the hub.
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder / CONFIG_FILE}: missing from the adapter's folder")
    config = kind.from_pretrained(str(folder))
    if not isinstance(config, kind):
        raise ValueError(
            f"{folder / CONFIG_FILE}: peft_type: expected 'LORA', got {config.peft_type!s}"
        )
    if config.init_lora_weights in KEEP_THE_BASE:
        # Its values are in the folder: how they began is over, and may need a dense weight.
        config.init_lora_weights = True
    return config
