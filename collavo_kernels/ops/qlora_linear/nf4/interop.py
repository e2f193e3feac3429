"""NF4 weights in bitsandbytes' containers and state-dict keys, lossless both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collavo_kernels._requirements import require
from collavo_kernels._validation import describe
from collavo_kernels.ops.qlora_linear.nf4.format import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    NF4_CODE,
    ScaleParts,
    block_count,
    join_scales,
    packed_bytes,
)
from collavo_kernels.ops.qlora_linear.nf4.weight import NF4Weight

FACTS_KEY = "quant_state.bitsandbytes__nf4"
SCALE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", FACTS_KEY)
_NESTED_KEYS = ("nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_state_dict(weight: NF4Weight, prefix: str) -> dict[str, Tensor]:
    """Return bitsandbytes' entries: codes at ``prefix``, the rest at ``prefix.<key>``."""
    weight = weight.to_rows()
    parts = weight.parts
    entries = {"absmax": parts.absmax.clone(), "quant_map": _code(weight.device)}
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if parts.nested_absmax is not None and parts.nested_code is not None:
        entries["nested_absmax"] = parts.nested_absmax.clone()
        entries["nested_quant_map"] = parts.nested_code.clone()
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        # A weight on "meta" has shapes only; its entries have no values either.
        offset = parts.offset
        facts["nested_offset"] = 0.0 if offset is None or offset.is_meta else float(offset)
    text = json.dumps(facts).encode()
    entries[FACTS_KEY] = torch.tensor(list(text), dtype=torch.uint8, device=weight.device)
    return {prefix: weight.packed} | {f"{prefix}.{key}": v for key, v in entries.items()}


def from_state_dict(state: Mapping[str, Tensor], prefix: str) -> NF4Weight:
    """Read one weight from bitsandbytes' entries; see ``NF4Weight.from_state_dict``."""
    facts = _facts(_entry(state, prefix, FACTS_KEY), f"{prefix}.{FACTS_KEY}")
    double_quant = "nested_offset" in facts
    _expect_code(_entry(state, prefix, "quant_map"), f"{prefix}.quant_map")
    parts = ScaleParts(_entry(state, prefix, "absmax"))
    if double_quant:
        nested = [_entry(state, prefix, key).reshape(-1) for key in _NESTED_KEYS]
        offset = torch.tensor([facts["nested_offset"]], dtype=torch.float32)
        parts = ScaleParts(parts.absmax, offset.to(nested[0].device), nested[0], nested[1])
    shape, dtype = tuple(facts["shape"]), _DTYPES[facts["dtype"]]
    packed = _entry(state, prefix, "")
    return _checked(packed, parts, shape, facts["blocksize"], dtype, prefix)


def from_bitsandbytes(weight: Tensor, quant_state: Any) -> NF4Weight:
    """Take over a bitsandbytes tensor; see ``NF4Weight.from_bitsandbytes``."""
    if quant_state is None:
        quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        raise ValueError(
            f"weight: expected 4-bit codes with a quant_state, got {describe(weight)} without: it "
            "is not quantised yet; move the bitsandbytes layer to a device first"
        )
    if quant_state.quant_type != "nf4":
        raise ValueError(
            f"weight: expected quant_type 'nf4', got {quant_state.quant_type!r}, which is other "
            "values for the same codes; load with BitsAndBytesConfig(bnb_4bit_quant_type='nf4')"
        )
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "weight: expected bitsandbytes' original bytes, got those it repacked for its CPU "
            "kernel, with scales rounded to bfloat16 (its state_dict() cannot give the old ones "
            "back); convert the layer before its first forward in eval mode, or load it again"
        )
    _expect_code(quant_state.code, "quant_state.code")
    parts = ScaleParts(quant_state.absmax)
    nested = quant_state.state2
    if nested is not None:
        if nested.blocksize != NESTED_BLOCK:
            raise ValueError(f"nested_blocksize: expected {NESTED_BLOCK}, got {nested.blocksize}")
        offset = quant_state.offset.float().reshape(1)
        parts = ScaleParts(parts.absmax, offset, nested.absmax, nested.code)
    shape = tuple(int(size) for size in quant_state.shape)
    if len(shape) != 2:
        raise ValueError(f"weight: expected a matrix, got quant_state.shape {list(shape)}")
    packed = weight.detach().as_subclass(Tensor)
    return _checked(packed, parts, shape, quant_state.blocksize, quant_state.dtype, "weight")


