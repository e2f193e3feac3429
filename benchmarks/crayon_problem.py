"""The benchmark of ``crayon_attention``: its shapes, its inputs, its work, its float64 results."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from collavo_kernels.ops.crayon_attention import OPERATOR, reference
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.testing import backward_arguments

LOW, FULL = torch.bfloat16, torch.float32
LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")


class Shape(NamedTuple):
    """A case's sizes; ``rows`` is per sample, ``dtype`` the CPU's (a GPU runs bfloat16)."""

    batch: int
    length: int
    heads: int
    groups: int
    size: int
    image_tokens: int
    rows: int
    dtype: torch.dtype
    padded: bool = False

    def bytes(self, mode: str, element_size: int) -> int:
        """Least bytes: q, k, v in, out, key, value out; with a backward, gradients and again."""
        per_token = (self.heads + 2 * self.groups) * self.size
        once = 2 * self.batch * self.length * per_token * element_size
        return 3 * once if mode == "fwd+bwd" else once

    def flops(self, mode: str) -> float:
        """Products of the visible half: two forward, five more backward."""
        one = self.batch * self.heads * self.length**2 * self.size
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


@functools.lru_cache(maxsize=1)
def make(case: str, device: torch.device) -> AttentionInputs:
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
    rows = torch.randint(shape.rows, (b, shape.image_tokens), generator=generator)
    row_index[:, 5 : 5 + shape.image_tokens] = (rows + torch.arange(b)[:, None] * shape.rows).int()
    ends = torch.randint(3 * s // 4, s + 1, (b,), generator=generator).int()
    ranges = torch.stack((torch.zeros_like(ends), ends), 1).to(device) if shape.padded else None
    t = b * shape.rows
    return AttentionInputs(
        normal(b, s, h, d),
        normal(b, s, g, d),
        normal(b, s, g, d),
        angle.cos().to(dtype),
        angle.sin().to(dtype),
        normal(t, h, d),
        normal(t, g, d),
        normal(t, g, d),
        row_index.to(device),
        ranges,
        True,
        None,
        None,
    )


def upstream(inputs: AttentionInputs) -> Tensor:
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
    grad = upstream(given)
    inputs = given if crayon else alone(given)
    groups = inputs.k.shape[2]
    parts = [
        _exact(_group(inputs, i, groups), grad.chunk(groups, 2)[i], gradients=gradients)
        for i in range(groups)
    ]
    # Heads are the last dimension but one everywhere.
    results = [
        torch.cat(each, -2) for each in zip(*(each.gradients for each in parts), strict=True)
    ]
    return Exact(torch.cat([each.out for each in parts], -2), tuple(results))


def _group(inputs: AttentionInputs, group: int, groups: int) -> AttentionInputs:
    """Return one key/value head with the query heads that read it, in float64."""
    part = {
        name: x.detach().chunk(groups, -2)[group].double()
        for name in LEAVES
        if (x := getattr(inputs, name)) is not None
    }
    wide = {n: x.double() for n in ("cos", "sin") if (x := getattr(inputs, n)) is not None}
    return inputs._replace(**part, **wide)


def _exact(inputs: AttentionInputs, grad: Tensor, *, gradients: bool) -> Exact:
    with torch.no_grad():
        found = reference.forward(inputs)
        if not gradients:
            return Exact(found.out)
        # No leaf asks for a gradient here, so all that are there are wanted.
        given = backward_arguments(OPERATOR, inputs, found, (grad.double(), None, None))
        gradients = reference.backward(*given)
    return Exact(found.out, tuple(each for each in gradients if each is not None))


def alone(inputs: AttentionInputs) -> AttentionInputs:
    """Return the same attention with neither crayon nor rotation."""
    nothing = ("cos", "sin", "crayon_q", "crayon_k", "crayon_v", "row_index")
    return inputs._replace(**dict.fromkeys(nothing))


def copies_of(inputs: AttentionInputs, many: int) -> list[AttentionInputs]:
    """Return the inputs, and copies of what gets gradients in memory of their own."""

    def copied() -> AttentionInputs:
        return inputs._replace(
            **{
                name: x.detach().clone().requires_grad_()
                for name in LEAVES
                if (x := getattr(inputs, name)) is not None
            }
        )

    return [inputs, *(copied() for _ in range(many - 1))]


def leaves(inputs: AttentionInputs) -> list[Tensor]:
    """Return what gets gradients, in order."""
    return [x for name in LEAVES if (x := getattr(inputs, name)) is not None]
