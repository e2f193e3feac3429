"""The Triton backend for NVIDIA and AMD.

A forward is two launches: hidden values and x's two halves, then the product with decoded weights,
adapters and epilogue. Where output tiles are fewer than the GPU has room for, as when decoding, the
columns are shared out between programs, and a third launch adds their sums in fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from collavo_kernels._backends import device_of, triton_reason
from collavo_kernels._derivative import Nothing
from collavo_kernels._flags import error_word
from collavo_kernels._rows_triton import sum_rows
from collavo_kernels._triton import constants
from collavo_kernels.ops.qlora_linear import cpu
from collavo_kernels.ops.qlora_linear.inputs import (
    PANELS_DECLINE,
    Gradients,
    QLoRAInputs,
    QLoRAOutputGrads,
    QLoRAResult,
    Wanted,
    scaled,
)
from collavo_kernels.ops.qlora_linear.triton import tiles
from collavo_kernels.ops.qlora_linear.triton.backward import (
    factor_kernel,
    grad_x_kernel,
)
from collavo_kernels.ops.qlora_linear.triton.forward import Epilogue, linear_kernel, sum_kernel
from collavo_kernels.ops.qlora_linear.triton.hidden import prepare_kernel

_MOST_SHARES, _MOST_HIDDEN_SHARES = 16, 8
# Constants of kernels whose tiles do not depend on the call, and options of their launches.
LINEAR = {"BLOCK_R": 16, "GROUP": 8}
SUM = {"BLOCK_M": 16, "BLOCK_N": 32}
SUM_OPTIONS = {"num_warps": 4, "num_stages": 2}
PREPARE = {"BLOCK_P": 128}
PREPARE_OPTIONS = {"num_warps": 4, "num_stages": 3}
FACTOR = {"BLOCK_M": 32, "BLOCK_R": 64, "BLOCK_C": 64}
FACTOR_OPTIONS = {"num_warps": 4, "num_stages": 3}


def sum_ranks(dtype: torch.dtype) -> dict[str, int]:
    """Return how many ranks the sum of shares takes at once: many, as each step waits for loads."""
    return {"BLOCK_R": 16 if dtype == torch.float32 else 64}


class Hidden(NamedTuple):
    """``m s A x`` of all adapters side by side.

    Attributes:
        values: ``[splits, M, R]``: x's dtype, or float32 where there is more than one split.
        splits: Shares of the sum, which readers add in order.
    """

    values: Tensor
    splits: int


unavailable = triton_reason


def declines(inputs: QLoRAInputs) -> str | None:
    """Say why these inputs are not taken, or None."""
    if (reason := cpu.declines(inputs)) is not None:
        return reason
    if inputs.in_panels:
        return PANELS_DECLINE
    k = inputs.shape[1]
    return f"K = {k} is odd: rows start in the middle of a byte" if k % 2 else None


def forward(inputs: QLoRAInputs) -> QLoRAResult:
    """Return ``[M, N]`` in x's dtype; nothing waits for the device."""
    x, n = inputs.x.contiguous(), inputs.out_features
    m, half = x.shape[0], x.shape[1] // 2
    out = x.new_empty((m, n))
    halves = x.new_empty((2, m, half))
    chosen = tiles.tiles_for(inputs)
    grid = tiles.grid_of(chosen, m, n)
    wanted = tiles.processors(x.device) * chosen.resident // grid
    most = _MOST_SHARES if tiles.may_split(chosen) else 1
    steps = triton.cdiv(half, chosen.chunks * tiles.CHUNK_BYTES)
    shares, steps = tiles.shares_of(steps, min(most, wanted))
    split = shares > 1 or tiles.must_split(chosen)
    target = x.new_empty((shares, m, n), dtype=torch.float32) if split else out
    with device_of(out):
        epilogue, present = _epilogue(inputs, x, _hidden(inputs, x, inputs.a, halves))
        known = tiles.facts_of(inputs) | chosen.blocks
        linear_kernel[(grid, shares)](
            halves,
            tiles.weight_of(inputs),
            epilogue,
            target,
            m,
            n,
            tiles.units_of(inputs),
            steps,
            constants(**known, **present, **LINEAR, SPLIT=split),
            **chosen.options,
        )
        if split:
            sum_kernel[(triton.cdiv(m, SUM["BLOCK_M"]), triton.cdiv(n, SUM["BLOCK_N"]))](
                target,
                epilogue,
                out,
                m,
                n,
                constants(**present, **SUM, **sum_ranks(x.dtype), SPLITS=shares),
                **SUM_OPTIONS,
            )
    return QLoRAResult(out)


def backward(
    inputs: QLoRAInputs, saved: Nothing, grads: QLoRAOutputGrads, wanted: Wanted
) -> Gradients:
    """Return the gradients that are wanted."""
    grad, x = grads.out.contiguous(), inputs.x.contiguous()
    grad_x, grad_table, grad_bias = None, None, None
    grads_a: list[Tensor | None] = [None] * len(inputs.a)
    grads_b: list[Tensor | None] = [None] * len(inputs.b)
    with device_of(grad):
        if wanted.x or any(wanted.a):
            upstream = _hidden(inputs, grad, [b.t() for b in inputs.b])
            if wanted.x:
                grad_x = _grad_x(inputs, grad, upstream)
            for i in (i for i, want in enumerate(wanted.a) if want):
                out = torch.empty_like(inputs.a[i], memory_format=torch.contiguous_format)
                grads_a[i] = out
                _grad_factor(inputs, upstream, x, i, out)
        if any(wanted.b):
            hidden = _hidden(inputs, x, inputs.a)
            for i in (i for i, want in enumerate(wanted.b) if want):
                out = torch.empty_like(inputs.b[i], memory_format=torch.contiguous_format)
                grads_b[i] = out
                _grad_factor(inputs, hidden, grad, i, out.t())
        if wanted.row_table:
            grad_table = _grad_row_table(inputs, grad)
        if wanted.bias and inputs.bias is not None:
            grad_bias = torch.sum(grad, 0, dtype=torch.float32).to(inputs.bias.dtype)
    return Gradients(
        x=grad_x, weight=None, a=grads_a, b=grads_b, row_table=grad_table, bias=grad_bias
    )


