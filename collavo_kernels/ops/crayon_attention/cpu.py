"""C++ passes for the crayon and the rotation around PyTorch's fused CPU attention.

Forward: one pass adds the table rows and rotates, then attention. Backward: attention's own
backward, then one pass that undoes the rotation and sums each table row's gradient in token order.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from collavo_kernels._native import DTYPE_CODES, native, native_reason
from collavo_kernels.ops.crayon_attention.inputs import (
    AttentionInputs,
    BackwardInputs,
    ForwardResult,
    Gradients,
)
from collavo_kernels.ops.crayon_attention.pieces import Piece, covers_all, pieces
from collavo_kernels.ops.crayon_attention.reference import checked_ranges, checked_rows

_BEST_ISA = -1
_ABSENT = (0, 0, 0, 0)
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

unavailable = native_reason


def declines(inputs: AttentionInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if inputs.cos is None:
        return "rotates q and k; without cos and sin the reference serves"
    if inputs.q.dtype not in DTYPE_CODES:
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    return None


def forward(inputs: AttentionInputs) -> ForwardResult:
    """Prepare q, k and v in one pass, then attend piece by piece."""
    checked_ranges(inputs)
    found = pieces(inputs)
    query, key, value = _prepare(inputs, keys=True)
    used = inputs.v if inputs.crayon_v is None else value
    q, k, v = (_dense(x).transpose(1, 2) for x in (query, key, used))
    if covers_all(found, inputs):
        part, sums = _attend(q, k, v, 0.0, found[0].causal, scale=inputs.scale)
        return ForwardResult(part.transpose(1, 2).contiguous(), key, value, sums.contiguous())
    batch, length, heads, _ = inputs.q.shape
    out = torch.zeros_like(query)
    lse = torch.full((batch, heads, length), float("-inf"))
    for piece in found:
        keys = (piece.samples, slice(None), piece.keys)
        queries = (piece.samples, slice(None), piece.queries)
        part, sums = _attend(
            q[queries],
            k[keys],
            v[keys],
            0.0,
            piece.causal,
            attn_mask=piece.mask,
            scale=inputs.scale,
        )
        out[piece.samples, piece.queries] = part.transpose(1, 2)
        lse[queries] = sums
    return ForwardResult(out, key, value, lse)


def backward(given: BackwardInputs) -> Gradients:
    """Attention's own backward piece by piece, then the rotation's transpose and the row sums."""
    inputs = given.inputs
    checked_ranges(inputs)
    query, _, _ = _prepare(inputs, keys=False)
    found = pieces(inputs)
    if not covers_all(found, inputs):
        return _finish(given, *_backward_of_pieces(given, query, found))
    operands = (given.grad_out.contiguous(), query, inputs.k, inputs.v, given.out)
    turned = (_dense(x).transpose(1, 2) for x in operands)
    lse, causal = given.lse.contiguous(), found[0].causal
    dense = _attend_backward(*turned, lse, 0.0, causal, scale=inputs.scale)
    return _finish(given, *(x.transpose(1, 2).contiguous() for x in dense))


def _backward_of_pieces(
    given: BackwardInputs, query: Tensor, found: list[Piece]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv before the rotation's transpose, ``[B, S, heads, D]``.

    Keys that several pieces see get the pieces' gradients one after the other, in float32.
    """
    inputs = given.inputs
    operands = (given.grad_out.contiguous(), query, inputs.k, inputs.v, given.out)
    grad, q, k, v, out = (_dense(x).transpose(1, 2) for x in operands)
    overlap = any(piece.mask is not None for piece in found)
    sums = torch.float32 if overlap else inputs.k.dtype
    dq = torch.zeros_like(query)
    dk, dv = torch.zeros(inputs.k.shape, dtype=sums), torch.zeros(inputs.v.shape, dtype=sums)
    for piece in found:
        keys = (piece.samples, slice(None), piece.keys)
        queries = (piece.samples, slice(None), piece.queries)
        part_q, part_k, part_v = _attend_backward(
            grad[queries],
            q[queries],
            k[keys],
            v[keys],
            out[queries],
            given.lse[queries].contiguous(),
            0.0,
            piece.causal,
            attn_mask=piece.mask,
            scale=inputs.scale,
        )
        dq[piece.samples, piece.queries] = part_q.transpose(1, 2)
        dk[piece.samples, piece.keys] += part_k.transpose(1, 2)
        dv[piece.samples, piece.keys] += part_v.transpose(1, 2)
    return dq, dk.to(inputs.k.dtype), dv.to(inputs.v.dtype)


