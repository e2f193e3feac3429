"""Calls of the native functions, and the parts of their arguments that several have.

Every argument has the name of the field that it fills in ``csrc/qlora_linear/qlora_linear.h``,
where its shape and meaning stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from collavo_kernels._native import BEST_ISA, DTYPE_CODES, native_of
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs

NAME = "qlora_linear"


def weight_fields(inputs: QLoRAInputs) -> dict[str, Any]:
    """Return the weight as native functions take it."""
    rows, columns = inputs.shape
    return {
        "packed": inputs.weight,
        "scales": inputs.scales,
        "rows": rows,
        "columns": columns,
        "block_size": inputs.block_size,
        "double_quant": inputs.double_quant,
        "in_panels": inputs.in_panels,
    }


def adapter_fields(
    rank: int,
    dtype: torch.dtype,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
) -> dict[str, Any]:
    """Return a branch; products of many tokens take one of its factors, and no scaling."""
    code = DTYPE_CODES[dtype]
    return {"a": a, "b": b, "rank": rank, "scaling": scaling, "dtype": code}


def addition_fields(inputs: QLoRAInputs) -> dict[str, Tensor | None]:
    """Return what is added to the products; the row index must have been checked."""
    table, index, bias = inputs.row_table, inputs.row_index, inputs.bias
    return {
        "row_table": None if table is None else table.float().contiguous(),
        "row_index": None if index is None else index.contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
    }


def dequantize(inputs: QLoRAInputs, rows: slice, columns: slice, out: Tensor) -> None:
    """Write ``weight[rows, columns]`` into ``out``, whose rows may lie apart."""
    native_of(NAME).qlora_linear_dequantize(
        isa=BEST_ISA,
        weight=weight_fields(inputs),
        row_begin=rows.start,
        row_end=rows.stop,
        column_begin=columns.start,
        column_end=columns.stop,
        dtype=DTYPE_CODES[out.dtype],
        out=out,
        row_stride=out.stride(0),
    )


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a b`` into ``out``: float32, any strides but those of ``out``'s columns."""
    (m, k), n = a.shape, b.shape[1]
    native_of(NAME).qlora_linear_product(isa=BEST_ISA, a=a, b=b, out=out, m=m, n=n, k=k)


def add_rows(out: Tensor, row_table: Tensor, row_index: Tensor) -> None:
    """Add to every token the row of the table that it has, if any."""
    native_of(NAME).qlora_linear_add_rows(
        isa=BEST_ISA,
        dtype=DTYPE_CODES[out.dtype],
        out=out,
        row_table=row_table,
        row_index=row_index,
        tokens=out.shape[0],
        columns=out.shape[1],
    )


def sum_rows(grad_out: Tensor, row_index: Tensor, grad_row_table: Tensor) -> None:
    """Write the sum of the gradients of all tokens that have a row, for every row."""
    native_of(NAME).qlora_linear_sum_rows(
        isa=BEST_ISA,
        dtype=DTYPE_CODES[grad_out.dtype],
        grad_out=grad_out,
        row_index=row_index,
        grad_row_table=grad_row_table,
        tokens=grad_out.shape[0],
        columns=grad_out.shape[1],
        table_rows=grad_row_table.shape[0],
    )
