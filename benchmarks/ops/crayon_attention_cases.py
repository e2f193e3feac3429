"""What ``crayon_attention`` is measured on: shapes, inputs, work and float64 results."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.caches import COLD
from benchmarks.registry import Row
from collavo_kernels import crayon_attention

OP = "crayon_attention"
LOW, FULL = torch.bfloat16, torch.float32
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")


class Inputs(NamedTuple):
    """The operator's arguments by name, and what every provider is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    crayon_q: Tensor | None
    crayon_k: Tensor | None
    crayon_v: Tensor | None
    row_index: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    key_range: Tensor | None


class Shape(NamedTuple):
    """A case's sizes; ``rows`` is per sample, ``dtype`` the CPU's (a GPU runs bfloat16)."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    image_tokens: int
    rows: int
    dtype: torch.dtype
    padded: bool = False

    def bytes(self, mode: str, element_size: int) -> int:
        """Least bytes: q, k, v in, out, key, value out; with a backward, gradients and again."""
        per_token = (self.heads + 2 * self.kv_heads) * self.head_dim
        once = 2 * self.batch * self.length * per_token * element_size
        return 3 * once if mode == "fwd+bwd" else once

    def flops(self, mode: str) -> float:
        """Products of the visible half: two forward, five more backward."""
        one = self.batch * self.heads * self.length**2 * self.head_dim
        return 7 * one if mode == "fwd+bwd" else 2 * one


SHAPES = {
    "demo/b32": Shape(32, 120, 4, 4, 32, 36, 6, FULL),
    "demo-padded/b32": Shape(32, 120, 4, 4, 32, 36, 6, FULL, padded=True),
    "7b/s320/g8/b1": Shape(1, 320, 32, 8, 128, 256, 12, LOW),
    "7b/s1325/g8/b1": Shape(1, 1325, 32, 8, 128, 1225, 12, LOW),
    "7b/s320/g8/b1/fp32": Shape(1, 320, 32, 8, 128, 256, 12, FULL),
    "7b/s1325/g8/b1/fp32": Shape(1, 1325, 32, 8, 128, 1225, 12, FULL),
    "7b/s320/g32/b8": Shape(8, 320, 32, 32, 128, 256, 12, LOW),
    "7b/s1325/g8/b8": Shape(8, 1325, 32, 8, 128, 1225, 12, LOW),
    "7b/s1325/g32/b1": Shape(1, 1325, 32, 32, 128, 1225, 12, LOW),
    "7b/s2048/g8/b1": Shape(1, 2048, 32, 8, 128, 1225, 12, LOW),
    "7b/s2048/g32/b1": Shape(1, 2048, 32, 32, 128, 1225, 12, LOW),
    "7b/s8192/g8/b1": Shape(1, 8192, 32, 8, 128, 1225, 12, LOW),
    "d64/s1325/g8/b1": Shape(1, 1325, 32, 8, 64, 1225, 12, LOW),
    "d80/s1325/g8/b1": Shape(1, 1325, 32, 8, 80, 1225, 12, LOW),
    "d96/s1325/g8/b1": Shape(1, 1325, 32, 8, 96, 1225, 12, LOW),
    "d256/s1325/g8/b1": Shape(1, 1325, 16, 8, 256, 1225, 12, LOW),
    "13b/s1325/g40/b1": Shape(1, 1325, 40, 40, 128, 576, 12, LOW),
    "13b/s2048/g40/b1": Shape(1, 2048, 40, 40, 128, 576, 12, LOW),
}
ONLY_GPU = ("7b/s8192/g8/b1",)


QUICK = {
    "cpu": ("demo/b32", "demo-padded/b32", "7b/s320/g8/b1", "7b/s1325/g8/b1"),
    "cuda": ("7b/s1325/g8/b1", "7b/s1325/g32/b1", "7b/s2048/g8/b1", "7b/s8192/g8/b1"),
}
# They take longest and say least; the small case shows them.
SLOW = ("compile(eager)", "released-scheme", "reference")
SLOW_CASE = "7b/s320/g8/b1"
MODES = ("fwd", "fwd+bwd")
# Enough to see that a call of this length does not depend on what was there before it.
COLD_MODE, COLD_CASE, COLD_PROVIDERS = "fwd" + COLD, "7b/s1325/g8/b1", ("ours:cpu", "eager")
OURS = {"cpu": ("cpu",), "cuda": ("triton", "library")}
LIBRARIES = ("flash", "cudnn")


def rows(kind: str) -> Iterator[Row]:
    """Yield every case and mode, and on a CPU one with other work between the calls."""
    cold = [(COLD_CASE, COLD_MODE)] if kind == "cpu" else []
    for case, mode in [*itertools.product(SHAPES, MODES), *cold]:
        if case in ONLY_GPU and kind == "cpu":
            continue
        for provider in COLD_PROVIDERS if mode == COLD_MODE else names(kind):
            quick = in_quick(kind, case, provider)
            few = in_quick_gpu(mode, case, provider)
            yield Row(OP, mode, case, provider, quick=quick, quick_gpu=few)


def names(kind: str) -> list[str]:
    """List the providers on a kind of device; ours first."""
    found = [f"{what}:{name}" for what in ("ours", "ours-alone") for name in OURS[kind]]
    found += ["eager", "compile(eager)", "sdpa-alone"]
    if kind == "cuda":
        found += [f"sdpa-alone:{name}" for name in LIBRARIES]
    return [*found, "released-scheme", "reference"]


def in_quick(kind: str, case: str, provider: str) -> bool:
    """Whether the quick selection has it."""
    if provider in SLOW and kind == "cpu":
        return case == SLOW_CASE and provider != "reference"
    return case in QUICK[kind] and provider != "reference"


def in_quick_gpu(mode: str, case: str, provider: str) -> bool:
    """Whether the few rows that a borrowed GPU has time for have it."""
    if case not in QUICK["cuda"] or provider in (*SLOW, "sdpa-alone", "ours-alone:library"):
        return False
    return mode == "fwd" or not provider.startswith("ours-alone")


@functools.lru_cache(maxsize=1)
def make(case: str, device: torch.device) -> Inputs:
    """Random inputs: one image per sample after five tokens of text, right padding if asked for."""
    shape = SHAPES[case]
    generator = torch.Generator().manual_seed(0)
    b, s, h, g, d = shape[:5]
    dtype = LOW if device.type == "cuda" else shape.dtype

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype).requires_grad_()

    angle = torch.arange(s)[None, :, None] * 1e4 ** (-torch.arange(0, d, 2) / d)
    angle = torch.cat((angle, angle), -1).to(device)
    row_index = torch.full((b, s), -1, dtype=torch.int32)
    drawn = torch.randint(shape.rows, (b, shape.image_tokens), generator=generator)
    row_index[:, 5 : 5 + shape.image_tokens] = (drawn + torch.arange(b)[:, None] * shape.rows).int()
    ends = torch.randint(3 * s // 4, s + 1, (b,), generator=generator).int()
    ranges = torch.stack((torch.zeros_like(ends), ends), 1).to(device) if shape.padded else None
    t = b * shape.rows
    return Inputs(
        q=normal(b, s, h, d),
        k=normal(b, s, g, d),
        v=normal(b, s, g, d),
        crayon_q=normal(t, h, d),
        crayon_k=normal(t, g, d),
        crayon_v=normal(t, g, d),
        row_index=row_index.to(device),
        cos=angle.cos().to(dtype),
        sin=angle.sin().to(dtype),
        key_range=ranges,
    )


def upstream(inputs: Inputs) -> Tensor:
    """Return the gradient of the output; padding, whose rows are zeros or anything, gets none."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(inputs.q.shape, generator=generator).to(inputs.q.device, inputs.q.dtype)
    if inputs.key_range is None:
        return grad
    token = torch.arange(inputs.q.shape[1], device=grad.device)
    valid = token < inputs.key_range[:, 1:]
    return grad * valid[:, :, None, None]


