"""Random calls of ``crayon_attention``, forward and backward, compared with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from fuzz_support import DTYPES, ISAS, LAYOUTS, lay_out, machine, note
from hypothesis import strategies as st
from torch import Tensor

_ROLES = ("q", "k", "v", "cos", "sin", "crayon_q", "crayon_k", "crayon_v", "row_index", "grad")


@dataclass(frozen=True)
class AttentionCall:
    """One call.

    Attributes:
        seed: Of all values.
        isa: Instruction set.
        threads: Of the loops.
        dtype: Of q, k, v and the tables.
        batch: B.
        length: S.
        heads: H over G.
        kv_heads: G.
        size: D.
        rows: T.
        tables: Which of q, k and v have one.
        bad_row: An index outside the tables, at some token; -1 for none.
        wide_angles: Whether cosine and sine are float32 beside narrower values.
        own_angles: Whether each sample has its own.
        rotated: Whether there are angles at all.
        ranges: Whether there are key ranges.
        window: 0 for none.
        causal: As in the operator.
        scale: 0 for the default.
        not_finite: Whether q, k and v hold NaN and infinities.
        layouts: One of LAYOUTS for each of _ROLES.
        wanted: Bits: which gradients the backward is asked for.
    """

    seed: int
    isa: str
    threads: int
    dtype: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    rows: int
    tables: str
    bad_row: int
    wide_angles: bool
    own_angles: bool
    rotated: bool
    ranges: bool
    window: int
    causal: bool
    scale: float
    not_finite: bool
    layouts: list[str]
    wanted: int


@st.composite
def attention_calls(draw: Callable[[Any], Any]) -> AttentionCall:
    """Draw sizes around the edges of vectors, slabs and blocks, and every option."""
    rows = draw(st.sampled_from((1, 2, 3, 4, 5, 0)))
    return AttentionCall(
        seed=draw(st.integers(0, 2**16)),
        isa=draw(st.sampled_from(ISAS[::-1])),
        threads=draw(st.sampled_from((1, 1, 2))),
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.sampled_from((1, 2, 3, 2, 1, 0))),
        length=draw(st.integers(0, 40) | st.sampled_from((96, 127, 128, 129, 161, 257, 290))),
        heads=draw(st.sampled_from((1, 2, 3, 4, 6))),
        kv_heads=draw(st.sampled_from((1, 2, 3, 8))),
        size=2 * draw(st.integers(1, 40) | st.sampled_from((8, 16, 32, 64, 120, 127, 128))),
        rows=rows,
        tables=draw(st.sampled_from(("", "q", "k", "v", "qk", "kv", "qkv", "qkv"))),
        bad_row=draw(st.sampled_from((*[-1] * 30, -2, rows, 2**31 - 1, -(2**31)))),
        wide_angles=draw(st.booleans()),
        own_angles=draw(st.booleans()),
        rotated=draw(st.sampled_from((True, True, False))),
        ranges=draw(st.booleans()),
        window=draw(st.sampled_from((0, 0, 1, 5, 70, 150, 2**40))),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from((0.0, 0.0, 0.3, -0.2, 1e-3))),
        not_finite=draw(st.sampled_from((False, False, True))),
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in _ROLES],
        wanted=draw(st.integers(0, 63)),
    )


def make_attention(case: AttentionCall) -> tuple[list[Tensor | None], Tensor]:
    """Draw the operator's ten tensors and the gradient of its output."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    layouts = dict(zip(_ROLES, case.layouts, strict=True))
    kv_heads, heads = case.kv_heads, case.heads * case.kv_heads

    def draw(role: str, *shape: int, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if case.not_finite and role in ("q", "k", "v") and values.numel():
            place = int(torch.randint(0, values.numel(), (1,), generator=generator))
            values.view(-1)[place] = float("nan") if case.seed % 2 else float("inf")
        return lay_out(values.to(to), layouts[role])

    tokens = (case.batch, case.length)
    angles = (case.batch if case.own_angles else 1, case.length, case.size)
    tensors: list[Tensor | None] = [
        draw(role, *tokens, count, case.size)
        for role, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    ]
    to = torch.float32 if case.wide_angles else dtype
    tensors += [draw(role, *angles, to=to) if case.rotated else None for role in ("cos", "sin")]
    for name, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True):
        wanted = name in case.tables
        tensors.append(draw(f"crayon_{name}", case.rows, count, case.size) if wanted else None)
    index = torch.randint(-1, case.rows, tokens, generator=generator, dtype=torch.int32)
    if case.bad_row != -1 and index.numel():
        place = int(torch.randint(0, index.numel(), (1,), generator=generator))
        index.view(-1)[place] = case.bad_row
    tensors.append(lay_out(index, layouts["row_index"]) if case.tables else None)
    ranges = torch.randint(0, case.length + 1, (case.batch, 2), generator=generator).sort(1)[0]
    tensors.append(ranges.int() if case.ranges else None)
    return tensors, draw("grad", *tokens, heads, case.size)


