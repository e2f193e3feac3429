"""Decoders of transformers on this package's attention: prefills, padding, gradients, compile."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import (
    KINDS,
    WAYS,
    WINDOW,
    assert_as_transformers,
    counted,
    ours,
    stock,
    transformers_own,
)
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_chunked_causal_mask

from collavo_kernels._sdpa import grouped_attention
from collavo_kernels.nn import register_attention
from collavo_kernels.nn.attention.masks import prefill_mask
from collavo_kernels.nn.attention.transformers import crayon_attention_forward

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.arange(1, 15).view(2, 7)
PADDING = {
    "none": [[1] * 7, [1] * 7],
    "left": [[1] * 7, [0, 0] + [1] * 5],
    "right": [[1] * 4 + [0] * 3, [1] * 7],
    "a sample without tokens": [[1] * 7, [0] * 7],
    "holes": [[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1, 1]],
}
# Two documents in a row, told by positions that start again.
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])


def masked(padding: str | None) -> Tensor | None:
    return None if padding is None else torch.tensor(PADDING[padding])


def logits(model: Any, padding: str | None = None, **options: Any) -> Tensor:
    options = {"attention_mask": masked(padding), "use_cache": False} | options
    return model(TOKENS, **options).logits


def packed_logits(model: Any) -> Tensor:
    return logits(model, position_ids=PACKED)


@pytest.mark.parametrize("padding", [None, *(name for name in PADDING if name != "holes")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_prefill_is_transformers_own(kind: str, way: str, padding: str | None) -> None:
    with counted() as calls, torch.no_grad():
        found = logits(ours(kind, way), padding)
    windows = {"llama": [None, None], "mistral": [WINDOW, WINDOW], "qwen2": [None, WINDOW]}[kind]
    padded = padding not in (None, "none")
    if "crayon" in way:  # one call per layer: nothing took the slower path
        assert [call["window"] for call in calls] == windows
    elif not padded:  # transformers gives SDPA a ready-made mask where it must slide
        assert len(calls) == windows.count(None)
    if kind == "llama":
        assert all((call["key_range"] is not None) == padded for call in calls)
    assert_as_transformers(found, transformers_own(kind, logits, padding), masked(padding))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_holed_mask_is_served_by_sdpa(kind: str, way: str) -> None:
    """No interval: the operator must not run, and the answer must be eager's."""
    with counted() as calls, torch.no_grad():
        found = logits(ours(kind, way), "holes")
    assert not calls
    assert_as_transformers(found, transformers_own(kind, logits, "holes"), masked("holes"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_documents_do_not_see_each_other(kind: str, way: str) -> None:
    with counted() as calls, torch.no_grad():
        found = packed_logits(ours(kind, way))
        alone = stock(kind)(TOKENS[:1, 4:]).logits
    assert not calls
    assert_as_transformers(found, transformers_own(kind, packed_logits))
    torch.testing.assert_close(found[:1, 4:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_block_diagonal_mask_is_taken_as_it_is(kind: str, way: str) -> None:
    """A ready-made mask of S x S elements: bool for SDPA, added scores for eager."""
    document = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    i = torch.arange(7)
    visible = (document[:, None] == document[None]) & (i[None] <= i[:, None])
    if kind != "llama":
        visible &= i[:, None] - i[None] < WINDOW
    mask: Any = visible[None, None].expand(2, 1, 7, 7)
    if kind == "qwen2":  # one mask per kind of layer
        mask = {"full_attention": mask, "sliding_attention": mask}
    with counted() as calls, torch.no_grad():
        found = logits(ours(kind, way), attention_mask=mask)
        expected = logits(stock(kind), attention_mask=mask)
    assert not calls
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def gradients(model: Any, padding: str | None) -> list[Tensor]:
    mask = masked(padding)
    labels = TOKENS if mask is None else TOKENS.masked_fill(mask == 0, -100)
    model.train().zero_grad()
    model(TOKENS, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters()]


@cache
def own_gradients(kind: str, padding: str | None) -> tuple[list[Tensor], list[Tensor]]:
    return gradients(stock(kind).double(), padding), gradients(stock(kind), padding)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_transformers_own(kind: str, way: str, padding: str | None) -> None:
    model = ours(kind, way)
    found = gradients(model, padding)
    parameters = zip(model.named_parameters(), found, *own_gradients(kind, padding), strict=True)
    for (name, _), ours_, exact, honest in parameters:
        error, own = ((x.double() - exact).abs().max() for x in (ours_, honest))
        # Twice SDPA's own error, and a rounding of the largest element for each of the 4
        # products and sums that a gradient passes in a layer, times two layers.
        assert error <= 2 * own + 8 * 1.2e-7 * exact.abs().max(), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradient_checkpointing_changes_nothing(kind: str, way: str) -> None:
    """The mask reaches the layer a second time when it is run again."""
    found = []
    for checkpointing in (False, True):
        model = ours(kind, way).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with counted() as calls:
            found.append(gradients(model, "left"))
        if "crayon" in way:
            assert len(calls) == (4 if checkpointing else 2)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_dropout_is_left_to_sdpa(kind: str, way: str) -> None:
    """The same draws as transformers': the operator has no dropout, and a padding mask stays."""
    model, theirs = (m.train() for m in (ours(kind, way), stock(kind)))
    for m in (model, theirs):
        for layer in m.model.layers:
            layer.self_attn.attention_dropout = 0.5
    valid, results = torch.tensor(PADDING["left"]).bool(), []
    for m in (model, theirs):
        torch.manual_seed(1)
        with counted() as calls:
            results.append(logits(m, "left"))
        assert not calls
    torch.testing.assert_close(results[0][valid], results[1][valid], atol=1e-5, rtol=1e-5)
    torch.manual_seed(2)
    assert not torch.allclose(logits(model, "left")[valid], results[0][valid], atol=1e-2)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_in_one_graph(way: str, padding: str | None) -> None:
    """Padding cannot be read in a graph: SDPA then, with the right mask."""
    model = ours("mistral", way)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (logits(m, padding) for m in (compiled, model))
    mask = masked(padding)
    valid = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_a_compiled_prefill_without_padding_runs_the_operator() -> None:
    """With a cache nothing can be packed, so that a graph can hold the fused prefill."""
    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model = ours("mistral", "crayon")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(TOKENS, use_cache=True).logits
        torch.testing.assert_close(found, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert sum("crayon_attention" in name for name in seen) == 2
    assert not any("scaled_dot_product" in name for name in seen)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_decoder_that_was_made_an_encoder(kind: str, padding: str | None) -> None:
    """``config.is_causal = False``: no causal mask, and padding is SDPA's."""
    results = []
    for model in (ours(kind, "crayon"), stock(kind)):
        model.config.is_causal = False
        with torch.no_grad(), counted() as calls:
            results.append(logits(model, padding))
        assert not [call for call in calls if call["causal"]]
    valid = torch.ones_like(TOKENS).bool() if padding is None else masked(padding).bool()
    torch.testing.assert_close(results[0][valid], results[1][valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask"])
def test_what_nobody_would_serve_is_refused(name: str) -> None:
    """transformers' SDPA function would leave some of them out without a word."""
    model = ours("llama", "crayon")
    with pytest.raises(ValueError, match=rf"{name}: expected None.*eager"):
        model(TOKENS, **{name: torch.ones(4)})


@pytest.mark.parametrize(
    ("size", "dtype"), [(7, torch.float32), (258, torch.float32), (8, torch.float64)]
)
def test_heads_the_kernels_lack_take_sdpa(size: int, dtype: torch.dtype) -> None:
    """Odd, too large, or in float64: the padding that was made for the operator still counts."""
    q = torch.randn(2, 4, 6, size, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 6, size, dtype=dtype)
    ranges, module = torch.tensor([[2, 6], [0, 5]], dtype=torch.int32), torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    with counted() as calls:
        found, _ = crayon_attention_forward(module, q, k, v, prefill_mask(ranges, 3))
    assert not calls
    for sample, (first, end) in enumerate(ranges.tolist()):
        at = (slice(sample, sample + 1), slice(None), slice(first, end))
        i = torch.arange(end - first)
        visible = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 3)
        alone = grouped_attention(q[at], k[at], v[at], attn_mask=visible)
        torch.testing.assert_close(
            found[sample : sample + 1, first:end], alone.transpose(1, 2), atol=1e-5, rtol=1e-5
        )


def test_autocast() -> None:
    """RoPE leaves q and k in float32 and v in 16 bits; the operator brings them together."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), counted() as calls:
        found, expected = (logits(m, "left") for m in (ours("llama", "crayon"), stock("llama")))
    assert len(calls) == 2
    exact, _ = transformers_own("llama", logits, "left")
    valid = torch.tensor(PADDING["left"]).bool()
    own = (expected - exact)[valid].abs().max()
    assert (found - exact)[valid].abs().max() <= 2 * own


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_chunks_is_no_window(padded: bool) -> None:
    """Llama 4's chunks have a length as windows have one; a window would see across them."""
    mask, made = torch.tensor(PADDING["left"]) if padded else None, []
    for name in ("crayon", "sdpa"):
        config = LlamaConfig(attention_chunk_size=3, attn_implementation=name)
        embeds = torch.zeros(2, 7, 4)
        made.append(create_chunked_causal_mask(config, embeds, mask, past_key_values=None))
    assert made[0].dtype == torch.bool and torch.equal(*made)


def test_registering_twice_changes_nothing_and_nothing_else() -> None:
    code = """
import sys
import collavo_kernels.nn, collavo
assert "transformers" not in sys.modules  # only who asks for it pays for it
import transformers.modeling_utils as m, transformers.masking_utils as k
before = dict(m.AttentionInterface._global_mapping), dict(k.AttentionMaskInterface._global_mapping)
from collavo_kernels.nn import register_attention
register_attention()
after = dict(m.AttentionInterface._global_mapping), dict(k.AttentionMaskInterface._global_mapping)
register_attention()
again = dict(m.AttentionInterface._global_mapping), dict(k.AttentionMaskInterface._global_mapping)
assert after == again
print(*(sorted(set(a) - set(b)) + [all(a[n] is b[n] for n in b)] for a, b in zip(after, before)))
"""
    command, root = [sys.executable, "-c", code], Path(__file__).resolve().parents[3]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.split() == ["['crayon',", "True]", "['crayon',", "True]"]


def test_collavos_models_register_it() -> None:
    """``from_pretrained(..., attn_implementation="crayon")`` works once they are imported."""
    import collavo

    assert collavo.register_attention is register_attention
    assert "collavo_kernels.nn.attention.transformers" in sys.modules
