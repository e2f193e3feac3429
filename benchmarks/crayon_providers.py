"""Who is measured for ``crayon_attention``: this package, what it replaces, and attention alone.

``eager`` is what a transformers user runs: dense adds, rotary embedding, SDPA. ``released-scheme``
is the released model's way, restated from its formula: boolean-mask gathers of a crayon per token,
a host synchronisation to see whether there are image tokens, and attention with the whole score
matrix. The ``...-alone`` do less: neither crayon nor rotation; ``ours-alone`` is this package's own
attention, so that ours over it is the price of the crayon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.crayon_problem import alone
from collavo_kernels import crayon_attention
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs

Attention = Callable[[AttentionInputs], Tensor]
OURS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
LIBRARIES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def names(kind: str) -> list[str]:
    """List the providers on a kind of device; ours first."""
    found = [f"{what}:{name}" for what in ("ours", "ours-alone") for name in OURS[kind]]
    found += ["eager", "compile(eager)", "sdpa-alone"]
    if kind == "cuda":
        found += [f"sdpa-alone:{name}" for name in LIBRARIES]
    return [*found, "released-scheme", "reference"]


def is_alone(provider: str) -> bool:
    """Whether it leaves crayon and rotation out."""
    return provider.split(":")[0].endswith("-alone")


def attention(provider: str) -> Attention:
    """Return the provider's call."""
    what, _, which = provider.partition(":")
    if what == "ours":
        return functools.partial(ours, backend=which)
    if what == "ours-alone":
        return lambda inputs: ours(alone(inputs), backend=which)
    if what == "sdpa-alone":
        return functools.partial(library, which=which)
    calls: dict[str, Attention] = {
        "eager": eager,
        "compile(eager)": lambda inputs: compiled_eager()(inputs),
        "released-scheme": released_scheme,
        "reference": functools.partial(ours, backend="reference"),
    }
    return calls[provider]


def ours(inputs: AttentionInputs, backend: str) -> Tensor:
    """Call the operator."""
    options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    return crayon_attention(inputs.q, inputs.k, inputs.v, **options, backend=backend).out


def library(inputs: AttentionInputs, which: str) -> Tensor:
    """SDPA as PyTorch chooses it, or by one of its libraries."""
    if not which:
        return sdpa(inputs.q, inputs.k, inputs.v, inputs)
    with sdpa_kernel(LIBRARIES[which]):
        return sdpa(inputs.q, inputs.k, inputs.v, inputs)


def rotated(x: Tensor, inputs: AttentionInputs) -> Tensor:
    """Rotate as transformers does."""
    if inputs.cos is None or inputs.sin is None:
        return x
    low, high = x.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    return x * inputs.cos[:, :, None] + turned * inputs.sin[:, :, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    """Call PyTorch's attention on ``[B, S, heads, D]``."""
    mask = mask_of(inputs) if inputs.key_range is not None else None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def mask_of(inputs: AttentionInputs) -> Tensor:
    """Return bool ``[B or 1, 1, S, S]``: causal, within the key range."""
    token = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    causal = token[None, :] <= token[:, None]
    if inputs.key_range is None:
        return causal[None, None]
    return (causal & (token < inputs.key_range[:, 1:])[:, None, :])[:, None]


def _rows(inputs: AttentionInputs) -> Tensor:
    if inputs.row_index is None:
        raise ValueError("row_index: expected a tensor, got None")
    return inputs.row_index


def eager(inputs: AttentionInputs) -> Tensor:
    """Add a dense crayon per token, rotate as transformers does, call SDPA."""
    rows = _rows(inputs)
    index, on = rows.clamp_min(0).long(), (rows >= 0)[:, :, None, None]
    q, k, v = (
        x if t is None else x + t[index] * on for x, t in zip(inputs[:3], inputs[5:8], strict=True)
    )
    return sdpa(rotated(q, inputs), rotated(k, inputs), v, inputs)


@functools.cache
def compiled_eager() -> Attention:
    """Return ``eager`` through torch.compile."""
    return torch.compile(eager)


def released_scheme(inputs: AttentionInputs) -> Tensor:
    """Gathers by a boolean mask, a host synchronisation per projection, whole scores."""
    rows = _rows(inputs)
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
