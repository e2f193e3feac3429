"""Random calls of native functions that the operators call with fewer shapes than they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_linear import LinearCase, linear_cases, make_weight
from fuzz_support import (
    DTYPES,
    ISAS,
    LAYOUTS,
    SENTINEL,
    expect_close,
    guarded,
    lay_out,
    machine,
    note,
    same_bits,
)
from hypothesis import strategies as st
from torch import Tensor

from collavo_kernels._native import BEST_ISA, DTYPE_CODES

_sizes = st.integers(1, 40) | st.sampled_from((63, 64, 65, 127, 128, 129, 200))


@dataclass(frozen=True)
class DequantizeCase:
    """A strip of the weight of a ``LinearCase``, written into rows with room between them."""

    weight: dict[str, Any]
    rows: list[int]
    columns: list[int]
    gap: int


@st.composite
def dequantize_cases(draw: Callable[[Any], Any]) -> DequantizeCase:
    """Draw ranges of rows and columns; of a weight in panels, whole tiles."""
    case = draw(linear_cases())
    step = 64 if case.panels and case.packable else 1
    rows = sorted(draw(st.tuples(*[st.integers(0, case.n)] * 2)))
    columns = sorted(draw(st.tuples(*[st.integers(0, case.k // step)] * 2)))
    wide = [step * each for each in columns]
    return DequantizeCase(vars(case), rows, wide, draw(st.integers(0, 3)))


def run_dequantize(case: DequantizeCase) -> None:
    """Compare a strip with the reference's, bit by bit, and see that nothing else is written."""
    note(case)
    linear = LinearCase(**case.weight)
    weight = make_weight(linear, torch.Generator().manual_seed(linear.seed))
    packed, scales = (
        lay_out(each, layout if layout in ("odd", "end", "start") else "plain")
        for each, layout in zip((weight.packed, weight.scales), linear.layouts, strict=False)
    )
    dtype = getattr(torch, linear.dtype)
    height, width = case.rows[1] - case.rows[0], case.columns[1] - case.columns[0]
    stride = width + case.gap
    out = guarded(torch.full((max(0, height * stride - case.gap),), SENTINEL, dtype=dtype))
    with machine(linear.isa, linear.threads) as module:
        module.qlora_linear_dequantize(
            isa=BEST_ISA,
            weight={
                "packed": packed,
                "scales": scales,
                "rows": linear.n,
                "columns": linear.k,
                "block_size": linear.block_size,
                "double_quant": linear.double_quant,
                "in_panels": weight.in_panels,
            },
            row_begin=case.rows[0],
            row_end=case.rows[1],
            column_begin=case.columns[0],
            column_end=case.columns[1],
            dtype=DTYPE_CODES[dtype],
            out=out,
            row_stride=stride,
        )
    if height == 0 or width == 0:
        assert bool((out == SENTINEL).all())
        return
    dense = weight.dequantize(dtype)[slice(*case.rows), slice(*case.columns)]
    assert same_bits(out.as_strided((height, width), (stride, 1)), dense)
    between = torch.ones_like(out, dtype=torch.bool)
    between.as_strided((height, width), (stride, 1)).fill_(False)
    assert bool((out[between] == SENTINEL).all()), "written between the rows"


@dataclass(frozen=True)
class ProductCase:
    """A thin product ``[m, k] [k, n]`` of matrices with any strides."""

    seed: int
    isa: str
    threads: int
    shape: list[int]
    layouts: list[str]
    gap: int


product_cases = st.builds(
    ProductCase,
    seed=st.integers(0, 2**16),
    isa=st.sampled_from(ISAS[::-1] or ("none",)),
    threads=st.sampled_from((1, 1, 2)),
    shape=st.lists(_sizes | st.just(0), min_size=3, max_size=3),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=2),
    gap=st.integers(0, 3),
)


def run_product(case: ProductCase) -> None:
    """Compare with float64, and see that nothing else is written."""
    note(case)
    generator = torch.Generator().manual_seed(case.seed)
    m, n, k = case.shape
    a = lay_out(torch.randn(m, k, generator=generator), case.layouts[0])
    b = lay_out(torch.randn(k, n, generator=generator), case.layouts[1])
    stride = n + case.gap
    out = guarded(torch.full((max(0, m * stride - case.gap),), SENTINEL))
    with machine(case.isa, case.threads) as module:
        module.qlora_linear_product(
            isa=BEST_ISA, a=a, b=b, out=out.as_strided((m, n), (stride, 1)), m=m, n=n, k=k
        )
    if m == 0 or n == 0:
        return
    inside = torch.zeros_like(out, dtype=torch.bool)
    inside.as_strided((m, n), (stride, 1)).fill_(True)
    assert bool((out[~inside] == SENTINEL).all()), "written between the rows"
    wide = a.double(), b.double()
    squares = wide[0].square() @ wide[1].square()
    expect_close("c", out.as_strided((m, n), (stride, 1)), wide[0] @ wide[1], squares, k + 8)


@dataclass(frozen=True)
class RowsCase:
    """Tokens that refer to rows of a table."""

    seed: int
    isa: str
    threads: int
    dtype: str
    tokens: int
    columns: int
    rows: int
    end: bool


rows_cases = st.builds(
    RowsCase,
    seed=st.integers(0, 2**16),
    isa=st.sampled_from(ISAS[::-1] or ("none",)),
    threads=st.sampled_from((1, 1, 2)),
    dtype=st.sampled_from(DTYPES),
    tokens=_sizes | st.just(0),
    columns=_sizes,
    rows=st.integers(0, 5),
    end=st.booleans(),
)


def run_rows(case: RowsCase) -> None:
    """Add table rows to tokens and sum tokens into rows, all of it in guarded memory."""
    note(case)
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, to: torch.dtype) -> Tensor:
        return guarded(torch.randn(shape, generator=generator).to(to), case.end)

    x = draw(case.tokens, case.columns, to=dtype)
    before = x.clone()
    table = draw(case.rows, case.columns, to=torch.float32)
    index = torch.randint(-1, case.rows, (case.tokens,), generator=generator, dtype=torch.int32)
    index = guarded(index, case.end)
    sums = guarded(torch.full((case.rows, case.columns), SENTINEL), case.end)
    common = {
        "isa": BEST_ISA,
        "dtype": DTYPE_CODES[dtype],
        "row_index": index,
        "tokens": case.tokens,
        "columns": case.columns,
    }
    with machine(case.isa, case.threads) as module:
        module.qlora_linear_sum_rows(
            grad_out=x, grad_row_table=sums, table_rows=case.rows, **common
        )
        module.qlora_linear_add_rows(out=x, row_table=table, **common)
    has_row = index >= 0
    expected = before.float().clone()
    expected[has_row] += table[index[has_row].long()]
    assert same_bits(x, torch.where(has_row[:, None], expected.to(dtype), before))
    exact = torch.zeros(case.rows, case.columns, dtype=torch.float64)
    squares = exact.clone()
    used, values = index[has_row].long(), before.double()[has_row]
    exact.index_add_(0, used, values)
    squares.index_add_(0, used, values.square())
    expect_close("sums", sums, exact, squares, case.tokens)
