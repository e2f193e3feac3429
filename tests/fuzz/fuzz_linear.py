"""Random calls of ``qlora_linear``: any shape, dtype, layout, weight bytes, machine, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fuzz_support import DTYPES, ISAS, LAYOUTS, expect_close, lay_out, machine, note, same_bits
from hypothesis import strategies as st
from torch import Tensor

from collavo_kernels.ops.qlora_linear import NF4Weight
from collavo_kernels.ops.qlora_linear.nf4.format import (
    BLOCK_SIZES,
    NESTED_BLOCK,
    ScaleParts,
    block_count,
    join_scales,
    packed_bytes,
    scale_bytes,
)
from collavo_kernels.ops.qlora_linear.nf4.panels import cannot_pack
from collavo_kernels.testing import poisoned_empty

FEW = 64
_ROLES = ("x", "weight", "scales", "adapters", "mask", "table", "index", "bias", "grad")
_ODD_VALUES = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40)


@dataclass(frozen=True)
class LinearCase:
    """One call; plain values only, so that it can be written down and run again.

    Attributes:
        seed: Of all values.
        isa: Instruction set.
        threads: Of the loops.
        dtype: Of x.
        batches: 0: x has two dimensions, else the leading one of three.
        tokens: Tokens of a batch.
        n: Out features.
        k: In features.
        block_size: Of the weight.
        double_quant: Of the weight.
        panels: Whether the weight lies in panels, where it can.
        garbage: Whether scales are random bytes: any NaN, infinity and denormal.
        ranks: One per adapter.
        wide: Bit 2 i: a of adapter i is float32; bit 2 i + 1: its b.
        sides_wide: Whether table and bias are float32.
        mask: Whether there is an adapter mask; its unused bits are random too.
        rows: Rows of the table, -1 for none.
        bad_row: An index outside the table, at some token; -1 for none.
        bias: Whether there is one.
        odd_values: Names of what gets NaN, infinities and denormals.
        layouts: One of LAYOUTS for each of _ROLES.
        int8: int8_activations.
        wanted: Bits: which gradients the backward is asked for.
    """

    seed: int
    isa: str
    threads: int
    dtype: str
    batches: int
    tokens: int
    n: int
    k: int
    block_size: int
    double_quant: bool
    panels: bool
    garbage: bool
    ranks: list[int]
    wide: int
    sides_wide: bool
    mask: bool
    rows: int
    bad_row: int
    bias: bool
    odd_values: list[str]
    layouts: list[str]
    int8: bool
    wanted: int

    @property
    def count(self) -> int:
        """Tokens in all."""
        return max(self.batches, 1) * self.tokens

    @property
    def packable(self) -> bool:
        """Whether native code for a few tokens takes the weight."""
        return cannot_pack((self.n, self.k), self.block_size) is None


@st.composite
def linear_cases(draw: Callable[[Any], Any]) -> LinearCase:
    """Draw shapes around the edges of tiles, panels, groups, strips and blocks of terms.

    The best instruction set, bfloat16 and guarded ends come twice as often: only they meet masked
    loads, which sanitizers do not see.
    """
    mask = draw(st.booleans())
    adapters = draw(st.integers(0, 4) | (st.just(8) if mask else st.nothing()))
    rank = st.integers(0, 9) | st.sampled_from((16, 17, 31, 32, 33, 65))
    rows = draw(st.sampled_from((-1, 0, 1, 2, 3, 4, 5)))
    sizes = st.sampled_from((1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129))
    any_k, tiles = st.integers(1, 140) | sizes, st.integers(1, 11).map(lambda x: 64 * x)
    batches = draw(st.sampled_from((0, 0, 0, 1, 2)))
    many = st.integers(65, 140) | st.sampled_from((64, 65, 128, 300, 513))
    tokens = draw(st.integers(1, 70) | many)
    return LinearCase(
        seed=draw(st.integers(0, 2**16)),
        isa=draw(st.sampled_from((*ISAS[::-1], ISAS[-1]))),
        threads=draw(st.sampled_from((1, 1, 1, 2))),
        dtype=draw(st.sampled_from((*DTYPES, "bfloat16"))),
        batches=batches,
        tokens=-(-tokens // max(batches, 1)),
        n=draw(st.integers(1, 140) | sizes),
        k=draw(
            st.sampled_from((True, True, False)).flatmap(lambda tiled: tiles if tiled else any_k)
        ),
        block_size=draw(st.sampled_from((64, *BLOCK_SIZES))),
        double_quant=draw(st.booleans()),
        panels=draw(st.booleans()),
        garbage=draw(st.sampled_from((False, False, False, True))),
        ranks=[draw(rank) for _ in range(adapters)],
        wide=draw(st.sampled_from((0, 0, 2**16 - 1)) | st.integers(0, 2**16 - 1)),
        sides_wide=draw(st.booleans()),
        mask=mask,
        rows=rows,
        bad_row=draw(st.sampled_from((*[-1] * 30, -2, rows, rows + 1, 2**31 - 1, -(2**31)))),
        bias=draw(st.booleans()),
        odd_values=draw(st.lists(st.sampled_from(("x", "a", "b", "table", "bias")), max_size=1)),
        layouts=[draw(st.sampled_from((*LAYOUTS, "end"))) for _ in _ROLES],
        int8=draw(st.sampled_from((*[False] * 9, True))),
        wanted=draw(st.integers(0, 2**20 - 1)),
    )


@dataclass(frozen=True)
class LinearCall:
    """The flat arguments of the operator, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    scales: Tensor | None
    facts: tuple[int, int, bool]
    a: list[Tensor]
    b: list[Tensor]
    scaling: list[float]
    mask: Tensor | None
    table: Tensor | None
    index: Tensor | None
    bias: Tensor | None
    grad: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """What the operator takes."""
        adapters = (self.a, self.b, self.scaling)
        epilogue = (self.mask, self.table, self.index, self.bias)
        return (self.x, self.weight, self.scales, *self.facts, *adapters, *epilogue)

    def forward(self, backend: str, int8: bool = False) -> Tensor:
        """Return the output."""
        op = torch.ops.collavo.qlora_linear
        return op(*self.arguments(), int8_activations=int8, backend=backend)

    def backward(self, flags: list[bool], backend: str) -> list[Tensor]:
        """Return the gradients that the flags ask for."""
        op = torch.ops.collavo.qlora_linear_backward
        return op(*self.arguments(), False, self.grad, flags, backend=backend)

    def dense(self, weight: Tensor, change: Callable[[Tensor], Tensor]) -> LinearCall:
        """Return the call in float64 on a dense weight, its values changed by a function."""

        def changed(x: Any) -> Any:
            if isinstance(x, list):
                return [changed(each) for each in x]
            if isinstance(x, float):
                return float(change(torch.tensor(x, dtype=torch.float64)))
            return None if x is None else change(x.detach().double())

        adapters = (changed(self.a), changed(self.b), changed(self.scaling))
        epilogue = (self.mask, changed(self.table), self.index, changed(self.bias))
        head = (changed(self.x), change(weight), None, self.facts)
        return LinearCall(*head, *adapters, *epilogue, changed(self.grad))


