"""What a model needs compared with what a checkpoint holds, before a weight is made."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import collavo._requirements  # noqa: F401  (before what it checks)

from torch import Tensor, nn

from collavo._relatives import WAY_OF_LLAVA, WAY_OF_OFFICIAL
from collavo.model.files import FACTS, PARTS, StoredTensor
from collavo.model.layer import BRANCHES
from collavo.model.linear import CollavoLinear

_ANY_FACTS = ".quant_state.bitsandbytes__"
_SCALING = ".lora_scaling."
_FLOATING = ("F64", "F32", "BF16", "F16")
_OFFICIAL = ("Plora_", "tok_embeddings")
_LLAVA = ("language_model.model.", "vision_tower.vision_model.", "vision_model.")


class FourBit(NamedTuple):
    """The weights of a checkpoint that are in 4 bits.

    Attributes:
        kept: Those of the decoder's layers, which keep them so.
        dense: Those of bitsandbytes' layers elsewhere, where the model's are dense.
    """

    kept: list[str]
    dense: list[str]


def check_tensors(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    *,
    where: str,
    fresh: Collection[str] = (),
    any_shape: bool = False,
) -> FourBit:
    """Raise unless a checkpoint holds every tensor of a model, in its shape and kind, and no other.

    Args:
        model: The model, e.g. on "meta".
        stored: The checkpoint's tensors by the model's names; 4-bit weights as bitsandbytes has
            them.
        where: What to call the checkpoint in messages.
        fresh: Names that may be absent: they will be drawn.
        any_shape: Whether shapes may differ, as ``ignore_mismatched_sizes`` allows.

    Returns:
        Which weights are in 4 bits.

    Raises:
        ValueError: naming the tensors, or the setting.
    """
    left, found = dict(stored), FourBit([], [])
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, CollavoLinear):
            _take_scalings(name, module, left, where)
            if _take_4bit(weight, module, left, where):
                found.kept.append(weight)
        elif isinstance(module, nn.Linear) and _take_foreign(weight, left, where):
            found.dense.append(weight)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.removesuffix("_scales") not in (*found.kept, *found.dense) and _SCALING not in name
    }
    missing = [n for n in expected if n not in left and n not in fresh and tied.get(n) not in left]
    surplus = [name for name in left if name not in expected]
    both = [name for name in expected if name in left]
    misshapen = [
        f"{name} (expected {list(expected[name])}, got {list(left[name].shape)})"
        for name in both
        if left[name].shape != expected[name] and not any_shape
    ]
    unreadable = [
        f"{name} ({left[name].dtype})" for name in both if left[name].dtype not in _FLOATING
    ]
    expect_none(where, "tensors have no place in the model", surplus)
    expect_none(where, "tensors are missing", missing)
    expect_none(where, "tensors have another shape than the model's", misshapen)
    expect_none(where, f"tensors are of another dtype than {', '.join(_FLOATING)}", unreadable)
    return found


def expect_none(where: str, what: str, names: Iterable[str]) -> None:
    """Raise if there are such tensors, and say what the checkpoint is where its names tell.

    Args:
        where: What to call the checkpoint.
        what: What is wrong with them.
        names: Their names.

    Raises:
        ValueError: naming the first of them.
    """
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise ValueError(f"{where}: {what}: {', '.join(listed[:5])}{more}; {_way(listed)}")


def part_of(name: str) -> str | None:
    """Return the adapter that a tensor belongs to, or the part of the crayon, or None.

    Args:
        name: The tensor's name.
    """
    words = name.split(".")
    for factor in ("lora_A", "lora_B"):
        if factor in words:
            return f"adapter {words[words.index(factor) + 1]}"
    if "crayon_prompt" in words:
        return "crayon prompt"
    return "crayon branches" if set(words) & set(BRANCHES) else None


def _take_scalings(
    name: str, module: CollavoLinear, left: dict[str, StoredTensor], where: str
) -> None:
    """Take the adapters' scalings out of ``left``; they have to be the configuration's."""
    for adapter, scaling in module.scaling.items():
        entry = left.pop(f"{name}{_SCALING}{adapter}", None)
        # What is recorded is an alpha, and dividing it by the rank rounds.
        if entry is not None and not math.isclose(float(entry.read()), scaling, rel_tol=1e-12):
            raise ValueError(
                f"{where}: {name}: its adapter {adapter!r} was saved with scaling "
                f"{float(entry.read())} and the configuration has {scaling} (lora_alpha / "
                "lora_rank); the weights and config.json are not of the same model"
            )


def _take_4bit(
    weight: str, module: CollavoLinear, left: dict[str, StoredTensor], where: str
) -> bool:
    """Take the entries of a layer's 4-bit weight out of ``left``; tell whether it is in 4 bits."""
    kinds = _facts_of(weight, left, where)
    if not kinds and f"{weight}.absmax" in left:
        expect_none(where, "tensors are missing", [weight + FACTS])
    if bool(kinds) != module.quantized and weight in left:
        here, asked = ("in 4 bits", "None") if kinds else ("dense", "'nf4'")
        raise ValueError(
            f"{where}: {weight}: is {here} and the configuration asks for quantize={asked}; load "
            "it as it was saved, and bring a dense model to 4 bits with "
            "add_dual_qlora(adapters=(), quantize=True)"
        )
    if not kinds:
        return False
    stored = _json(left[kinds[0]].read(), f"{where}: {kinds[0]}")
    double_quant = "nested_offset" in stored
    wanted = {
        "blocksize": (stored.get("blocksize"), module.block_size),
        "shape": (stored.get("shape"), [module.out_features, module.in_features]),
        "double_quant": (double_quant, module.double_quant),
    }
    for name, (there, setting) in wanted.items():
        if there != setting:
            raise ValueError(
                f"{where}: {weight}: has {name} {there} and the configuration asks for {setting}; "
                "the weights and config.json are not of the same model"
            )
    _take_entries(weight, left, where, double_quant)
    return True


