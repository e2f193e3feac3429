"""The Triton backend: NF4 tiles are decoded in registers, adapters and epilogue share the sum.

``forward`` has one kernel: a tile of the output runs over K with decoded weight tiles, then over
the joined ranks of all adapters, then adds table and bias. ``backward`` has one for dx, of the same
form with the weight's columns; the small gradients are PyTorch products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from collavo_kernels._backends import device_of
from collavo_kernels._flags import error_word
from collavo_kernels.ops.qlora_linear import reference
from collavo_kernels.ops.qlora_linear.inputs import (
    GradientMask,
    QLoRAGradients,
    QLoRAInputs,
    active,
)
from collavo_kernels.ops.qlora_linear.nf4 import block_count, nf4_code, split_scales

# Tiles of 16 or 64 tokens: with eight warps no supported Triton spills registers on any target
# (four spill in both, and tiles of 32 with either).
WARPS = 8


@triton.jit
def _scale(absmax, nested_absmax, nested_code, offset, block, live, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(absmax + block, mask=live, other=0).to(tl.int32)
        inner = tl.load(nested_code + code)
        outer = tl.load(nested_absmax + block // 256, mask=live, other=0.0)
        scale = inner * outer + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=live, other=0.0)
    return scale


@triton.jit
def _decode(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    rows,  # [BLOCK_N] int64
    start,
    n,
    k,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a float32 tile of the weight, [BLOCK_N, BLOCK_K]; outside the matrix it is 0."""
    pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
    live = (rows < n)[:, None] & (pairs < k // 2)[None, :]
    # 0x77 is a pair of zeros.
    bytes_ = tl.load(packed + rows[:, None] * (k // 2) + pairs[None, :], mask=live, other=0x77)
    index = bytes_.to(tl.int32)
    values = tl.interleave(tl.load(code + (index >> 4)), tl.load(code + (index & 15)))
    if ALIGNED:
        # A tile's row lies in one block.
        block = (rows * k + start) // BLOCK_SIZE
        scale = _scale(absmax, nested_absmax, nested_code, offset, block, rows < n, NESTED)
        weight = values * scale[:, None]
    else:
        columns = start + tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        blocks = (rows[:, None] * k + columns[None, :]) // BLOCK_SIZE
        scales = _scale(absmax, nested_absmax, nested_code, offset, blocks, inside, NESTED)
        weight = values * scales
    return weight


@triton.jit
def _forward_kernel(
    x,  # [M, K]
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    hidden,  # [M, R]: gated and scaled A x of all adapters side by side
    joined_b,  # [N, R]
    table,  # [T, N]
    row_index,  # [M]
    bias,  # [N]
    errors,  # [1] int32
    out,  # [M, N]
    m,
    n,
    k,
    ranks,
    table_rows,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute one tile of the output."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_tokens = (token < m)[:, None]
    live_rows = (row < n)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = live_tokens & (column < k)[None, :]
        tile = tl.load(x + token[:, None] * k + column[None, :], mask=inside, other=0.0)
        weight = _decode(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            code,
            row,
            start,
            n,
            k,
            BLOCK_SIZE,
            NESTED,
            ALIGNED,
            BLOCK_K,
        )
        sums = tl.dot(tile, tl.trans(weight.to(tile.dtype)), sums, input_precision="ieee")
    for start in range(0, ranks, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        known = (rank < ranks)[None, :]
        left = tl.load(
            hidden + token[:, None] * ranks + rank[None, :], mask=live_tokens & known, other=0.0
        )
        right = tl.load(
            joined_b + row[:, None] * ranks + rank[None, :],
            mask=(row < n)[:, None] & known,
            other=0.0,
        )
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    if HAS_TABLE:
        index = tl.load(row_index + token, mask=token < m, other=-1)
        good = (index >= 0) & (index < table_rows)
        bad = (index < -1) | (index >= table_rows)
        tl.atomic_or(errors + tl.zeros_like(index), bad.to(tl.int32), mask=bad)
        where = tl.where(good, index, 0).to(tl.int64)
        mask = good[:, None] & live_rows
        sums += tl.load(table + where[:, None] * n + row[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * n + row[None, :],
        sums.to(out.dtype.element_ty),
        mask=live_tokens & live_rows,
    )


@triton.jit
def _grad_x_kernel(
    grad,  # [M, N]
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    upstream,  # [M, R]: gated and scaled g B of all adapters side by side
    joined_a,  # [R, K]
    out,  # [M, K]
    m,
    n,
    k,
    ranks,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute one tile of the gradient of x."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    column = first + tl.arange(0, BLOCK_K)
    live_tokens = (token < m)[:, None]
    live_columns = (column < k)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = live_tokens & (row < n)[None, :]
        tile = tl.load(grad + token[:, None] * n + row[None, :], mask=inside, other=0.0)
        weight = _decode(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            offset,
            code,
            row,
            first,
            n,
            k,
            BLOCK_SIZE,
            NESTED,
            ALIGNED,
            BLOCK_K,
        )
        sums = tl.dot(tile, weight.to(tile.dtype), sums, input_precision="ieee")
    for start in range(0, ranks, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        known = rank < ranks
        left = tl.load(
            upstream + token[:, None] * ranks + rank[None, :],
            mask=live_tokens & known[None, :],
            other=0.0,
        )
        right = tl.load(
            joined_a + rank[:, None].to(tl.int64) * k + column[None, :],
            mask=known[:, None] & live_columns,
            other=0.0,
        )
        sums = tl.dot(left, right, sums, input_precision="ieee")
    tl.store(
        out + token[:, None] * k + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=live_tokens & live_columns,
    )


def forward(inputs: QLoRAInputs) -> Tensor:
    """Return ``[M, N]`` in x's dtype; nothing waits for the device."""
    x, n = inputs.x.contiguous(), inputs.out_features
    m, k = x.shape
    out = x.new_empty((m, n))
    branches = [_gate(inputs, i, F.linear(x, a.to(x.dtype))) for i, a in enumerate(inputs.a)]
    hidden = torch.cat(branches, dim=1) if branches else x
    joined_b = torch.cat([b.to(x.dtype) for b in inputs.b], dim=1) if branches else x
    table, index, bias = inputs.row_table, inputs.row_index, inputs.bias
    block_m = _token_block(m)
    with device_of(out):
        _forward_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, 64))](
            x,
            *_weight(inputs),
            hidden,
            joined_b,
            x if table is None else table.contiguous(),
            x if index is None else index.contiguous(),
            x if bias is None else bias.contiguous(),
            error_word(x.device),
            out,
            m,
            n,
            k,
            hidden.shape[1] if branches else 0,
            0 if table is None else table.shape[0],
            **_options(inputs),
            HAS_TABLE=table is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            num_warps=WARPS,
        )
    return out


def backward(inputs: QLoRAInputs, grad: Tensor, mask: GradientMask) -> QLoRAGradients:
    """Return the gradients that ``mask`` asks for; ``grad`` is ``[M, N]`` in x's dtype."""
    rest = GradientMask(False, False, mask.row_table, mask.bias, mask.a, mask.b)
    found = reference.backward(inputs, grad, rest)
    grad_x = _grad_x(inputs, grad.contiguous()) if mask.x else None
    return QLoRAGradients(grad_x, None, found.row_table, found.bias, found.a, found.b)


def _grad_x(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    n, k = inputs.shape
    m, dtype = grad.shape[0], grad.dtype
    branches = [_gate(inputs, i, grad @ b.to(dtype)) for i, b in enumerate(inputs.b)]
    upstream = torch.cat(branches, dim=1) if branches else grad
    joined_a = torch.cat([a.to(dtype) for a in inputs.a]) if branches else grad
    out = grad.new_empty((m, k))
    block_m = _token_block(m)
    with device_of(out):
        _grad_x_kernel[(triton.cdiv(m, block_m), triton.cdiv(k, 64))](
            grad,
            *_weight(inputs),
            upstream,
            joined_a,
            out,
            m,
            n,
            k,
            upstream.shape[1] if branches else 0,
            **_options(inputs),
            BLOCK_M=block_m,
            num_warps=WARPS,
        )
    return out


def _gate(inputs: QLoRAInputs, adapter: int, hidden: Tensor) -> Tensor:
    hidden = hidden * inputs.scaling[adapter]
    gate = active(inputs, adapter, torch.uint8)
    return hidden if gate is None else hidden.masked_fill(gate == 0, 0.0)


def _token_block(tokens: int) -> int:
    return 16 if tokens <= 16 else 64


def _options(inputs: QLoRAInputs) -> dict[str, int | bool]:
    aligned = inputs.x.shape[1] % 64 == 0 and inputs.block_size >= 64
    facts = {"BLOCK_SIZE": inputs.block_size, "NESTED": inputs.double_quant, "ALIGNED": aligned}
    return facts | {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16}


def _weight(inputs: QLoRAInputs) -> tuple[Tensor, ...]:
    if inputs.scales is None:
        raise RuntimeError("qlora_linear: the Triton backend has no dense weight")
    blocks = block_count(inputs.shape, inputs.block_size)
    parts = split_scales(inputs.scales, blocks, inputs.double_quant)
    nested = [parts.absmax if each is None else each for each in parts[1:]]
    offset, nested_absmax, nested_code = nested
    code = nf4_code(inputs.weight)
    return inputs.weight, parts.absmax, nested_absmax, nested_code, offset, code
