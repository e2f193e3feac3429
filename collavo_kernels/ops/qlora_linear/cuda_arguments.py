"""The structs that CUDA launchers take, field by field as ``csrc/qlora_linear/cuda/arguments.h``.

The header says what a field means; a test compares where every field lies. What several launchers
take is made here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from collavo_kernels._flags import error_word
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4.format import block_count, scale_places

_Layout = Sequence[tuple[str, Any]]
_NESTED = ("offset", "nested_absmax", "nested_code")


class Arguments(ctypes.Structure):
    """A struct of C, made by naming every field; those of an anonymous struct count as its own.

    A pointer takes a tensor, or whatever else has ``data_ptr()``, or None. What it points to lives
    as long as this.

    Raises:
        TypeError: for a field that is missing, unknown or of another type.
    """

    _names: ClassVar[frozenset[str]]
    _pointers: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        """Note the fields' names."""
        kinds = dict(_leaves(cls))
        cls._names = frozenset(kinds)
        cls._pointers = tuple(name for name, kind in kinds.items() if kind is ctypes.c_void_p)

    def __init__(self, **values: Any) -> None:
        if values.keys() != self._names:
            self._refuse(values)
        self._kept = values.copy()
        try:
            for name in self._pointers:
                if values[name] is not None:
                    values[name] = values[name].data_ptr()
            super().__init__(**values)
        except (TypeError, AttributeError):
            self._refuse(self._kept)

    def _refuse(self, values: dict[str, Any]) -> NoReturn:
        struct, known = type(self).__name__, ", ".join(sorted(self._names))
        for name in sorted(self._names ^ values.keys()):
            what = "the field is missing" if name in self._names else f"expected one of {known}"
            raise TypeError(f"{struct}: {name}: {what}")
        for name, value in values.items():
            if name in self._pointers:
                if value is None or hasattr(value, "data_ptr"):
                    continue
                raise TypeError(f"{struct}: {name}: expected a tensor, got {type(value).__name__}")
            try:
                setattr(self, name, value)
            except TypeError as error:
                raise TypeError(f"{struct}: {name}: {error}") from None
        raise TypeError(f"{struct}: expected {known}")


def _leaves(structure: Any) -> Iterator[tuple[str, Any]]:
    for name, kind in structure._fields_:
        if name in getattr(structure, "_anonymous_", ()):
            yield from _leaves(kind)
        else:
            yield name, kind


class BranchArguments(Arguments):
    """A branch's factors."""

    _fields_: ClassVar[_Layout] = [
        ("a", ctypes.c_void_p),
        ("a_wide", ctypes.c_bool),
        ("b", ctypes.c_void_p),
        ("b_wide", ctypes.c_bool),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    ]


class WeightArguments(ctypes.Structure):
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


class EpilogueArguments(ctypes.Structure):
    """What is added at the end: a table's row for each token that has one, and a bias."""

    _fields_: ClassVar[_Layout] = [
        ("row_table", ctypes.c_void_p),
        ("row_table_wide", ctypes.c_bool),
        ("bias", ctypes.c_void_p),
        ("bias_wide", ctypes.c_bool),
        ("row_index", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("table_rows", ctypes.c_int64),
    ]


class DecodeArguments(Arguments):
    """The whole operator for a few tokens."""

    _anonymous_: ClassVar[Sequence[str]] = ("weight", "epilogue")
    _fields_: ClassVar[_Layout] = [
        ("weight", WeightArguments),
        ("epilogue", EpilogueArguments),
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

    _anonymous_: ClassVar[Sequence[str]] = ("weight",)
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

    _anonymous_: ClassVar[Sequence[str]] = ("epilogue",)
    _fields_: ClassVar[_Layout] = [
        ("epilogue", EpilogueArguments),
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


class Branches:
    """The branches of a call, side by side in memory.

    Args:
        branches: Any number of them.
    """

    def __init__(self, branches: Sequence[BranchArguments]) -> None:
        self._kept = branches
        self._array = (BranchArguments * len(branches))(*branches)

    def __len__(self) -> int:
        return len(self._array)

    def data_ptr(self) -> int:
        """Return their address, as a tensor does."""
        return ctypes.addressof(self._array)


class _Within(NamedTuple):
    """A place in a tensor's memory."""

    tensor: Tensor
    place: int

    def data_ptr(self) -> int:
        """Return its address, as a tensor does."""
        return self.tensor.data_ptr() + self.place


def branch_of(
    rank: int, a: Tensor | None = None, b: Tensor | None = None, scaling: float = 1.0
) -> BranchArguments:
    """Return a branch; a strip takes one of its factors, and no scaling."""
    return BranchArguments(
        a=a, a_wide=_is_wide(a), b=b, b_wide=_is_wide(b), rank=rank, scaling=scaling
    )


def weight_fields(inputs: QLoRAInputs) -> dict[str, Any]:
    """Return the fields of :class:`WeightArguments`.

    Raises:
        RuntimeError: if the weight is dense.
    """
    if inputs.scales is None:
        raise RuntimeError("qlora_linear: the CUDA backend has no dense weight")
    n, k = inputs.shape
    scales = aligned(inputs.scales)
    parts: dict[str, Any] = {"absmax": scales, **dict.fromkeys(_NESTED)}
    if inputs.double_quant:
        # Views of the parts would cost as much as the launch.
        places = scale_places(block_count(inputs.shape, inputs.block_size))
        parts = {name: _Within(scales, place) for name, place in places._asdict().items()}
    return {
        "packed": aligned(inputs.weight),
        **parts,
        "n": n,
        "k": k,
        "block_size": inputs.block_size,
    }


def epilogue_fields(inputs: QLoRAInputs) -> dict[str, Any]:
    """Return the fields of :class:`EpilogueArguments`."""
    x, table, index, bias = inputs.x, inputs.row_table, inputs.row_index, inputs.bias
    rows = 0
    if table is not None and index is not None:
        index, rows = index.contiguous(), table.shape[0]
        # A table without rows has no address, but the index is checked all the same.
        table = readable(table, x) if rows else x
    bias = None if bias is None else readable(bias, x)
    return {
        "row_table": table,
        "row_table_wide": _is_wide(table),
        "bias": bias,
        "bias_wide": _is_wide(bias),
        "row_index": index,
        "errors": error_word(x.device),
        "table_rows": rows,
    }


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor contiguous and at an address that 16-byte loads take."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def readable(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype of another or in float32, as kernels read it."""
    fits = tensor.dtype in (like.dtype, torch.float32)
    return aligned(tensor if fits else tensor.float())


def _is_wide(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32
