"""What ``qlora_linear`` is measured on: shapes, inputs, work and float64 results."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Row
from collavo_kernels import LoRAAdapter, NF4Weight, quantize_nf4

OP = "qlora_linear"
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824))
RANKS = (64, 16, 256)
TOKENS = {"cpu": (1, 4, 16, 128, 1024), "cuda": (1, 4, 16, 128, 2048)}
QUICK_SHAPES = {"cpu": SHAPES[:1], "cuda": SHAPES[:2]}
# The middle sizes add little where a call takes long.
QUICK_TOKENS = {
    "fwd": (1, 4, 16, 128, 1024, 2048),
    "fwd-grad": (1, 16),
    "fwd+bwd": (1, 128, 1024, 2048),
}
DTYPE = torch.bfloat16
# At the end of a provider's name: adapters in float32, as apply_to_llava and PEFT make them.
FLOAT32_ADAPTERS = "-fp32-adapters"
OURS = {"cpu": ("ours:cpu",), "cuda": ("ours:triton", "ours:cuda")}
OTHERS = ("bitsandbytes", "peft", "dense", "dense+lora", "dequantize+lora")
PLAIN = ("reference", "compile(reference)")
PLAIN_RANK = 64
INT8, INT8_TOKENS = "ours:int8", 16
# The base matrix alone, without the two adapters: less work than the operator's.
BASE_ONLY = ("bitsandbytes", "dense", INT8)


class Case(NamedTuple):
    """K inputs, N outputs, two adapters of a rank, M tokens; written ``4096x11008/m16/r64``."""

    k: int
    n: int
    m: int
    rank: int

    @classmethod
    def parse(cls, name: str) -> Case:
        """Read what ``str`` has written."""
        shape, m, rank = name.split("/")
        k, n = shape.split("x")
        return cls(int(k), int(n), int(m[1:]), int(rank[1:]))

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


def rows(kind: str) -> Iterator[Row]:
    """Yield every mode, shape, rank and number of tokens; what shares a weight together."""
    for mode, (k, n), rank in itertools.product(QUICK_TOKENS, SHAPES, RANKS):
        for m in TOKENS[kind] if mode != "fwd-grad" else QUICK_TOKENS[mode]:
            case = Case(k, n, m, rank)
            for provider in names(mode, kind, case):
                quick = in_quick(mode, kind, case, provider)
                few = in_quick_gpu(mode, case, provider)
                yield Row(OP, mode, str(case), provider, quick=quick, quick_gpu=few)


def names(mode: str, kind: str, case: Case) -> list[str]:
    """List who is measured in a mode on a kind of device."""
    named = [*OURS[kind], *OTHERS]
    if mode != "fwd-grad":
        named += [f"{name}{FLOAT32_ADAPTERS}" for name in (*OURS[kind], "peft")]
    if mode == "fwd" and kind == "cpu" and case.m <= INT8_TOKENS:
        named.insert(1, INT8)
    return [*named, *PLAIN] if case.rank == PLAIN_RANK else named


def in_quick(mode: str, kind: str, case: Case, provider: str) -> bool:
    """Whether the quick selection has it."""
    if (case.k, case.n) not in QUICK_SHAPES[kind] or case.m not in QUICK_TOKENS[mode]:
        return False
    slow = provider == "reference" and case.m > INT8_TOKENS and kind == "cpu"
    # A compilation takes longer than all else of a case.
    compiled = provider == "compile(reference)" and (mode != "fwd" or case.m != 1)
    # A GPU's time is short; what its adapters' dtype costs is the larger selection's.
    wide = provider.endswith(FLOAT32_ADAPTERS) and kind == "cuda"
    return case.rank == RANKS[0] and not (slow or compiled or wide)


def in_quick_gpu(mode: str, case: Case, provider: str) -> bool:
    """Whether the few rows that a borrowed GPU has time for have it."""
    if (case.k, case.n) not in SHAPES[:3] or case.rank != RANKS[0] or mode == "fwd-grad":
        return False
    if mode == "fwd+bwd":
        return case.m == 2048 and provider in (*OURS["cuda"], "dequantize+lora")
    others = {1: ("bitsandbytes", "peft"), 4: (), 16: ("bitsandbytes", "peft"), 128: ("dense",)}
    return provider in (*OURS["cuda"], *others.get(case.m, ("dense", "dequantize+lora")))


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