class Exact(NamedTuple):
    """Float64 results: out ``[B, S, H, D]``, and the gradients of q, k, v and the tables."""

    out: Tensor
    gradients: tuple[Tensor, ...] = ()


@functools.lru_cache(maxsize=2)
def exact(case: str, device: torch.device, *, crayon: bool, gradients: bool) -> Exact:
    """Return the results from the same inputs in float64, with crayon or without.

    Key/value heads come one after the other: all whole score matrices would not fit a GPU.
    """
    given = make(case, device)
    inputs = given if crayon else alone(given)
    kv_heads = inputs.k.shape[2]
    grads = upstream(given).chunk(kv_heads, 2)
    parts = [_exact(_head(inputs, i, gradients), grads[i], gradients) for i in range(kv_heads)]
    # Heads are the last dimension but one everywhere.
    results = [
        torch.cat(each, -2) for each in zip(*(each.gradients for each in parts), strict=True)
    ]
    return Exact(torch.cat([each.out for each in parts], -2), tuple(results))


def _head(inputs: Inputs, head: int, gradients: bool) -> Inputs:
    """Return one key/value head with the query heads that read it, in float64."""
    kv_heads = inputs.k.shape[2]
    part = {
        name: x.detach().chunk(kv_heads, -2)[head].double().requires_grad_(gradients)
        for name in LEAVES
        if (x := getattr(inputs, name)) is not None
    }
    wide = {n: x.double() for n in ("cos", "sin") if (x := getattr(inputs, n)) is not None}
    return inputs._replace(**part, **wide)


def _exact(inputs: Inputs, grad: Tensor, gradients: bool) -> Exact:
    with torch.set_grad_enabled(gradients):
        out = crayon_attention(**inputs._asdict(), backend="reference").out
        results = torch.autograd.grad(out, leaves(inputs), grad.double()) if gradients else ()
    return Exact(out.detach(), results)


def alone(inputs: Inputs) -> Inputs:
    """Return the same attention with neither crayon nor rotation."""
    nothing = ("cos", "sin", "crayon_q", "crayon_k", "crayon_v", "row_index")
    return inputs._replace(**dict.fromkeys(nothing))


def copies_of(inputs: Inputs, many: int) -> list[Inputs]:
    """Return the inputs, and copies of what gets gradients in memory of their own."""

    def copied() -> Inputs:
        return inputs._replace(
            **{
                name: x.detach().clone().requires_grad_()
                for name in LEAVES
                if (x := getattr(inputs, name)) is not None
            }
        )

    return [inputs, *(copied() for _ in range(many - 1))]


def leaves(inputs: Inputs) -> list[Tensor]:
    """Return what gets gradients, in order."""
    return [x for name in LEAVES if (x := getattr(inputs, name)) is not None]
