"""The benchmark of ``qlora_linear``: its shapes, its inputs, its work, and the float64 results."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from collavo_kernels import LoRAAdapter, NF4Weight, quantize_nf4

DTYPE = torch.bfloat16
# At the end of a provider's name: adapters in float32, as apply_to_llava and PEFT make them.
FLOAT32_ADAPTERS = "-fp32-adapters"
# The base matrix alone, without the two adapters: less work than the operator's.
BASE_ONLY = ("bitsandbytes", "dense", "ours:int8")


class Case(NamedTuple):
    """K inputs, N outputs, two adapters of a rank, M tokens; written ``4096x11008/m16/r64``."""

    k: int
    n: int
    m: int
    rank: int

    def __str__(self) -> str:
        return f"{self.k}x{self.n}/m{self.m}/r{self.rank}"

    def bytes(self, mode: str, provider: str) -> int:
        """Least bytes: canonical NF4 with 8-bit scales, adapters, x and y once; gradients alike.

        A backward reads the weight again: there is no gradient before the forward has ended.
        """
        weight = self.n * self.k * (0.5 + 1 / 64)
        size = 4 if provider.endswith(FLOAT32_ADAPTERS) else DTYPE.itemsize
        factors = 0 if provider in BASE_ONLY else 2 * size * self.rank * (self.n + self.k)
        tokens = 2 * self.m * (self.n + self.k)
        if mode != "fwd+bwd":
            return int(weight + factors + tokens)
        return int(2 * weight + 3 * factors + 2 * tokens + 2 * self.m * self.k)

    def flops(self, mode: str, provider: str) -> int:
        """Least multiplications and additions; a base has one product per pass, a factor three."""
        weight = 2 * self.m * self.n * self.k
        factors = 0 if provider in BASE_ONLY else 4 * self.m * self.rank * (self.n + self.k)
        return 2 * weight + 3 * factors if mode == "fwd+bwd" else weight + factors


class Weights(NamedTuple):
    """What all providers of one shape and rank are given.

    Attributes:
        nf4: The 4-bit weight ``(N, K)``, as bitsandbytes keeps it.
        dense: The same in bfloat16 ``[N, K]``, for providers with a dense weight.
        adapters: Two, in bfloat16.
    """

    nf4: NF4Weight
    dense: Tensor
    adapters: tuple[LoRAAdapter, ...]


class Exact(NamedTuple):
    """Float64 results: y ``[M, N]``; dx ``[M, K]`` and the gradients of A0, B0, A1, B1, if any."""

    y: Tensor
    dx: tuple[Tensor, ...] = ()
    factors: tuple[Tensor, ...] = ()


@functools.lru_cache(maxsize=1)
def weights(k: int, n: int, rank: int, device: torch.device) -> Weights:
    """Make the weights of one shape and rank."""
    generator = torch.Generator().manual_seed(k + n + rank)

    def normal(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / columns**0.5
        return values.to(device, DTYPE)

    nf4 = quantize_nf4(normal(n, k))
    adapters = tuple(LoRAAdapter(normal(rank, k), normal(n, rank), 0.5) for _ in range(2))
    return Weights(nf4, nf4.dequantize(DTYPE), adapters)


def copy_of(weight: NF4Weight) -> NF4Weight:
    """Return the same bytes in memory of their own."""
    return replace(weight, packed=weight.packed.clone(), scales=weight.scales.clone())


def streaming_copy_of(weight: NF4Weight) -> NF4Weight:
    """Return a copy as this package's modules hold it: in panels on a CPU."""
    return weight.to_panels() if weight.device.type == "cpu" else copy_of(weight)


@functools.lru_cache(maxsize=2)
def tokens(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return x ``[M, K]`` and the gradient of y ``[M, N]``, unit variance."""
    generator = torch.Generator().manual_seed(case.m)
    x = torch.randn(case.m, case.k, generator=generator)
    grad = torch.randn(case.m, case.n, generator=generator)
    return x.to(device, DTYPE), grad.to(device, DTYPE)


@functools.lru_cache(maxsize=4)
def exact(
    case: Case, device: torch.device, *, dense: bool, adapted: bool, gradients: bool
) -> Exact:
    """Return the results in float64 of the operator, of its base, or of a dense layer."""
    given = weights(case.k, case.n, case.rank, device)
    weight = given.dense.double() if dense else given.nf4.dequantize(torch.float64)
    x, grad = (each.double() for each in tokens(case, device))
    y = x @ weight.t()
    dx = grad @ weight if gradients else x.new_empty(0)
    factors: list[Tensor] = []
    for a, b, scaling in given.adapters if adapted else ():
        wide_a, wide_b = a.double(), scaling * b.double()
        hidden = x @ wide_a.t()
        y += hidden @ wide_b.t()
        if gradients:
            upstream = grad @ wide_b
            dx += upstream @ wide_a
            factors += [upstream.t() @ x, scaling * (grad.t() @ hidden)]
    return Exact(y, (dx,) if gradients else (), tuple(factors))
