"""Native code on random calls: never a wrong access, never a wrong value."""

from __future__ import annotations

from fuzz_attention import AttentionCall, attention_calls, run_attention
from fuzz_functions import (
    DequantizeCase,
    ProductCase,
    RowsCase,
    dequantize_cases,
    product_cases,
    rows_cases,
    run_dequantize,
    run_product,
    run_rows,
)
from fuzz_linear import LinearCase, linear_cases, run_linear
from fuzz_lookup import LookupCase, lookup_cases, run_lookup
from fuzz_support import fuzzing, needs_native
from hypothesis import given


@needs_native
@fuzzing
@given(linear_cases())
def test_qlora_linear(case: LinearCase) -> None:
    run_linear(case)


@needs_native
@fuzzing
@given(dequantize_cases())
def test_dequantize(case: DequantizeCase) -> None:
    run_dequantize(case)


@needs_native
@fuzzing
@given(product_cases)
def test_product(case: ProductCase) -> None:
    run_product(case)


@needs_native
@fuzzing
@given(rows_cases)
def test_rows(case: RowsCase) -> None:
    run_rows(case)


@needs_native
@fuzzing
@given(lookup_cases())
def test_panoptic_lookup(case: LookupCase) -> None:
    run_lookup(case)


@needs_native
@fuzzing
@given(attention_calls())
def test_crayon_attention(case: AttentionCall) -> None:
    run_attention(case)