def _prepare(inputs: AttentionInputs, *, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prepared query and, if asked for, key and value; else empty ones in their place.

    Without ``crayon_v`` the value is empty too.
    """
    q, k, v = _dense(inputs.q), _dense(inputs.k), _dense(inputs.v)
    query = torch.empty(q.shape, dtype=q.dtype)
    key = torch.empty(k.shape if keys else 0, dtype=k.dtype)
    valued = keys and inputs.crayon_v is not None
    value = torch.empty(v.shape if valued else 0, dtype=v.dtype)
    tables = [None if t is None else t.contiguous() for t in _tables(inputs)]
    cos, sin = _angles(inputs)
    rows = _rows(inputs)
    _module().crayon_attention_prepare(
        _BEST_ISA,
        DTYPE_CODES[q.dtype],
        _shape(inputs),
        _tokens(inputs, cos, sin, rows),
        [_heads(q), _heads(k), _heads(v)],
        [_address(t) for t in tables],
        [_heads(query), _heads(key) if keys else _ABSENT, _heads(value) if valued else _ABSENT],
    )
    return query, key, value


def _finish(given: BackwardInputs, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    inputs = given.inputs
    extra = [None if x is None else x.contiguous() for x in (given.grad_key, given.grad_value)]
    cos, sin = _angles(inputs)
    rows = _rows(inputs)
    sums = [
        torch.empty(t.shape, dtype=torch.float32) if want and t is not None else None
        for t, want in zip(_tables(inputs), given.mask[3:], strict=True)
    ]
    _module().crayon_attention_finish(
        _BEST_ISA,
        DTYPE_CODES[dq.dtype],
        _shape(inputs),
        _tokens(inputs, cos, sin, rows),
        [_heads(dq), _heads(dk), _heads(dv)],
        [_ABSENT if x is None else _heads(x) for x in extra],
        [_address(x) for x in sums],
    )
    empty = torch.empty(0, dtype=dq.dtype)
    dense = [
        x if want else empty.clone() for x, want in zip((dq, dk, dv), given.mask, strict=False)
    ]
    tables = [empty.clone() if x is None else x.to(dq.dtype) for x in sums]
    return dense[0], dense[1], dense[2], tables[0], tables[1], tables[2]


def _module() -> ModuleType:
    module = native()
    if module is None:
        raise RuntimeError(f"crayon_attention: {native_reason()}")
    return module


def _tables(inputs: AttentionInputs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return inputs.crayon_q, inputs.crayon_k, inputs.crayon_v


def _rows(inputs: AttentionInputs) -> Tensor | None:
    """Return the row index, contiguous and with every entry within the tables."""
    counts = [t.shape[0] for t in _tables(inputs) if t is not None]
    if inputs.row_index is None or not counts:
        return None
    rows = inputs.row_index.contiguous()
    if _module().crayon_attention_first_bad_row(rows.data_ptr(), rows.numel(), counts[0]) >= 0:
        checked_rows(inputs)
    return rows


def _angles(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    return inputs.cos.float().contiguous(), inputs.sin.float().contiguous()


def _shape(inputs: AttentionInputs) -> tuple[int, ...]:
    batch, length, heads, size = inputs.q.shape
    rows = next((t.shape[0] for t in _tables(inputs) if t is not None), 0)
    return batch, length, heads, inputs.k.shape[2], size, rows


def _tokens(
    inputs: AttentionInputs, cos: Tensor, sin: Tensor, rows: Tensor | None
) -> tuple[int, int, int, int]:
    batch_stride = 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]
    return cos.data_ptr(), sin.data_ptr(), batch_stride, _address(rows)


def _dense(x: Tensor) -> Tensor:
    """Return x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
