"""Attention with the Crayon Prompt inside: add a table row to q, k and v, rotate, attend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.ops.crayon_attention.reference import checked_rows, prepared, with_rows
from collavo_kernels.ops.crayon_attention.registration import OPERATOR
from collavo_kernels.ops.crayon_attention.validation import expect_tensors, validate

__all__ = ["OPERATOR", "CrayonAttentionOutput", "crayon_attention", "prepare"]


class CrayonAttentionOutput(NamedTuple):
    """What ``crayon_attention`` returns.

    Attributes:
        out: ``[B, S, H, D]``, q's dtype: the attention's output, zeros outside ``key_range``.
        key: ``[B, S, G, D]``, k's dtype: crayon added and rotated, ready for a key/value cache; k
            itself where neither is asked for.
        value: ``[B, S, G, D]``, v's dtype: crayon added; v itself where no ``crayon_v`` is given.
    """

    out: Tensor
    key: Tensor
    value: Tensor


def crayon_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    crayon_q: Tensor | None = None,
    crayon_k: Tensor | None = None,
    crayon_v: Tensor | None = None,
    row_index: Tensor | None = None,
    key_range: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "",
) -> CrayonAttentionOutput:
    r"""Add each image token's crayon row to its q, k and v, rotate q and k, and attend.

    With ``r = row_index[b, i]`` and R the rotation of position i (rotate-half convention):
    ``q' = R (q + crayon_q[r])``, ``k' = R (k + crayon_k[r])``, ``v' = v + crayon_v[r]``, and
    ``out_i = sum_j softmax_j(scale q'_i . k'_j) v'_j`` over the keys j that i may see. Tokens with
    row -1 get nothing added. Query i sees key j if both lie in the sample's key range, ``j <= i``
    (causal) and ``|i - j| < window``. Query rows outside the key range give zeros, whatever
    they hold. Sums are made in float32.

    Args:
        q: ``[B, S, H, D]`` float32 / bfloat16 / float16 (float64: reference only), before the
            rotation; D even.
        k: ``[B, S, G, D]``, q's dtype; H is a multiple of G.
        v: ``[B, S, G, D]``, q's dtype.
        cos: ``[B or 1, S, D]`` any float dtype: cosines of the rotation angles (radians), as
            Hugging Face's rotary embedding returns them; no gradient. None, with sin: q and k are
            not rotated (they are already, or the model has no rotary embedding).
        sin: ``[B or 1, S, D]``, cos's dtype: the sines; no gradient.
        crayon_q: ``[T, H, D]``, q's dtype: the query projection of every crayon row, without bias.
        crayon_k: ``[T, G, D]``, q's dtype: the same of the key projection.
        crayon_v: ``[T, G, D]``, q's dtype: the same of the value projection.
        row_index: ``[B, S]`` int32: each token's row in the tables, -1 = not an image token.
        key_range: ``[B, 2]`` int32: first and one-past-last valid token of each sample (left or
            right padding); None = all are valid. Equal ends make a sample empty.
        causal: Whether a query sees only itself and what comes before it.
        window: Length of the sliding window in tokens, at least 1; None = unlimited.
        scale: Factor on the scores; None = ``D ** -0.5``.
        backend: Ask for one backend by name; "" = the first that serves.

    Returns:
        ``out``, and ``key`` and ``value`` as a cache stores them. All three are differentiable.

    Raises:
        TypeError: if an argument is no tensor or has another dtype.
        ValueError: if a shape, device or option is wrong; on the CPU also if a row index lies
            outside the tables or a key range is inverted or leaves the sequence. On a GPU such a
            row counts as -1, such a range is clipped, and ``collavo_kernels.check()`` reports it.

    Source: the Crayon Prompt is added at every attention layer, CoLLaVO (arXiv 2402.11248),
    section 3.

    Example:
        >>> import torch
        >>> from collavo_kernels import crayon_attention
        >>> q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
        >>> angle = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
        >>> rows = torch.tensor([[-1, 0, 0, 1, 1, -1]], dtype=torch.int32)
        >>> result = crayon_attention(
        ...     q, k, v, cos=angle.cos(), sin=angle.sin(),
        ...     crayon_k=torch.randn(2, 2, 8), row_index=rows,
        ... )
        >>> tuple(result.out.shape), tuple(result.key.shape), result.value is v
        ((1, 6, 4, 8), (1, 6, 2, 8), True)
    """
    inputs = AttentionInputs(
        q=q,
        k=k,
        v=v,
        cos=cos,
        sin=sin,
        crayon_q=crayon_q,
        crayon_k=crayon_k,
        crayon_v=crayon_v,
        row_index=row_index,
        key_range=key_range,
        causal=causal,
        window=window,
        scale=scale,
    )
    expect_tensors(inputs)
    result = OPERATOR(inputs, backend)
    return CrayonAttentionOutput(
        out=result.out,
        # Not the bundle's properties, which torch 2.5's compiler does not know.
        key=k if cos is None and crayon_k is None else result.key,
        value=v if crayon_v is None else result.value,
    )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    row_index: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    crayon_q: Tensor | None = None,
    crayon_k: Tensor | None = None,
    crayon_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with the crayon added and q, k rotated, in plain differentiable PyTorch.

    It is the first half of ``crayon_attention``, for calls that go on with a filled key/value
    cache and PyTorch's own attention. The formula and the rounding are the operator's.

    Args:
        q: ``[B, S, H, D]`` float32 / bfloat16 / float16 / float64.
        k: ``[B, S, G, D]``, q's dtype.
        v: ``[B, S, G, D]``, q's dtype.
        cos: ``[B or 1, S, D]`` any float dtype; None, with sin: no rotation.
        sin: ``[B or 1, S, D]``, cos's dtype.
        crayon_q: ``[T, H, D]``, q's dtype.
        crayon_k: ``[T, G, D]``, q's dtype.
        crayon_v: ``[T, G, D]``, q's dtype.
        row_index: ``[B, S]`` int32, -1 = not an image token.

    Returns:
        q, k and v of the same shapes and dtypes; v itself where no ``crayon_v`` is given.

    Raises:
        TypeError: if an argument is no tensor or has another dtype.
        ValueError: if a shape or device is wrong; on the CPU also if a row index lies outside the
            tables (elsewhere it counts as -1).

    Example:
        >>> import torch
        >>> from collavo_kernels.ops.crayon_attention import prepare
        >>> q = k = v = torch.ones(1, 1, 1, 2)
        >>> zero = torch.zeros(1, 1, 2)
        >>> prepare(q, k, v, cos=zero, sin=zero + 1)[0].flatten().tolist()
        [-1.0, 1.0]
    """
    tables = (crayon_q, crayon_k, crayon_v)
    inputs = AttentionInputs(q, k, v, cos, sin, *tables, row_index, key_range=None)
    validate(inputs)
    rows = checked_rows(inputs)
    query = prepared(q, crayon_q, rows, cos, sin)
    key = prepared(k, crayon_k, rows, cos, sin)
    return query, key, with_rows(v, crayon_v, rows)
