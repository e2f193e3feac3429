"""The structs that CUDA launchers take, field by field as ``csrc/qlora_linear/cuda/arguments.h``.

The header says what a field means; a test compares where every field lies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from collavo_kernels._flags import error_word
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4.format import block_count, split_scales

_Layout = Sequence[tuple[str, Any]]


class Arguments(ctypes.Structure):
    """A struct of C, made by naming every field.

    A pointer takes a tensor or None, or a sequence of structs; what it points to lives as long as
    this.

    Raises:
        TypeError: for a field that is missing, unknown or of another type.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self._kept: list[Any] = []
        for field in self._fields_:
            name, kind = field[0], field[1]
            if name not in values:
                raise TypeError(f"{type(self).__name__}: {name}: the field is missing")
            try:
                setattr(self, name, self._as_c(kind, values[name]))
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: {name}: {error}") from None
        self._expect_no_others(values)

    def _as_c(self, kind: Any, value: Any) -> Any:
        self._kept.append(value)
        if kind is not ctypes.c_void_p or value is None:
            return value
        if isinstance(value, Tensor):
            return value.data_ptr()
        if not isinstance(value, list):
            raise TypeError(f"expected a tensor, None or a list, got {type(value).__name__}")
        if not value:
            return None
        array = (type(value[0]) * len(value))(*value)
        self._kept.append(array)
        return ctypes.addressof(array)

    def _expect_no_others(self, values: Mapping[str, Any]) -> None:
        if len(values) == len(self._fields_):
            return
        names = [field[0] for field in self._fields_]
        for name in values:
            if name not in names:
                known = ", ".join(names)
                raise TypeError(f"{type(self).__name__}: {name}: expected one of {known}")


class Side(Arguments):
    """A matrix whose values are of x's type, or float32 (wide)."""

    _fields_: ClassVar[_Layout] = [("values", ctypes.c_void_p), ("wide", ctypes.c_bool)]


class Branch(Arguments):
    """A branch's factors."""

    _fields_: ClassVar[_Layout] = [
        ("a", Side),
        ("b", Side),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


class WeightArguments(Arguments):
    """The 4-bit matrix."""

    _fields_: ClassVar[_Layout] = [
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_code", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    ]


class Epilogue(Arguments):
    """What is added at the end: a table's row for each token that has one, and a bias."""

    _fields_: ClassVar[_Layout] = [
        ("row_table", Side),
        ("bias", Side),
        ("row_index", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("table_rows", ctypes.c_int64),
    ]


class DecodeArguments(Arguments):
    """The whole operator for a few tokens."""

    _fields_: ClassVar[_Layout] = [
        ("weight", WeightArguments),
        ("epilogue", Epilogue),
        ("adapters", ctypes.c_void_p),
        ("num_adapters", ctypes.c_int64),
        ("adapter_mask", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


class StripArguments(Arguments):
    """A part of the weight and of the factors beside or below it."""

    _fields_: ClassVar[_Layout] = [
        ("weight", WeightArguments),
        ("adapters", ctypes.c_void_p),
        ("num_adapters", ctypes.c_int64),
        ("below", ctypes.c_bool),
        ("row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    ]


class AddRowsArguments(Arguments):
    """Rows and a bias to add to an output."""

    _fields_: ClassVar[_Layout] = [
        ("epilogue", Epilogue),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


class SumRowsArguments(Arguments):
    """Gradients to sum over the tokens of each row."""

    _fields_: ClassVar[_Layout] = [
        ("grad_out", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("grad_row_table", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


def side_of(tensor: Tensor | None) -> Side:
    """Return a matrix of x's dtype or float32; None is the one that is not there."""
    return Side(values=tensor, wide=tensor is not None and tensor.dtype == torch.float32)


def branch_of(
    rank: int, a: Tensor | None = None, b: Tensor | None = None, scaling: float = 1.0
) -> Branch:
    """Return a branch; a strip takes one of its factors, and no scaling."""
    return Branch(a=side_of(a), b=side_of(b), rank=rank, scaling=scaling)


def weight_of(inputs: QLoRAInputs) -> WeightArguments:
    """Return the weight.

    Raises:
        RuntimeError: if it is dense.
    """
    if inputs.scales is None:
        raise RuntimeError("qlora_linear: the CUDA backend has no dense weight")
    n, k = inputs.shape
    blocks = block_count(inputs.shape, inputs.block_size)
    parts = split_scales(inputs.scales, blocks, inputs.double_quant)
    return WeightArguments(
        packed=aligned(inputs.weight),
        absmax=parts.absmax,
        nested_absmax=parts.nested_absmax,
        nested_code=parts.nested_code,
        offset=parts.offset,
        n=n,
        k=k,
        block_size=inputs.block_size,
    )


def epilogue_of(inputs: QLoRAInputs) -> Epilogue:
    """Return row table, row index and bias, and where a bad row is noted."""
    x, table, index = inputs.x, inputs.row_table, inputs.row_index
    if table is not None and index is not None:
        index = index.contiguous()
        # A table without rows has no address, but the index is checked all the same.
        values = readable(table, x) if table.shape[0] else x
    else:
        values, index = None, None
    return Epilogue(
        row_table=side_of(values),
        bias=side_of(None if inputs.bias is None else readable(inputs.bias, x)),
        row_index=index,
        errors=error_word(x.device),
        table_rows=0 if table is None else table.shape[0],
    )


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor contiguous and at an address that 16-byte loads take."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def readable(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype of another or in float32, as kernels read it."""
    return aligned(tensor.to(like.dtype if tensor.dtype == like.dtype else torch.float32))
