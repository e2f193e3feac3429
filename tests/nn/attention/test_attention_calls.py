"""CrayonAttention with a crayon table, call by call: caches, masks, checkpointing, compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from collavo_kernels.nn import CrayonAttention, CrayonInputs
from collavo_kernels.nn.attention.masks import interval_range, prefill_mask, visible_keys
from collavo_kernels.nn.attention.projections import project, project_with_rows
from collavo_kernels.testing import assert_within_budget

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0),
}
MODES = ("attention", "projection")
B, S, T = 2, 10, 3
# Image tokens before and behind every place where a test cuts the sequence in two.
ROWS = torch.tensor(
    [[-1, 0, 1, 1, -1, 0, 0, -1, 1, -1], [2, 2, -1, 0, 1, 2, -1, 2, -1, 0]], dtype=torch.int32
)
LEFT = torch.tensor([[0, 10], [3, 10]], dtype=torch.int32)


def make(kind: str = "llama", mode: Any = "attention") -> CrayonAttention:
    module = CrayonAttention(CONFIGS[kind], 0, crayon_mode=mode, crayon_rank=4).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def inputs() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    x, table = torch.randn(B, S, 32), torch.randn(T, 32)
    positions = torch.arange(S)[None]
    return x, table, LlamaRotaryEmbedding(LlamaConfig(**SIZES))(x, positions)


def crayon(table: Tensor, at: slice = slice(None), **changes: Any) -> CrayonInputs:
    return CrayonInputs(table=table, row_index=ROWS[:, at])._replace(**changes)


def by_hand(
    module: CrayonAttention, x: Tensor, table: Tensor, angles: Any, visible: Tensor
) -> Tensor:
    """The module with a dense crayon and eager attention, in float64."""
    rows = ROWS.clamp_min(0).long()
    dense = torch.where((ROWS >= 0)[..., None], table[rows], 0.0).double()
    x, (cos, sin) = x.double(), (angle.double()[:, :, None] for angle in angles)
    layers = {n: copy.deepcopy(m).double() for n, m in module.named_children()}
    given = x + dense if module.crayon_mode == "attention" else x
    q, k, v = (layers[f"{n}_proj"](given) for n in "qkv")
    if module.crayon_mode == "projection":
        added = layers["crayon_qkv"](dense)
        q, k, v = (a + b for a, b in zip((q, k, v), added.split([32, 16, 16], -1), strict=True))
    q, k, v = (states.unflatten(-1, (-1, 8)) for states in (q, k, v))

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    q, k, v = rotate(q), rotate(k).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    chance = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", chance, v).flatten(2)
    out = layers["o_proj"](out)
    if module.crayon_mode == "projection":
        out = out + layers["crayon_o"](dense)
    return out.float()


def cached(module: CrayonAttention, static: bool) -> Any:
    if static:
        return StaticCache(config=module.config, max_cache_len=12)
    return DynamicCache(config=module.config)


@pytest.mark.parametrize("lengths", [(6, 4), (3, 3, 4), (6, 1, 1, 2)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_rows_join_calls_on_a_filled_cache(
    kind: str, mode: str, static: bool, lengths: tuple[int, ...]
) -> None:
    """A second turn brings a new image; with a window of 4 the cache has dropped old keys."""
    module, (x, table, angles) = make(kind, mode), inputs()
    cache, first, parts = cached(module, static), 0, []
    for length in lengths:
        at = slice(first, first + length)
        now = tuple(angle[:, at] for angle in angles)
        out, _ = module(x[:, at], now, past_key_values=cache, crayon=crayon(table, at))
        parts.append(out)
        first += length
    visible = visible_keys(S, S, window=module.sliding_window)
    expected = by_hand(module, x, table, angles, visible)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_padding_reaches_both_paths(kind: str, mode: str) -> None:
    """As a key range, or as the mask ``attn_implementation="crayon"`` hands through."""
    module, (x, table, angles) = make(kind, mode), inputs()
    window = module.sliding_window
    visible = visible_keys(S, S, window=window, key_range=LEFT)
    valid = (torch.arange(S) >= LEFT[:, :1]) & (torch.arange(S) < LEFT[:, 1:])
    visible = visible | ~valid[:, None, :, None]  # a row that sees nothing is NaN by hand
    expected = by_hand(module, x, table, angles, visible)[valid]
    mask = prefill_mask(LEFT, window)
    for fused in (True, False, None):
        for found in (
            module(x, angles, crayon=crayon(table, key_range=LEFT, fused=fused))[0],
            module(x, angles, mask, crayon=crayon(table, fused=fused))[0],
        ):
            torch.testing.assert_close(found[valid], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_packed_and_holed_masks(mode: str, additive: bool) -> None:
    """Two documents in one row, and holes in another: an image of one must not leak."""
    module, (x, table, angles) = make("llama", mode), inputs()
    document = torch.tensor([[0] * 4 + [1] * 6, [0] * 10])
    real = torch.tensor([[1] * 10, [1, 1, 1, 0, 1, 1, 0, 0, 1, 1]]).bool()
    visible = visible_keys(S, S) & (document[:, None, :, None] == document[:, None, None])
    visible = visible & real[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, -1e30) if additive else visible
    found, _ = module(x, angles, mask, crayon=crayon(table))
    expected = by_hand(module, x, table, angles, visible)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_gives_the_same_gradients(mode: str, fused: bool) -> None:
    module, (x, table, angles) = make("mistral", mode).train(), inputs()
    leaves = [x.requires_grad_(), table.requires_grad_(), *module.parameters()]

    def run(x: Tensor, table: Tensor) -> Tensor:
        given = crayon(table, key_range=LEFT, fused=fused)
        out: Tensor = module(x, angles, crayon=given)[0]
        return out

    weight = torch.randn(B, S, 32)
    outs = [run(x, table), checkpoint(run, x, table, use_reentrant=False)]
    plain, again = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(bool(g.any()) for g in plain)


@pytest.mark.parametrize("fused", [True, None, False])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_in_one_graph(mode: str, fused: bool | None) -> None:
    """The decision for the fused prefill is part of the graph, forward and backward."""
    module, (x, table, angles) = make("mistral", mode), inputs()
    given = crayon(table.requires_grad_(), fused=fused, key_range=LEFT)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [table, *module.parameters()]
    results = []
    for run in (module, compiled):
        out, _ = run(x, angles, crayon=given)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_compiled_with_a_cache() -> None:
    """A dynamic cache counts in Python: prefill and decoding are graphs without breaks."""
    module, (x, table, angles) = make(), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    outs = []
    for run in (module, compiled):
        cache, parts = DynamicCache(config=module.config), []
        for at in (slice(0, 8), slice(8, 9), slice(9, 10)):
            now = tuple(angle[:, at] for angle in angles)
            given = crayon(table, at) if at.start == 0 else None
            parts.append(run(x[:, at], now, past_key_values=cache, crayon=given)[0])
        outs.append(torch.cat(parts, 1))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_dropout_takes_the_slower_path() -> None:
    """The operator has none: in training the weights are dropped, in evaluation they are not."""
    module, (x, table, angles) = make(), inputs()
    plain, _ = module(x, angles, crayon=crayon(table))
    module.attention_dropout = 0.5
    torch.testing.assert_close(module(x, angles, crayon=crayon(table))[0], plain)
    dropped, _ = module.train()(x, angles, crayon=crayon(table))
    assert not torch.allclose(dropped, plain, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sample", "no token"])
@pytest.mark.parametrize("fused", [True, False])
def test_nothing_to_attend_to(shape: tuple[int, int], mode: Any, fused: bool) -> None:
    """An empty batch, as the last one of a sharded data set can be, passes through."""
    module, positions = make(mode=mode), torch.arange(shape[1])[None]
    x = torch.randn(*shape, 32)
    angles = LlamaRotaryEmbedding(LlamaConfig(**SIZES))(x, positions)
    rows = torch.zeros(shape, dtype=torch.int32)
    given = CrayonInputs(table=torch.randn(T, 32), row_index=rows, fused=fused)
    assert module(x, angles, crayon=given)[0].shape == x.shape
    assert interval_range(torch.zeros(shape, dtype=torch.int64)) == (True, None)


def test_a_table_of_another_width_is_named() -> None:
    module, (x, _, angles) = make(), inputs()
    with pytest.raises(ValueError, match=r"crayon\.table: expected \[T, 32\].* got \[3, 16\]"):
        module(x, angles, crayon=crayon(torch.randn(T, 16), fused=True))


class _Wrapped(nn.Linear):
    """A layer of another package, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, _Wrapped])
def test_rows_get_no_bias_however_large_it_is(kind: type[nn.Linear]) -> None:
    """Added and taken off again, a bias of 100 would leave a half in bfloat16."""
    layer = kind(32, 16).bfloat16()
    nn.init.constant_(layer.bias, 100.0)
    x = torch.randn(7, 32).bfloat16()
    rows = project_with_rows(layer, x, None, 4)[4:]
    exact = x[4:].double() @ layer.weight.double().t()
    assert_within_budget(rows, x[4:] @ layer.weight.t(), exact)


def test_a_layer_with_hooks_is_called() -> None:
    """Hooks, and a forward set on one instance, see the tokens on the crayon's path too."""
    layer, seen = nn.Linear(32, 16), []
    layer.register_forward_hook(lambda *given: seen.append(given))
    index = torch.zeros(4, dtype=torch.int32)
    project(layer, torch.randn(4, 32), None, torch.randn(1, 16), index)
    assert len(seen) == 1