def _hidden(
    inputs: QLoRAInputs, x: Tensor, factors: Sequence[Tensor], halves: Tensor | None = None
) -> Hidden:
    """Multiply x by every factor ``[R, K]`` of any strides; take x apart into ``halves``."""
    (m, k), mask = x.shape, inputs.adapter_mask
    joined = None
    if len(factors) > tiles.READ_IN_PLACE:
        products = [F.linear(x, each.to(x.dtype)) for each in factors]
        gated = [scaled(inputs, i, each) for i, each in enumerate(products)]
        joined, factors = torch.cat(gated, dim=1), ()
    tokens, ranks, columns = tiles.hidden_tiles(m, x.dtype)
    counts = [each.shape[0] for each in factors]
    rank_tiles = sum(triton.cdiv(count, ranks) for count in counts)
    wanted = tiles.processors(x.device) // max(1, rank_tiles * triton.cdiv(m, tokens))
    # The backward has many tokens, and readers that should not add shares.
    most = 1 if halves is None else _MOST_HIDDEN_SHARES
    splits, steps = tiles.shares_of(triton.cdiv(k, columns), min(most, wanted))
    kind = torch.float32 if splits > 1 else x.dtype
    values = x.new_empty((splits, m, sum(counts)), dtype=kind)
    work = rank_tiles * splits
    work += 0 if halves is None else triton.cdiv(k // 2, PREPARE["BLOCK_P"])
    if work:
        pair = tiles.two(factors, x)
        blocks = {"BLOCK_M": tokens, "BLOCK_R": ranks, "BLOCK_K": columns, **PREPARE}
        prepare_kernel[(triton.cdiv(m, tokens), work)](
            x,
            x if halves is None else halves,
            pair,
            tuple((each.stride(0), each.stride(1)) for each in pair),
            tiles.two(counts, 0),
            tiles.two(inputs.scaling, 0.0),
            values,
            x if mask is None else mask.contiguous(),
            m,
            k,
            splits,
            steps,
            constants(HAS_MASK=mask is not None, **blocks),
            **PREPARE_OPTIONS,
        )
    return Hidden(values, splits) if joined is None else Hidden(joined, 1)


def _epilogue(inputs: QLoRAInputs, x: Tensor, hidden: Hidden) -> tuple[Epilogue, dict[str, int]]:
    """Return what is added to the product, and the constants that say which of it there is."""
    factors, ranks = tiles.beside(inputs.b, 1, x)
    given = inputs.row_table, inputs.row_index, inputs.bias
    table, index, bias = (x if each is None else each.contiguous() for each in given)
    rows = 0 if inputs.row_table is None else table.shape[0]
    errors = error_word(x.device)
    present = {
        "HAS_TABLE": inputs.row_table is not None,
        "HAS_BIAS": inputs.bias is not None,
        "HIDDEN_SPLITS": hidden.splits,
    }
    return Epilogue(hidden.values, factors, table, index, bias, errors, *ranks, rows), present


def _grad_x(inputs: QLoRAInputs, grad: Tensor, upstream: Hidden) -> Tensor:
    (n, k), m = inputs.shape, grad.shape[0]
    out = grad.new_empty((m, k))
    factors, ranks = tiles.beside(inputs.a, 0, grad)
    chosen = tiles.gradient_tiles_for(inputs)
    grid = triton.cdiv(m, chosen.tokens) * triton.cdiv(k // 2, chosen.pairs)
    grad_x_kernel[(grid,)](
        grad,
        tiles.weight_of(inputs),
        upstream.values,
        factors,
        ranks,
        out,
        m,
        n,
        tiles.units_of(inputs),
        constants(**tiles.facts_of(inputs), **LINEAR, **chosen.blocks),
        **chosen.options,
    )
    return out


def _grad_factor(
    inputs: QLoRAInputs, hidden: Hidden, value: Tensor, adapter: int, out: Tensor
) -> None:
    """Fill ``out``, ``[R, C]`` of any strides, with ``hidden^T value`` of one adapter."""
    (m, columns), mask = value.shape, inputs.adapter_mask
    ranks = [a.shape[0] for a in inputs.a]
    if not ranks[adapter]:
        return
    grid = triton.cdiv(columns, FACTOR["BLOCK_C"]), triton.cdiv(ranks[adapter], FACTOR["BLOCK_R"])
    factor_kernel[grid](
        hidden.values,
        value,
        value if mask is None else mask.contiguous(),
        out,
        out.stride(),
        m,
        columns,
        ranks[adapter],
        sum(ranks[:adapter]),
        sum(ranks),
        constants(BIT=adapter, HAS_MASK=mask is not None, **FACTOR),
        **FACTOR_OPTIONS,
    )


def _grad_row_table(inputs: QLoRAInputs, grad: Tensor) -> Tensor:
    table, index = inputs.row_table, inputs.row_index
    if table is None or index is None:
        raise ValueError("row_table: a gradient was asked for, but there is none")
    out = torch.empty_like(table, memory_format=torch.contiguous_format)
    sum_rows(grad, index.contiguous(), out)
    return out
