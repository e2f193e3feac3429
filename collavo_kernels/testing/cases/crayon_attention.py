"""Cases of ``crayon_attention`` with the reason for each, and the plain PyTorch it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collavo_kernels._sdpa import grouped_attention
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs


@dataclass(frozen=True)
class AttentionCase:
    """One set of shapes and options.

    Attributes:
        name: The test's id.
        reason: What can go wrong here and nowhere else.
        batch: B.
        length: S.
        heads: H.
        kv_heads: G.
        head_dim: D.
        rows: T; the last row is never used where there are two or more.
        images: ``(start, stop)`` token spans that belong to images.
        ranges: Key range of each sample, or None.
        causal: As in the operator.
        window: As in the operator.
        scale: As in the operator.
        tables: Which of q, k and v get a table.
        own_angles: Whether each sample has its own angles.
        rotated: Whether q and k are rotated; False leaves cos and sin out.
    """

    name: str
    reason: str
    batch: int = 2
    length: int = 37
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rows: int = 4
    images: tuple[tuple[int, int], ...] = ((3, 20),)
    ranges: tuple[tuple[int, int], ...] | None = None
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    tables: str = "qkv"
    own_angles: bool = False
    rotated: bool = True

    def make(
        self, dtype: torch.dtype, *, seed: int = 0, gradients: bool = False
    ) -> AttentionInputs:
        """Return inputs of unit variance on the CPU.

        Args:
            dtype: Of q, k, v, the tables and the angles.
            seed: Of the generator; the same values come in every dtype, rounded.
            gradients: Whether q, k, v and the tables require gradients.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            return values.requires_grad_(gradients)

        b, s, d = self.batch, self.length, self.head_dim
        q, k, v = (normal(b, s, n, d) for n in (self.heads, self.kv_heads, self.kv_heads))
        crayon_q, crayon_k, crayon_v = (
            normal(self.rows, n, d) if name in self.tables else None
            for name, n in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        angles = torch.rand(b if self.own_angles else 1, s, d // 2, generator=generator)
        angles = torch.cat((angles, angles), -1).double() * 6.0
        return AttentionInputs(
            q,
            k,
            v,
            angles.cos().to(dtype) if self.rotated else None,
            angles.sin().to(dtype) if self.rotated else None,
            crayon_q,
            crayon_k,
            crayon_v,
            self._row_index(generator) if self.tables else None,
            None if self.ranges is None else torch.tensor(self.ranges, dtype=torch.int32),
            self.causal,
            self.window,
            self.scale,
        )

    def _row_index(self, generator: torch.Generator) -> Tensor:
        index = torch.full((self.batch, self.length), -1, dtype=torch.int32)
        used = max(1, self.rows - 1)
        for start, stop in self.images if self.rows else ():
            drawn = torch.randint(0, used, (self.batch, stop - start), generator=generator)
            index[:, start:stop] = drawn.int()
        return index


CASES = (
    AttentionCase("plain", "odd S, grouped heads, all tables, one row unused", head_dim=64),
    AttentionCase("head_dim_2", "the smallest head dim: halves of one element", head_dim=2),
    AttentionCase("head_dim_6", "halves that are no multiple of any vector", head_dim=6),
    AttentionCase(
        "head_dim_80", "halves of 40: a register and a tail", head_dim=80, heads=2, kv_heads=1
    ),
    AttentionCase("head_dim_96", "no power of two", head_dim=96, heads=2, kv_heads=1),
    AttentionCase("head_dim_128", "LLaMA's", head_dim=128, heads=2, kv_heads=2),
    AttentionCase("head_dim_256", "the largest", head_dim=256, heads=2, kv_heads=1, batch=1),
    AttentionCase("one_kv_head", "multi-query: one key head for all", kv_heads=1),
    AttentionCase("kv_head_per_head", "no grouping", kv_heads=4),
    AttentionCase("three_heads_per_kv_head", "three query heads per key head", heads=6, kv_heads=2),
    AttentionCase("not_causal", "every key is visible", causal=False),
    AttentionCase("long", "several blocks of queries and keys", length=197, batch=1),
    AttentionCase("window", "a band narrower than a block", window=5),
    AttentionCase("window_long", "a band over several blocks", length=197, window=70, batch=1),
    AttentionCase("window_one", "each token sees itself alone", window=1),
    AttentionCase("window_wide", "a window longer than the sequence hides nothing", window=99),
    AttentionCase("window_not_causal", "a band to both sides", window=4, causal=False),
    AttentionCase("left_padding", "generation's padding", ranges=((6, 37), (0, 37))),
    AttentionCase("right_padding", "training's padding", ranges=((0, 37), (0, 22))),
    AttentionCase("empty_range", "a sample without a valid token", ranges=((5, 5), (2, 30))),
    AttentionCase("one_valid", "a single key", ranges=((36, 37), (0, 1))),
    AttentionCase(
        "padding_not_causal", "the range masks alone", ranges=((6, 37), (0, 9)), causal=False
    ),
    AttentionCase("padding_window", "range and band together", ranges=((6, 37), (0, 31)), window=7),
    AttentionCase(
        "padded_image", "rows outside the range still get their row", ranges=((9, 37), (0, 11))
    ),
    AttentionCase("no_image", "tables without a token that uses them", images=()),
    AttentionCase("two_images", "two spans with text between", images=((0, 9), (15, 37)), rows=6),
    AttentionCase("one_row", "every token adds to the same row", rows=1, images=((0, 37),)),
    AttentionCase("no_rows", "tables without a row", rows=0),
    AttentionCase("no_tables", "plain attention with rotation", tables=""),
    AttentionCase("key_table", "only k has a table; value is v itself", tables="k"),
    AttentionCase("query_value_tables", "k has none", tables="qv"),
    AttentionCase(
        "own_angles", "positions differ by sample, as with left padding", own_angles=True
    ),
    AttentionCase("no_rotation", "q and k come rotated, or are never", rotated=False),
    AttentionCase("attention_alone", "nothing but attention", rotated=False, tables=""),
    AttentionCase("negative_scale", "the largest score comes of the smallest product", scale=-0.3),
    AttentionCase("scale", "a scale that is not the default", scale=0.7),
    AttentionCase("one_token", "a sequence of one", length=1, images=((0, 1),)),
    AttentionCase("no_tokens", "S = 0", length=0, images=()),
    AttentionCase("no_samples", "B = 0", batch=0),
)


_LONG = AttentionCase(
    "causal",
    "a picture's 1225 tokens and text: many blocks of every kernel, whole ones and cut ones",
    batch=1,
    length=1325,
    heads=8,
    kv_heads=2,
    head_dim=128,
    rows=40,
    images=((20, 1245),),
)
# Too long for Triton's interpreter.
LONG_CASES = (
    _LONG,
    replace(_LONG, name="padded", ranges=((130, 1300),)),
    replace(_LONG, name="window", window=300),
    replace(_LONG, name="both_directions", causal=False),
    replace(_LONG, name="head_dim_64", head_dim=64),
)


def eager(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, key and value as the usual PyTorch computes them: add, rotate, SDPA.

    It adds a dense crayon, one vector per token, in the inputs' own dtype; its error is the measure
    for every backend, and in float64 it is an oracle that shares no code with the reference.
    """
    rows = inputs.row_index

    def add(x: Tensor, table: Tensor | None) -> Tensor:
        if table is None or rows is None or table.shape[0] == 0:
            return x
        dense = table[rows.clamp_min(0).long()] * (rows >= 0)[:, :, None, None]
        return x + dense

    def rotate(x: Tensor) -> Tensor:
        if inputs.cos is None or inputs.sin is None:
            return x
        low, high = x.chunk(2, -1)
        rotated = torch.cat((-high, low), -1)
        return x * inputs.cos[:, :, None] + rotated * inputs.sin[:, :, None]

    query = rotate(add(inputs.q, inputs.crayon_q))
    key = rotate(add(inputs.k, inputs.crayon_k))
    value = add(inputs.v, inputs.crayon_v)
    visible, valid = visible_keys(inputs)
    out = grouped_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=visible[:, None],
        scale=inputs.scale,
    )
    return out.transpose(1, 2) * valid[:, :, None, None], key, value


def visible_keys(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return bool ``[B, S, S]`` (padding sees itself, which avoids NaN) and ``[B, S]``: valid."""
    batch, length = inputs.q.shape[:2]
    token = torch.arange(length, device=inputs.q.device)
    i, j = token[:, None], token[None, :]
    visible = j <= i if inputs.causal else torch.ones_like(i + j, dtype=torch.bool)
    if inputs.window is not None:
        visible = visible & ((i - j).abs() < inputs.window)
    valid = torch.ones(batch, length, dtype=torch.bool, device=inputs.q.device)
    if inputs.key_range is not None:
        valid = (token >= inputs.key_range[:, :1]) & (token < inputs.key_range[:, 1:])
    both = valid[:, :, None] & valid[:, None, :]
    return (visible & both) | (i == j), valid


def samples() -> list[tuple[str, AttentionInputs]]:
    """Return a few cases by name, as bundles of float32 inputs."""
    names = ("plain", "no_tables", "padding_window", "no_rows")
    return [(each.name, each.make(torch.float32)) for each in CASES if each.name in names]
