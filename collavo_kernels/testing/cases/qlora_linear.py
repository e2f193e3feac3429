"""The cases of ``qlora_linear``: each odd size says why it is there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collavo_kernels.ops.qlora_linear import (
    LoRAAdapter,
    NF4Weight,
    qlora_linear,
    quantize_nf4,
)
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs


@dataclass(frozen=True)
class QLoRACase:
    """One shape of the operator.

    Attributes:
        name: For the test's id.
        why: What it would catch.
        tokens: x's leading shape.
        n: Out features.
        k: In features.
        ranks: One per adapter.
        block_size: Of the NF4 weight.
        double_quant: Of the NF4 weight.
        dense: A dense weight in place of NF4.
        wide_adapters: Adapters, table and bias stay float32 beside a 16-bit x.
        mask: Give an adapter mask.
        rows: Rows of the table; None gives none.
        bias: Give a bias.
        panels: Bring the weight into panels (CPU only; elsewhere it stays in rows).
    """

    name: str
    why: str
    tokens: tuple[int, ...]
    n: int
    k: int
    ranks: tuple[int, ...] = (8, 16)
    block_size: int = 64
    double_quant: bool = True
    dense: bool = False
    wide_adapters: bool = False
    mask: bool = False
    rows: int | None = None
    bias: bool = False
    panels: bool = False

    @property
    def packable(self) -> bool:
        """Whether the weight can lie in panels."""
        return not self.dense and self.k % 64 == 0 and self.block_size >= 64


CASES = (
    QLoRACase("decode", "one token, the decoding path", (1,), 96, 128),
    QLoRACase("decode_long", "more tiles than are gathered at once", (1,), 40, 1088),
    QLoRACase("few", "a token count that no tile divides, everything on", (7,), 70, 192, (3, 20),
              mask=True, rows=5, bias=True),
    QLoRACase("prefill", "batch and tokens, the strip path", (2, 33), 130, 256, mask=True, rows=9),
    QLoRACase("groups", "more tokens than a group of 16, unequal groups", (37,), 70, 192, (3, 20),
              mask=True, rows=5, bias=True),
    QLoRACase("halves", "tokens in two parts, a block of terms and a rank that are not whole",
              (530,), 70, 576, (3, 20), mask=True, rows=5, bias=True),
    QLoRACase("thin", "sums that math libraries cut between threads", (70,), 24, 2048, (20, 17)),
    QLoRACase("wide_rank", "a rank of more than one block of terms", (70,), 48, 128, (515, 2)),
    QLoRACase("strips", "more rows than one strip holds", (40,), 1100, 320, (4, 8), bias=True),
    QLoRACase("plain_scales", "scales that are not double-quantised", (5,), 64, 128,
              double_quant=False),
    QLoRACase("block_128", "two chunks of 64 share a scale", (9,), 33, 384, block_size=128),
    QLoRACase("block_32", "a scale changes inside a chunk of 64", (9,), 33, 96, block_size=32,
              rows=2),
    QLoRACase("k_100", "blocks cross the ends of rows", (3, 7), 46, 100, mask=True, bias=True),
    QLoRACase("k_odd", "a row can start in the middle of a byte", (19,), 7, 5, (2,), rows=3),
    QLoRACase("three_rows", "fewer outputs than a tile, rank 1", (21,), 3, 64, (1, 2)),
    QLoRACase("no_adapters", "the base alone", (6,), 48, 64, ()),
    QLoRACase("rank_0", "an adapter of rank 0 contributes nothing", (6,), 48, 64, (0, 4)),
    QLoRACase("three", "more than two adapters, different ranks", (18,), 50, 64, (1, 7, 33),
              mask=True),
    QLoRACase("wide_few", "float32 adapters beside a 16-bit x, few tokens", (5,), 40, 128,
              wide_adapters=True, mask=True, rows=4, bias=True),
    QLoRACase("wide_many", "float32 adapters beside a 16-bit x, many tokens", (50,), 40, 128,
              wide_adapters=True, mask=True, rows=4, bias=True),
    QLoRACase("dense", "a dense base, for ablations", (2, 9), 40, 72, dense=True, mask=True, rows=3,
              bias=True),
)  # fmt: skip


PANEL_CASES = tuple(
    replace(case, name=f"{case.name}_in_panels", panels=True) for case in CASES if case.packable
)


@dataclass(frozen=True)
class QLoRACall:
    """The tensors of one call; ``leaves()`` are those that can get a gradient."""

    x: Tensor
    weight: NF4Weight | Tensor
    adapters: tuple[LoRAAdapter, ...]
    adapter_mask: Tensor | None
    row_table: Tensor | None
    row_index: Tensor | None
    bias: Tensor | None

    def run(self, backend: str = "") -> Tensor:
        """Call the operator."""
        return qlora_linear(
            self.x,
            self.weight,
            self.adapters,
            adapter_mask=self.adapter_mask,
            row_table=self.row_table,
            row_index=self.row_index,
            bias=self.bias,
            backend=backend,
        )

    def inputs(self) -> QLoRAInputs:
        """Return what a backend takes, tokens in one dimension; nothing asks for a gradient."""

        def plain(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach()

        nf4 = self.weight if isinstance(self.weight, NF4Weight) else None
        dense = self.weight.detach() if isinstance(self.weight, Tensor) else self.weight.packed
        return QLoRAInputs(
            x=self.x.detach(),
            weight=dense,
            scales=None if nf4 is None else nf4.scales,
            out_features=self.weight.shape[0],
            block_size=64 if nf4 is None else nf4.block_size,
            double_quant=nf4 is not None and nf4.double_quant,
            a=[each.a.detach() for each in self.adapters],
            b=[each.b.detach() for each in self.adapters],
            scaling=[each.scaling for each in self.adapters],
            adapter_mask=self.adapter_mask,
            row_table=plain(self.row_table),
            row_index=self.row_index,
            bias=plain(self.bias),
        ).flattened()

    def leaves(self) -> list[Tensor]:
        """Return x, every a and b, row_table, bias and a dense weight, as far as there are any."""
        factors = [factor for adapter in self.adapters for factor in adapter[:2]]
        dense = [self.weight] if isinstance(self.weight, Tensor) else []
        some = [each for each in (self.row_table, self.bias) if each is not None]
        return [self.x, *factors, *some, *dense]

    def double(self) -> QLoRACall:
        """Return the same values in float64, as leaves of their own."""

        def wide(value: Tensor) -> Tensor:
            return value.detach().double().requires_grad_(value.requires_grad)

        adapters = [LoRAAdapter(wide(a), wide(b), s) for a, b, s in self.adapters]
        return replace(
            self,
            x=wide(self.x),
            weight=self.weight if isinstance(self.weight, NF4Weight) else wide(self.weight),
            adapters=tuple(adapters),
            row_table=None if self.row_table is None else wide(self.row_table),
            bias=None if self.bias is None else wide(self.bias),
        )

    def gradients(self, grad: Tensor, backend: str = "") -> tuple[Tensor, list[Tensor]]:
        """Return the output and the gradients of all leaves."""
        out = self.run(backend)
        found = torch.autograd.grad(out, self.leaves(), grad.to(out.dtype))
        return out.detach(), list(found)


def make_call(
    case: QLoRACase, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> QLoRACall:
    """Draw a case's tensors with unit variance; floating ones ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.float32 if case.wide_adapters else dtype

    def draw(*shape: int, scale: float = 1.0, to: torch.dtype = side) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device, to).requires_grad_()

    weight = torch.randn(case.n, case.k, generator=generator) / case.k**0.5
    base: NF4Weight | Tensor
    if case.dense:
        base = weight.to(device, dtype).requires_grad_()
    else:
        base = quantize_nf4(weight, case.block_size, case.double_quant).to(device)
        if case.panels and base.device.type == "cpu":
            base = base.to_panels()
    adapters: list[LoRAAdapter] = []
    for rank in case.ranks:
        a = draw(rank, case.k, scale=case.k**-0.5)
        b = draw(case.n, rank, scale=max(rank, 1) ** -0.5)
        adapters.append(LoRAAdapter(a, b, 0.5 + len(adapters)))
    mask, index, table = None, None, None
    if case.mask:
        high = 1 << len(case.ranks)
        mask = torch.randint(0, high, case.tokens, generator=generator, dtype=torch.uint8)
    if case.rows is not None:
        index = torch.randint(-1, case.rows, case.tokens, generator=generator, dtype=torch.int32)
        table = draw(case.rows, case.n)
    return QLoRACall(
        x=draw(*case.tokens, case.k, to=dtype),
        weight=base,
        adapters=tuple(adapters),
        adapter_mask=None if mask is None else mask.to(device),
        row_table=table,
        row_index=None if index is None else index.to(device),
        bias=draw(case.n) if case.bias else None,
    )


def samples() -> list[tuple[str, QLoRAInputs]]:
    """Return a few cases by name, as bundles of float32 inputs."""
    names = ("few", "few_in_panels", "prefill", "dense", "no_adapters")
    every = [each for each in (*CASES, *PANEL_CASES) if each.name in names]
    found = [(each.name, make_call(each).inputs()) for each in every]
    dense = dict(found)["dense"]
    # A reference that keeps x's strides would return a gradient of another layout.
    return [*found, ("dense_transposed", dense._replace(x=dense.x.t().contiguous().t()))]
