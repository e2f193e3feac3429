"""Who is measured for ``crayon_attention``: this package, what it replaces, and attention alone.

``eager`` is what a transformers user runs: dense adds, rotary embedding, SDPA. ``released-scheme``
is the released model's way, restated from its formula: boolean-mask gathers of a crayon per token,
a host synchronisation to see whether there are image tokens, and attention with the whole score
matrix. The ``...-alone`` do less: neither crayon nor rotation; ``ours-alone`` is this package's own
attention, so that ours over it is the price of the crayon.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import caches
from benchmarks.ops.crayon_attention_cases import (
    SHAPES,
    Inputs,
    Shape,
    alone,
    copies_of,
    exact,
    leaves,
    make,
    upstream,
)
from benchmarks.registry import Call, Row, Unavailable
from collavo_kernels import crayon_attention
from collavo_kernels.testing import relative_error

Attention = Callable[[Inputs], Tensor]
LIBRARIES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# The others may refuse a case that a library or a backend does not have.
ALWAYS = ("ours:cpu", "ours-alone:cpu", "ours:triton", "eager", "sdpa-alone")


def is_alone(provider: str) -> bool:
    """Whether it leaves crayon and rotation out."""
    return provider.split(":")[0].endswith("-alone")


def ours(inputs: Inputs, backend: str) -> Tensor:
    """Call the operator."""
    return crayon_attention(**inputs._asdict(), backend=backend).out


def ours_alone(inputs: Inputs, backend: str) -> Tensor:
    """Call the operator with neither crayon nor rotation."""
    return ours(alone(inputs), backend)


def library(inputs: Inputs) -> Tensor:
    """SDPA as PyTorch chooses it."""
    return sdpa(inputs.q, inputs.k, inputs.v, inputs)


def one_library(inputs: Inputs, which: str) -> Tensor:
    """SDPA by one of its libraries."""
    with sdpa_kernel(LIBRARIES[which]):
        return sdpa(inputs.q, inputs.k, inputs.v, inputs)


def rotate(x: Tensor, inputs: Inputs) -> Tensor:
    """Rotate as transformers does."""
    if inputs.cos is None or inputs.sin is None:
        return x
    low, high = x.chunk(2, -1)
    swapped = torch.cat((-high, low), -1)
    return x * inputs.cos[:, :, None] + swapped * inputs.sin[:, :, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """Call PyTorch's attention on ``[B, S, heads, D]``."""
    mask = mask_of(inputs) if inputs.key_range is not None else None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def mask_of(inputs: Inputs) -> Tensor:
    """Return bool ``[B or 1, 1, S, S]``: causal, within the key range."""
    token = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    causal = token[None, :] <= token[:, None]
    if inputs.key_range is None:
        return causal[None, None]
    return (causal & (token < inputs.key_range[:, 1:])[:, None, :])[:, None]


def _rows(inputs: Inputs) -> Tensor:
    if inputs.row_index is None:
        raise ValueError("row_index: expected a tensor, got None")
    return inputs.row_index


def eager(inputs: Inputs) -> Tensor:
    """Add a dense crayon per token, rotate as transformers does, call SDPA."""
    rows = _rows(inputs)
    index, on = rows.clamp_min(0).long(), (rows >= 0)[:, :, None, None]
    q, k, v = (
        x if t is None else x + t[index] * on for x, t in zip(inputs[:3], inputs[3:6], strict=True)
    )
    return sdpa(rotate(q, inputs), rotate(k, inputs), v, inputs)


@functools.cache
def compiled_eager() -> Attention:
    """Return ``eager`` through torch.compile."""
    return torch.compile(eager)


def released_scheme(inputs: Inputs) -> Tensor:
    """Gathers by a boolean mask, a host synchronisation per projection, whole scores."""
    rows = _rows(inputs)
    on = rows >= 0
    parts = []
    for x, table in zip(inputs[:3], inputs[3:6], strict=True):
        y = x.clone()
        if int(on.sum()) > 0:
            y[on] += table[rows[on].long()]
        parts.append(y)
    q, k, v = rotate(parts[0], inputs), rotate(parts[1], inputs), parts[2]
    queries_per_key = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(queries_per_key, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask_of(inputs), torch.finfo(scores.dtype).min)
    return (scores.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2)


PROVIDERS: dict[str, Attention] = {
    **{
        f"ours:{each}": functools.partial(ours, backend=each)
        for each in ("cpu", "triton", "library")
    },
    **{
        f"ours-alone:{each}": functools.partial(ours_alone, backend=each)
        for each in ("cpu", "triton", "library")
    },
    "eager": eager,
    "compile(eager)": lambda inputs: compiled_eager()(inputs),
    "sdpa-alone": library,
    **{f"sdpa-alone:{each}": functools.partial(one_library, which=each) for each in LIBRARIES},
    "released-scheme": released_scheme,
    "reference": functools.partial(ours, backend="reference"),
}


def error_of(
    found: Tensor | tuple[Tensor, ...], case: str, provider: str, device: torch.device
) -> float:
    """Return the error on the valid rows against float64; of gradients, the worst."""
    backward = not isinstance(found, Tensor)
    expected = exact(case, device, crayon=not is_alone(provider), gradients=backward)
    if not isinstance(found, Tensor):
        pairs = zip(found, expected.gradients, strict=True)
        return max(relative_error(f, e) for f, e in pairs)
    out = found.detach()
    ranges = make(case, device).key_range
    if ranges is not None:
        valid = torch.arange(out.shape[1], device=device) < ranges[:, 1:]
        out = out * valid[:, :, None, None]
    return relative_error(out, expected.out)


def call_of(
    mode: str, case: str, provider: str, device: torch.device
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """Return the forward, or forward and backward; on a GPU the next copy of the inputs is due."""
    inputs, attend = make(case, device), PROVIDERS[provider]
    grad = upstream(inputs)
    size = SHAPES[case].bytes("fwd", inputs.q.element_size()) // 2
    many = caches.copies_past_cache(size, device) if device.type == "cuda" else 1
    following = itertools.cycle(copies_of(inputs, many))

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(next(following))

    def both() -> tuple[Tensor, ...]:
        given = next(following)
        wanted = leaves(alone(given) if is_alone(provider) else given)
        return torch.autograd.grad(attend(given), wanted, grad)

    return both if mode == "fwd+bwd" else forward


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call, which has run once."""
    mode, case, provider = row.mode, row.case, row.provider
    shape, inputs = SHAPES[case], make(case, device)
    call = call_of(mode, case, provider, device)
    try:
        call()
    except (RuntimeError, ValueError) as reason:
        if provider in ALWAYS:
            raise
        raise Unavailable(str(reason).splitlines()[0]) from reason
    sizes: dict[str, object] = {n: getattr(shape, n) for n in Shape._fields if n != "dtype"}
    return Call(
        call,
        dtype=inputs.q.dtype,
        bytes=shape.bytes(mode, inputs.q.element_size()),
        flops=shape.flops(mode),
        error=lambda: error_of(call(), case, provider, device),
        config={**sizes, "table_rows": 0 if inputs.crayon_q is None else len(inputs.crayon_q)},
        before=caches.OtherWork() if mode.endswith(caches.COLD) else None,
    )