def run_attention(case: AttentionCall) -> None:
    """Run a case forward and backward and check what came."""
    note(case)
    tensors, grad = make_attention(case)
    options = (case.causal, case.window or None, case.scale or None)
    tokens = case.batch * case.length
    bad_row = bool(case.tables) and tokens > 0 and not -1 <= case.bad_row < case.rows
    op = torch.ops.collavo.crayon_attention
    with machine(case.isa, case.threads):
        if bad_row:
            with pytest.raises(ValueError, match="row_index: "):
                op(*tensors, *options, backend="cpu")
            return
        found = op(*tensors, *options, backend="cpu")
        gradients = _backward(case, tensors, found, grad, options, "cpu")
    wide = [x if x is None or not x.is_floating_point() else x.double() for x in tensors]
    low = op(*tensors, *options, backend="reference")
    exact = op(*wide, *options, backend="reference")
    low_gradients = _backward(case, tensors, low, grad, options, "reference")
    exact_gradients = _backward(case, wide, exact, grad.double(), options, "reference")
    largest = float(exact[3].nan_to_num(0.0, 0.0, 0.0).abs().amax()) if exact[3].numel() else 0.0
    for one, two, three in zip(
        (*found[:3], *gradients), (*low[:3], *low_gradients), (*exact[:3], *exact_gradients),
        strict=True,
    ):  # fmt: skip
        assert one.shape == two.shape and one.dtype == two.dtype
        if not case.not_finite:
            _expect_close(one, two, three, largest)
    # What PyTorch keeps free of NaN stays so.
    assert not bool((found[0].isnan() & ~low[0].isnan()).any())


def _expect_close(found: Tensor, low: Tensor, exact: Tensor, score: float) -> None:
    """Allow eight times plain PyTorch's error: of few values the largest error is a matter of luck.

    And a rounding of the largest score, which is as much of the weight that comes of it, on values
    of at least unit size, as the inputs have: with a single key plain PyTorch hits a weight of 1
    and a gradient of 0 exactly. What is wrong, not only rounded, is off by far more.
    """
    if found.numel() < 64:
        return
    band = torch.finfo(found.dtype).eps * (1 + score) * exact.abs().max().clamp_min(1.0)
    honest = (low.double() - exact).abs().max() + band
    error = (found.double() - exact).abs().max()
    assert bool(error <= 8 * honest), f"error {error:.3e}, plain PyTorch's {honest:.3e}"


def _backward(
    case: AttentionCall,
    tensors: list[Tensor | None],
    results: tuple[Tensor, ...],
    grad: Tensor,
    options: tuple[Any, ...],
    backend: str,
) -> list[Tensor]:
    out, key, value, lse = results
    keyed = tensors[3] is not None or tensors[6] is not None
    valued = tensors[7] is not None
    key = key if keyed else cast(Tensor, tensors[1])
    value = value if valued else cast(Tensor, tensors[2])
    kept = [tensors[0], key, value, *tensors[3:]]
    flags = [
        bool(case.wanted >> i & 1) and tensors[j] is not None
        for i, j in enumerate((0, 1, 2, 5, 6, 7))
    ]
    extra = torch.ones_like(key) if keyed and case.seed % 3 else None
    extra_value = torch.ones_like(value) if valued and case.seed % 2 else None
    op = torch.ops.collavo.crayon_attention_backward
    saved, grads = (key, value, out, lse), (grad, extra, extra_value)
    return list(op(*kept, *options, *saved, *grads, flags, backend=backend))
