"""crayon_attention beside what it replaces: dense adds, rotary embedding and SDPA, and SDPA alone.

``released-scheme`` is the released model's way, restated from its formula: boolean-mask gathers of
a crayon per token, a host synchronisation to see whether there are image tokens, and attention
with the whole score matrix. ``sdpa-alone`` does less: no crayon and no rotation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Measure
from collavo_kernels import crayon_attention
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.ops.crayon_attention.registration import OPERATOR
from collavo_kernels.testing import relative_error


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


LOW, FULL = torch.bfloat16, torch.float32
SHAPES = {
    "demo/b32": Shape(32, 120, 4, 4, 32, 36, 6, FULL),
    "demo-padded/b32": Shape(32, 120, 4, 4, 32, 36, 6, FULL, padded=True),
    "7b/s320/g8/b1": Shape(1, 320, 32, 8, 128, 256, 12, LOW),
    "7b/s1325/g8/b1": Shape(1, 1325, 32, 8, 128, 1225, 12, LOW),
    "7b/s320/g8/b1/fp32": Shape(1, 320, 32, 8, 128, 256, 12, FULL),
    "7b/s320/g32/b8": Shape(8, 320, 32, 32, 128, 256, 12, LOW),
    "7b/s1325/g32/b1": Shape(1, 1325, 32, 32, 128, 1225, 12, LOW),
    "7b/s1325/g8/b1/fp32": Shape(1, 1325, 32, 8, 128, 1225, 12, FULL),
    "7b/s2048/g8/b1": Shape(1, 2048, 32, 8, 128, 1225, 12, LOW),
    "7b/s8192/g8/b1": Shape(1, 8192, 32, 8, 128, 1225, 12, LOW),
    "13b/s1325/g40/b1": Shape(1, 1325, 40, 40, 128, 576, 12, LOW),
}
QUICK = ("demo/b32", "demo-padded/b32", "7b/s320/g8/b1", "7b/s1325/g8/b1")
CASES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in SHAPES]
ONLY_GPU = ("7b/s8192/g8/b1",)


def make(shape: Shape, device: torch.device) -> AttentionInputs:
    """Random inputs: one image per sample after five tokens of text, right padding if asked for."""
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


def ours(inputs: AttentionInputs, backend: str) -> Tensor:
    options = dict(zip(inputs._fields[3:10], inputs[3:10], strict=True))
    return crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend=backend).out


def rotated(x: Tensor, inputs: AttentionInputs) -> Tensor:
    low, high = x.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    return x * inputs.cos[:, :, None] + turned * inputs.sin[:, :, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    mask = mask_of(inputs) if inputs.key_range is not None else None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


def mask_of(inputs: AttentionInputs) -> Tensor:
    token = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    causal = token[None, :] <= token[:, None]
    if inputs.key_range is None:
        return causal[None, None]
    return (causal & (token < inputs.key_range[:, 1:])[:, None, :])[:, None]


def eager(inputs: AttentionInputs) -> Tensor:
    """Add a dense crayon per token, rotate as transformers does, call SDPA."""
    rows = inputs.row_index
    assert rows is not None
    index, on = rows.clamp_min(0).long(), (rows >= 0)[:, :, None, None]
    q, k, v = (
        x if t is None else x + t[index] * on for x, t in zip(inputs[:3], inputs[5:8], strict=True)
    )
    return sdpa(rotated(q, inputs), rotated(k, inputs), v, inputs)


def released_scheme(inputs: AttentionInputs) -> Tensor:
    """Gathers by a boolean mask, a host synchronisation per projection, whole scores."""
    rows = inputs.row_index
    assert rows is not None
    on = rows >= 0
    parts = []
    for x, table in zip(inputs[:3], inputs[5:8], strict=True):
        y = x.clone()
        if int(on.sum()) > 0:
            y[on] += table[rows[on].long()]
        parts.append(y)
    q, k, v = rotated(parts[0], inputs), rotated(parts[1], inputs), parts[2]
    per_group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(per_group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask_of(inputs), torch.finfo(scores.dtype).min)
    return (scores.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2)


@functools.cache
def compiled_eager() -> Callable[[AttentionInputs], Tensor]:
    return torch.compile(eager)


PROVIDERS = {
    "ours": lambda inputs: ours(inputs, ""),
    "eager": eager,
    "eager-compiled": lambda inputs: compiled_eager()(inputs),
    "sdpa-alone": lambda inputs: sdpa(inputs.q, inputs.k, inputs.v, inputs),
    "released-scheme": released_scheme,
    "reference": lambda inputs: ours(inputs, "reference"),
}
ONLY_FULL = ("eager-compiled", "reference")


def exact(inputs: AttentionInputs) -> Tensor:
    """Return the result in float64 from the same inputs, on the CPU."""
    values = (
        x.detach().cpu().double()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x.cpu()
        if isinstance(x, Tensor)
        else x
        for x in inputs
    )
    with torch.no_grad():
        return ours(AttentionInputs(*values), "reference")


@functools.lru_cache(maxsize=1)
def exact_of(case: str, device: torch.device) -> Tensor:
    return exact(make(SHAPES[case], device))


def error_of(provider: str, found: Tensor, case: str, device: torch.device) -> float | None:
    """Relative error on the valid rows; bare attention computes something else."""
    if provider == "sdpa-alone":
        return None
    inputs = make(SHAPES[case], device)
    out = found.detach().cpu()
    if inputs.key_range is not None:
        valid = torch.arange(out.shape[1]) < inputs.key_range.cpu()[:, 1:]
        out = out * valid[:, :, None, None]
    return relative_error(out, exact_of(case, device))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    "provider",
    [n if n not in ONLY_FULL else pytest.param(n, marks=pytest.mark.full) for n in PROVIDERS],
)
def bench_crayon_attention(
    measure: Measure, device: torch.device, provider: str, mode: str, case: str
) -> None:
    if case in ONLY_GPU and device.type == "cpu":
        pytest.skip(f"{case}: takes minutes on a CPU")
    shape = SHAPES[case]
    inputs = make(shape, device)
    fn = PROVIDERS[provider]
    names = (
        ("q", "k", "v") if provider == "sdpa-alone" else inputs._fields[:3] + inputs._fields[5:8]
    )
    leaves = [getattr(inputs, name) for name in names]
    upstream = torch.randn_like(inputs.q)

    def forward() -> Tensor:
        with torch.no_grad():
            return fn(inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fn(inputs), leaves, upstream)

    moved = 2 * sum(x.numel() * x.element_size() for x in inputs[:3])
    products = 2 * shape.batch * shape.heads * shape.length**2 * shape.size
    backward = mode == "fwd+bwd"
    measure(
        both if backward else forward,
        op="crayon_attention",
        provider=provider,
        case=case,
        mode=mode,
        dtype=inputs.q.dtype,
        bytes=moved * (3 if backward else 1),
        flops=products * (3.5 if backward else 1),
        error=None if backward else error_of(provider, forward(), case, device),
        config={
            **{n: getattr(shape, n) for n in Shape._fields if n != "dtype"},
            "backend": OPERATOR.select(inputs, device.type).name,
            "threads": torch.get_num_threads(),
        },
    )