def _take_foreign(weight: str, left: dict[str, StoredTensor], where: str) -> bool:
    """Take the entries of another layer's 4-bit weight out of ``left``, if it is in 4 bits."""
    kinds = _facts_of(weight, left, where)
    if kinds:
        facts = _json(left[kinds[0]].read(), f"{where}: {kinds[0]}")
        _take_entries(weight, left, where, "nested_offset" in facts)
    return bool(kinds)


def _facts_of(weight: str, left: Collection[str], where: str) -> list[str]:
    """Return the entry that says how a weight is quantised, or none; it has to say NF4."""
    kinds = [name for name in left if name.startswith(weight + _ANY_FACTS)]
    if other := [name for name in kinds if name != weight + FACTS]:
        raise ValueError(
            f"{where}: {weight}: expected bitsandbytes' format 'nf4', got "
            f"{other[0].removeprefix(weight + _ANY_FACTS)!r}; quantise the dense model again, with "
            "bnb_4bit_quant_type='nf4' or add_dual_qlora(adapters=(), quantize=True)"
        )
    return kinds


def _take_entries(
    weight: str, left: dict[str, StoredTensor], where: str, double_quant: bool
) -> None:
    entries = [weight, *(weight + part for part in PARTS if double_quant or "nested" not in part)]
    expect_none(where, "tensors are missing", [name for name in entries if name not in left])
    for name in entries:
        del left[name]


def _json(entry: Tensor, name: str) -> dict[str, object]:
    try:
        found = json.loads(bytes(entry.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected JSON in bytes, got something else ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(found).__name__}")
    return found


def _way(names: list[str]) -> str:
    if any(word in name for name in names for word in _OFFICIAL):
        return WAY_OF_OFFICIAL
    if any(name.startswith(_LLAVA) for name in names):
        return WAY_OF_LLAVA
    if all(part_of(name) for name in names):
        return (
            "if they are to be new, take them out of config.json and ask for them: "
            "from_pretrained(folder, adapters=('image', 'vl'), crayon_mode='attention')"
        )
    return "the weights and config.json are not of the same model"
