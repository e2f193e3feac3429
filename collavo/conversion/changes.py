"""What can be done to any plan: other dtypes, and the decoder in 4 bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from collavo.configuration import CollavoLlavaConfig
from collavo.conversion.plan import Entry, Output, Plan
from collavo.model.files import FACTS
from collavo.model.inventory import part_of
from collavo_kernels import quantize_nf4

_NESTED_BLOCK = 256
_DTYPE_FIELDS = ("dtype", "torch_dtype")


def in_dtype(plan: Plan, dtype: torch.dtype) -> Plan:
    """Return a plan whose floating tensors are of one dtype.

    Making a tensor raises ValueError if one of its values is too large for the dtype.

    Args:
        plan: The plan.
        dtype: The dtype.
    """

    def changed(output: Output) -> Output:
        return output._replace(dtype=dtype) if output.dtype.is_floating_point else output

    entries = []
    for entry in plan.entries:
        outputs = tuple(changed(output) for output in entry.outputs)
        make = partial(_cast, entry.make, outputs)
        entries.append(Entry(outputs, entry.sources, make))
    return plan._replace(entries=tuple(entries))


def in_4_bits(
    plan: Plan, weights: Collection[str], block_size: int = 64, double_quant: bool = True
) -> Plan:
    """Return a plan that writes weights as bitsandbytes' NF4 entries.

    Args:
        plan: The plan.
        weights: Names of the weights.
        block_size: Weights per scale.
        double_quant: Whether to quantise the scales too.

    Raises:
        ValueError: naming a weight in float64, which has no 4-bit form.
    """
    entries = []
    for entry in plan.entries:
        chosen = [output.name in weights for output in entry.outputs]
        if not any(chosen):
            entries.append(entry)
            continue
        outputs: list[Output] = []
        if entry.outputs[0].dtype == torch.float64:
            raise ValueError(
                f"--quantize: {entry.outputs[0].name}: expected float16, bfloat16 or float32, got "
                "float64; give --dtype float32 too"
            )
        for output, quantized in zip(entry.outputs, chosen, strict=True):
            outputs += _entries_of(output, block_size, double_quant) if quantized else [output]
        make = partial(_quantized, entry, chosen, block_size, double_quant)
        entries.append(Entry(tuple(outputs), entry.sources, make))
    return plan._replace(entries=tuple(entries))


def say_dtypes(config: Any, plan: Plan) -> Any:
    """Write the dtype of a plan's tensors, and of adapters and crayon, into a configuration.

    Args:
        config: As ``plan`` of ``SourceKind`` gives it; one that is a dictionary is not changed.
        plan: Dense.

    Returns:
        The configuration.
    """
    name = _word(usual_dtype(plan))
    if isinstance(config, Mapping):
        return {**config, "torch_dtype": name}
    trained = [each for each in plan.outputs() if part_of(each) is not None]
    adapter_dtype = _word(usual_dtype(plan, trained.__contains__))
    if isinstance(config, CollavoLlavaConfig):
        base = cast(dict[str, Any], config.base_config)
        for part in (base, *(value for value in base.values() if isinstance(value, dict))):
            for known in _DTYPE_FIELDS:  # tower and decoder have no other one
                part.pop(known, None)
        base["dtype"] = name
        cast(dict[str, Any], config.crayon)["decoder"]["adapter_dtype"] = adapter_dtype
        return config
    for part in (config.text_config, config.vision_config):
        part.dtype = None
    config.dtype = name
    if trained:
        config.adapter_dtype = adapter_dtype
    return config


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def usual_dtype(plan: Plan, wanted: Callable[[str], bool] = lambda name: True) -> torch.dtype:
    """Return the dtype that most elements of a plan's floating tensors have.

    Args:
        plan: The plan.
        wanted: Which tensors count, by name.
    """
    counts: Counter[torch.dtype] = Counter()
    for name, output in plan.outputs().items():
        if output.dtype.is_floating_point and wanted(name):
            counts[output.dtype] += math.prod(output.shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _cast(
    make: Callable[..., Sequence[Tensor]], outputs: Sequence[Output], *sources: Tensor
) -> list[Tensor]:
    made = []
    for tensor, output in zip(make(*sources), outputs, strict=True):
        if output.dtype.is_floating_point:
            largest = _largest(tensor)
            if torch.finfo(output.dtype).max < largest < math.inf:
                name = str(output.dtype).removeprefix("torch.")
                raise ValueError(
                    f"--dtype: {output.name}: has values up to {largest:.3g}, which {name} does "
                    "not hold; take bfloat16 or float32"
                )
        made.append(tensor.to(output.dtype))
    return made


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude, NaN where there is one."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def _entries_of(output: Output, block_size: int, double_quant: bool) -> list[Output]:
    """Return what :func:`_quantized` makes of a weight, as ``NF4Weight.state_dict`` orders it."""
    name, elements = output.name, math.prod(output.shape)
    blocks = -(-elements // block_size)
    found = [
        Output(name, ((elements + 1) // 2, 1), torch.uint8),
        Output(f"{name}.absmax", (blocks,), torch.uint8 if double_quant else torch.float32),
        Output(f"{name}.quant_map", (16,), torch.float32),
    ]
    if double_quant:
        groups = -(-blocks // _NESTED_BLOCK)
        found.append(Output(f"{name}.nested_absmax", (groups,), torch.float32))
        found.append(Output(f"{name}.nested_quant_map", (256,), torch.float32))
    return [*found, Output(name + FACTS, (-1,), torch.uint8)]


def _quantized(
    entry: Entry, chosen: Sequence[bool], block_size: int, double_quant: bool, *sources: Tensor
) -> list[Tensor]:
    made: list[Tensor] = []
    for tensor, output, quantized in zip(entry.make(*sources), entry.outputs, chosen, strict=True):
        if not quantized:
            made.append(tensor)
            continue
        if not math.isfinite(_largest(tensor)):
            raise ValueError(
                f"--quantize: {output.name}: has values that are not finite; in 4 bits the rows "
                "around them would be lost too"
            )
        entries = quantize_nf4(tensor, block_size, double_quant).state_dict(output.name)
        made += [entries[each.name] for each in _entries_of(output, block_size, double_quant)]
    return made