def make_weight(case: LinearCase, generator: torch.Generator) -> NF4Weight:
    """Draw codes (any byte is two of them) and scales."""
    shape = (case.n, case.k)
    codes = torch.randint(0, 256, (packed_bytes(shape), 1), generator=generator).byte()
    blocks = block_count(shape, case.block_size)
    if case.garbage:
        size = scale_bytes(shape, case.block_size, case.double_quant)
        scales = torch.randint(0, 256, (size,), generator=generator).byte()
    elif case.double_quant:
        parts = ScaleParts(
            torch.randint(0, 256, (blocks,), generator=generator).byte(),
            torch.rand(1, generator=generator),
            torch.rand(-(-blocks // NESTED_BLOCK), generator=generator),
            torch.rand(256, generator=generator) - 0.5,
        )
        scales = join_scales(parts)
    else:
        scales = join_scales(ScaleParts(torch.randn(blocks, generator=generator)))
    weight = NF4Weight(codes, scales, shape, case.block_size, case.double_quant)
    return weight.to_panels() if case.panels and case.packable else weight


def make_call(case: LinearCase) -> tuple[LinearCall, Tensor]:
    """Draw a case's tensors; returns the call and its dense weight in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    layouts = dict(zip(_ROLES, case.layouts, strict=True))
    lead = (case.batches, case.tokens) if case.batches else (case.tokens,)

    def draw(role: str, to: torch.dtype, *shape: int, name: str = "") -> Tensor:
        values = torch.randn(shape, generator=generator)
        if (name or role) in case.odd_values and values.numel():
            some = torch.randint(0, values.numel(), (1 + values.numel() // 50,))
            pick = torch.randint(0, len(_ODD_VALUES), some.shape)
            values.view(-1)[some] = torch.tensor(_ODD_VALUES)[pick]
        return lay_out(values.to(to), layouts[role])

    weight = make_weight(case, generator)
    a, b = [], []
    for i, rank in enumerate(case.ranks):
        to = [torch.float32 if case.wide >> (2 * i + j) & 1 else dtype for j in range(2)]
        a.append(draw("adapters", to[0], rank, case.k, name="a"))
        b.append(draw("adapters", to[1], case.n, rank, name="b"))
    side = torch.float32 if case.sides_wide else dtype
    table = draw("table", side, case.rows, case.n) if case.rows >= 0 else None
    mask = torch.randint(0, 256, lead, generator=generator).byte() if case.mask else None
    call = LinearCall(
        x=draw("x", dtype, *lead, case.k),
        weight=lay_out(weight.packed, layouts["weight"]),
        scales=lay_out(weight.scales, layouts["scales"]),
        facts=(case.n, case.block_size, case.double_quant),
        a=a,
        b=b,
        scaling=[0.5 - i for i in range(len(a))],
        mask=None if mask is None else lay_out(mask, layouts["mask"]),
        table=table,
        index=None if table is None else lay_out(_index(case, lead, generator), layouts["index"]),
        bias=draw("bias", side, case.n) if case.bias else None,
        grad=draw("grad", dtype, *lead, case.n),
    )
    return call, weight.dequantize(torch.float32).double()


def _index(case: LinearCase, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
    index = torch.randint(-1, case.rows, lead, generator=generator, dtype=torch.int32)
    if case.bad_row != -1 and index.numel():
        index.view(-1)[int(torch.randint(0, index.numel(), (1,), generator=generator))] = (
            case.bad_row
        )
    return index


def run_linear(case: LinearCase) -> None:
    """Run a case forward and backward and check what came."""
    note(case)
    torch.manual_seed(case.seed)
    call, weight = make_call(case)
    bad_row = case.rows >= 0 and not -1 <= case.bad_row < case.rows
    with machine(case.isa, case.threads), poisoned_empty():
        _run_forward(case, call, weight, bad_row)
        if not (case.int8 or bad_row):
            _run_backward(case, call, weight)


def _run_forward(case: LinearCase, call: LinearCall, weight: Tensor, bad_row: bool) -> None:
    can_int8 = case.isa == "avx512" and case.packable and case.count <= FEW
    if bad_row or (case.int8 and not can_int8):
        with pytest.raises(ValueError, match=r"row_index: |int8_activations|cannot serve"):
            call.forward("cpu", case.int8)
        if bad_row and call.table is not None:
            # In order: x, weight, a and b of every adapter, row_table, bias.
            flags = [False] * (2 + 2 * len(call.a)) + [True, False]
            with pytest.raises(ValueError, match="row_index: "):
                call.backward(flags, "cpu")
        return
    out = call.forward("cpu", case.int8)
    assert out.shape == (*call.x.shape[:-1], case.n) and out.dtype == call.x.dtype
    exact = call.dense(weight, lambda t: t).forward("reference")
    squares = call.dense(weight, torch.square).forward("reference")
    band = _int8_band(call, weight) if case.int8 else None
    expect_close("out", out, exact, squares, _terms(case), band)
    if case.threads > 1:
        torch.set_num_threads(1)
        assert same_bits(call.forward("cpu", case.int8), out), "threads change bits"
        torch.set_num_threads(case.threads)


def _run_backward(case: LinearCase, call: LinearCall, weight: Tensor) -> None:
    every = [call.x, None, *call.a, *call.b, call.table, call.bias]
    flags = [each is not None and bool(case.wanted >> i & 1) for i, each in enumerate(every)]
    leaves = [leaf for leaf, flag in zip(every, flags, strict=True) if flag and leaf is not None]
    found = call.backward(flags, "cpu")
    exact = call.dense(weight, lambda t: t).backward(flags, "reference")
    squares = call.dense(weight, torch.square).backward(flags, "reference")
    assert len(found) == len(exact) == len(leaves)
    for i, like in enumerate(leaves):
        assert found[i].shape == like.shape and found[i].dtype == like.dtype
        # What a gradient goes through on its way is as narrow as x.
        narrow = 8 * torch.finfo(call.x.dtype).eps * squares[i].sqrt()
        expect_close(f"gradient {i}", found[i], exact[i], squares[i], _terms(case), narrow)


def _terms(case: LinearCase) -> int:
    return case.k + case.n + case.count + sum(case.ranks) + 8


def _int8_band(call: LinearCall, weight: Tensor) -> Tensor:
    """Bound what 8 bits can do: half a step of 1/127 for each code and for each value."""
    x = call.x.double().reshape(-1, call.x.shape[-1])
    most = x.abs().view(x.shape[0], -1, 64).amax(2).repeat_interleave(64, 1)
    n, block_size, double_quant = call.facts
    ones = torch.full((packed_bytes((n, x.shape[1])), 1), 0xFF, dtype=torch.uint8)
    scales = call.scales if call.scales is not None else ones
    unit = NF4Weight(ones, scales.contiguous(), (n, x.shape[1]), block_size, double_quant)
    largest = unit.dequantize(torch.float32).double().abs()
    step = 0.5 / 127
    band = most @ (step * weight.abs()).t() + (x.abs() + step * most) @ (step * largest).t()
    return 1.001 * band.reshape(*call.x.shape[:-1], n)
