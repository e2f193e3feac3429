"""A LLaVA of transformers, of any family that can have the crayon, as a source.

Its own tensors are kept; a fresh crayon, which has no effect until it is trained, joins them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from collavo.configuration import CollavoConfig
from collavo.conversion.fresh import plan_crayon
from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.plan import DERIVED, Header, Plan, Tensors
from collavo.conversion.shapes import on_meta
from collavo.model.described import describe_llava
from collavo.model.families import token_id, token_ids
from collavo.model.inventory import part_of
from collavo.model.linear import CollavoLinear
from collavo.model.patch import apply_to_llava

_CLIP_NAMES = ("model.vision_tower.vision_model.", "model.vision_tower.")
_BLOCK = (64, True)  # block size and double quantisation of --quantize


def plan_llava(
    where: str,
    headers: Mapping[str, Header],
    values: Mapping[str, Any],
    options: Options,
    image_token: ImageToken | None,
) -> tuple[PretrainedConfig, Plan]:
    """Plan a CoLLaVO folder of a LLaVA's; see ``SourceKind.plan``.

    One of LLaVA-1.5's shape (CLIP tower, LLaMA decoder) becomes a CoLLaVO, every other what
    ``apply_to_llava`` makes of it.

    Args:
        where: What the tensors are of.
        headers: By their names, of any version of transformers.
        values: ``config.json``.
        options: Its ``crayon_mode`` is ``"attention"`` where None is given.
        image_token: The tokenizer's.

    Raises:
        ValueError: naming the tensors, the field of the configuration, or the option.
    """
    base = read_llava_config(where, values)
    stock = stock_on_meta(where, base)
    _check_image_token(where, stock, image_token)
    names = _modern_names(where, stock, headers)
    tied = dict(getattr(stock, "all_tied_weights_keys", None) or {})
    config, model = target_on_meta(base, stock, options)
    tensors = Tensors({n: header for n, header in headers.items() if n in names}, where)
    sources = {new: old for old, new in names.items() if old in tensors.headers}
    if isinstance(config, CollavoConfig):
        # CLIP's names of before transformers 5.17; this package's folders have the later ones.
        sources = {new.replace(*_CLIP_NAMES): old for new, old in sources.items()}
    for name, tensor in model.state_dict().items():
        if part_of(name) is not None:
            continue
        if name in sources:
            tensors.copy(name, sources[name], tuple(tensor.shape))
        elif tied.get(name) not in sources:
            tensors.take(name, tuple(tensor.shape))  # which is missing
    plan_crayon(tensors, model)
    found = [n for n, module in model.named_modules() if isinstance(module, CollavoLinear)]
    return config, tensors.plan([f"{name}.weight" for name in found])


def read_llava_config(where: str, values: Mapping[str, Any]) -> PretrainedConfig:
    """Read a LLaVA's configuration.

    Args:
        where: What it is of.
        values: ``config.json``.

    Raises:
        ValueError: if its tensors are quantised, or the installed transformers cannot read it.
    """
    given = dict(values)
    text = given.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    if (asked := given.get("quantization_config") or nested) is not None:
        kind = asked.get("quant_method") if isinstance(asked, Mapping) else asked
        raise ValueError(
            f"{where}: quantization_config: expected dense weights, got {kind!r}; take the folder "
            "as it was before it was quantised, and ask for --quantize nf4"
        )
    kind = given.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{where}: model_type {kind!r}: the installed transformers has none")
    try:
        return CONFIG_MAPPING[kind].from_dict(given)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: its config.json cannot be read ({reason})") from error


def llava_image_token(values: Mapping[str, Any]) -> int | None:
    """Return the image token's id that a LLaVA's configuration has.

    Args:
        values: ``config.json``.
    """
    return token_id(read_llava_config("config.json", values))


def stock_on_meta(where: str, base: PretrainedConfig) -> Any:
    """Return a family's own model without weights.

    Args:
        where: What it is of.
        base: Its configuration.

    Raises:
        ValueError: if transformers has none of images and text for it, or cannot make it.
    """
    if type(base) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"{where}: model_type {base.model_type!r}: not a model of images and text")
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(base)]
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(base))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: {kind.__name__} cannot be made of it ({reason})") from error


def _check_image_token(where: str, stock: Any, image_token: ImageToken | None) -> None:
    """Raise unless the tokenizer is one that the embedding has the rows for."""
    if image_token is None:
        return
    expected = token_ids(stock.model).get("image")
    if image_token.token_id != expected:
        raise ValueError(
            f"{where}: the image token: expected id {expected}, as config.json has it, got "
            f"{image_token.token_id} ({image_token.word!r}); another one was not trained"
        )
    rows = stock.get_input_embeddings().weight.shape[0]
    if image_token.vocabulary > rows:
        raise ValueError(
            f"{where}: its tokenizer has {image_token.vocabulary} ids and its embedding {rows} "
            "rows; they are not of the same model"
        )


def _modern_names(where: str, stock: Any, headers: Mapping[str, Header]) -> dict[str, str]:
    """Return the names that transformers' own mappings give a file's tensors, by the old ones."""
    steps = get_model_conversion_mapping(stock)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    known = stock.state_dict()
    unused = list(getattr(stock, "_keys_to_ignore_on_load_unexpected", None) or ())
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in headers:
        new, packed = rename_source_key(name, renamings, converters, stock.base_model_prefix, known)
        if packed is not None:
            raise ValueError(
                f"{where}: {name}: transformers packs such tensors as it loads them ({packed}); "
                "load the LLaVA with its own class, save it with save_pretrained(folder, "
                "save_original_format=False), and convert that folder"
            )
        if new not in known and any(re.search(pattern, new) for pattern in unused):
            continue
        if new in taken and not name.endswith(DERIVED):
            raise ValueError(f"{where}: {taken[new]} and {name}: both are {new}")
        found[name], taken[new] = new, name
    return found


def target_on_meta(base: Any, stock: Any, options: Options) -> tuple[PretrainedConfig, Any]:
    """Return what the target's ``config.json`` says, and its model on "meta", dense.

    Args:
        base: A LLaVA's configuration.
        stock: Its model on "meta"; is patched where the target is not a CoLLaVO.
        options: Of which ``crayon_mode`` and ``quantize`` are read.
    """
    mode = options.crayon_mode or "attention"
    if (
        base.model_type == "llava"
        and base.text_config.model_type == "llama"
        and base.vision_config.model_type == "clip_vision_model"
    ):
        values = base.to_dict()
        for name in ("model_type", "dtype", "torch_dtype", "transformers_version"):
            values.pop(name, None)
        values |= {"architectures": ["CollavoForConditionalGeneration"], "crayon_mode": mode}
        own: Any = CollavoConfig(**values)
        model = on_meta(own)
        own.quantize = options.quantize
        return own, model
    apply_to_llava(stock, crayon_mode=cast(Any, mode))
    config = describe_llava(stock, stock.crayon_settings)
    if options.quantize is not None:
        cast(dict[str, Any], config.crayon)["base"] = list(_BLOCK)
    return config, stock