def to_bitsandbytes(weight: NF4Weight) -> Any:
    """Return a ``Params4bit``; see ``NF4Weight.to_bitsandbytes``."""
    require("bitsandbytes", "0.43", "to_bitsandbytes")
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    weight = weight.to_rows()
    parts = weight.parts
    nested = None
    if parts.nested_absmax is not None and parts.nested_code is not None:
        nested = QuantState(
            absmax=parts.nested_absmax.clone(),
            blocksize=NESTED_BLOCK,
            code=parts.nested_code.clone(),
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=parts.absmax.clone(),
        shape=torch.Size(weight.shape),
        code=_code(weight.device),
        blocksize=weight.block_size,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=None if parts.offset is None else parts.offset.reshape(()).clone(),
        state2=nested,
    )
    return Params4bit(
        weight.packed.detach().clone().view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=weight.block_size,
        compress_statistics=weight.double_quant,
        quant_type="nf4",
        bnb_quantized=True,
    )


def _code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def _entry(state: Mapping[str, Tensor], prefix: str, key: str) -> Tensor:
    name = f"{prefix}.{key}" if key else prefix
    if name not in state:
        raise ValueError(
            f"{name}: missing from the state dict; an NF4 weight needs all of bitsandbytes' "
            f"entries ({', '.join(SCALE_KEYS)}), so save it again with codes and scales"
        )
    return state[name].detach()


def _facts(entry: Tensor, name: str) -> dict[str, Any]:
    if entry.is_meta:
        raise ValueError(f"{name}: expected JSON in bytes, got {describe(entry)}, which has none")
    try:
        facts: dict[str, Any] = json.loads(bytes(entry.to(torch.uint8).cpu().tolist()))
        missing = {"quant_type", "blocksize", "dtype", "shape"} - set(facts)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected JSON in bytes, got something else ({error})") from error
    if missing:
        raise ValueError(f"{name}: lacks {', '.join(sorted(missing))}")
    dtypes, sizes = tuple(_DTYPES), ", ".join(map(str, BLOCK_SIZES))
    shape, offset = facts["shape"], facts.get("nested_offset", 0.0)
    nested = facts.get("nested_blocksize", NESTED_BLOCK)
    for key, value, fits, wanted in (
        ("quant_type", facts["quant_type"], facts["quant_type"] == "nf4", "nf4"),
        ("dtype", facts["dtype"], facts["dtype"] in dtypes, f"one of {', '.join(dtypes)}"),
        ("shape", shape, _is_matrix(shape), "two sizes [N, K]"),
        ("blocksize", facts["blocksize"], facts["blocksize"] in BLOCK_SIZES, f"one of {sizes}"),
        ("nested_blocksize", nested, nested == NESTED_BLOCK, str(NESTED_BLOCK)),
        ("nested_offset", offset, isinstance(offset, float | int), "a number"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {key} {wanted}, got {json.dumps(value)}")
    return facts


def _is_matrix(shape: object) -> bool:
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else [None]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _expect_code(code: Tensor, name: str) -> None:
    if code.numel() != len(NF4_CODE) or not torch.equal(
        code.cpu().float(), _code(torch.device("cpu"))
    ):
        raise ValueError(f"{name}: expected the 16 values of NF4, got {code.flatten().tolist()}")


def _checked(
    packed: Tensor,
    parts: ScaleParts,
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
    name: str,
) -> NF4Weight:
    rows, columns = shape
    blocks = block_count((rows, columns), block_size)
    double_quant = parts.nested_absmax is not None
    expected_bytes = packed_bytes((rows, columns))
    if packed.numel() * packed.element_size() != expected_bytes:
        raise ValueError(
            f"{name}: expected {expected_bytes} bytes (uint8) for an NF4 matrix {list(shape)}, "
            f"got {describe(packed)}; it is truncated or belongs to another weight"
        )
    if packed.dtype == torch.bool or packed.is_complex():  # a cast to bool is not undone
        raise ValueError(
            f"{name}: expected the bytes of 4-bit codes as uint8, or seen as another dtype of "
            f"numbers, got {describe(packed)}; load the weight from the file that it was saved to"
        )
    # bnb_4bit_quant_storage: FSDP wants one dtype for all, so recipes see the bytes as bfloat16.
    packed = packed.contiguous().view(-1).view(torch.uint8)
    wanted = [("absmax", parts.absmax, torch.uint8 if double_quant else torch.float32, blocks)]
    if parts.nested_absmax is not None and parts.nested_code is not None:
        nested_blocks = -(-blocks // NESTED_BLOCK)
        wanted.append(("nested_absmax", parts.nested_absmax, torch.float32, nested_blocks))
        wanted.append(("nested_quant_map", parts.nested_code, torch.float32, 256))
    for key, value, expected, count in wanted:
        if value.dtype != expected or value.numel() != count:
            raise ValueError(
                f"{name}.{key}: expected {count} values of "
                f"{str(expected).removeprefix('torch.')} for {list(shape)} in blocks "
                f"of {block_size}, got {describe(value)}"
            )
    flat = parts._replace(absmax=parts.absmax.reshape(-1))
    return NF4Weight(
        packed.reshape(-1, 1), join_scales(flat), (rows, columns), block_size, double_quant, dtype
    )
