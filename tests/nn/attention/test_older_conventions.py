"""Attention as transformers before 5.5 calls it; ``scripts/check_versions.sh`` runs real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import SIZES, stock
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from collavo_kernels.nn import CrayonAttention, CrayonInputs

pytestmark = pytest.mark.usefixtures("one_thread")
B, S = 2, 7
POSITIONS = torch.arange(S)[None]


@pytest.fixture(autouse=True)
def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module believe that it is beside an older version."""
    monkeypatch.setattr("collavo_kernels.nn.attention.module._OLDER", True)


class Tables(nn.Module):
    """The rotary embedding of 4.37: of all positions below a length."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 1e4 ** (-torch.arange(0, 8, 2) / 8.0))
        self.register_buffer("angles", torch.cat([angles, angles], -1), persistent=False)

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        assert seq_len <= 64
        return self.angles[:seq_len].cos().to(x.dtype), self.angles[:seq_len].sin().to(x.dtype)


class Rows(Tables):
    """The one of 4.45: of the positions that it is given."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.angles[position_ids].cos(), self.angles[position_ids].sin()


class Cache:
    """Asks for positions at every update, as caches of before 5.5 do."""

    def __init__(self) -> None:
        self.kept = DynamicCache()
        self.extras: list[dict[str, Any]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept.get_seq_length(layer_idx)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, cache_kwargs: dict[str, Any]) -> Any:
        self.extras.append(cache_kwargs)
        return self.kept.update(k, v, layer_idx)


def source(rotary: nn.Module | None = None, **options: Any) -> Any:
    """Return a loaded attention that is shaped as those of 4.37 to 4.47 are."""
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    for name, value in options.items():
        setattr(config, name, value)
    attention = LlamaAttention(config, 0)
    for parameter in attention.parameters():
        parameter.data.normal_(0.0, 0.2)
    attention.rotary_emb = Tables() if rotary is None else rotary
    del attention.scaling
    return attention


@pytest.mark.parametrize("rotary", [Tables, Rows])
def test_a_call_of_then_gives_the_triple_of_then(rotary: type[nn.Module]) -> None:
    """Rotary embeddings of both kinds, or the model's own, equal one call of today's module."""
    attention = source(rotary())
    ours: Any = CrayonAttention.from_attention(attention)
    assert list(ours.state_dict()) == [f"{n}_proj.weight" for n in "qkvo"]
    table, rows = torch.randn(3, 32), torch.tensor([[-1, 0, 1, 2, 2, -1, 0]] * B).int()
    x, crayon = torch.randn(B, S, 32), CrayonInputs(table, rows)
    angles = Tables().angles[POSITIONS]
    plain = CrayonAttention(attention.config, 0, projections=dict(attention.named_children()))
    expected, _ = plain(x, (angles.cos(), angles.sin()), crayon=crayon)
    cache = Cache()
    result = ours(
        hidden_states=x,
        attention_mask=None,
        position_ids=POSITIONS,
        past_key_value=cache,
        output_attentions=False,
        use_cache=True,
        crayon=crayon,
    )
    assert result[1] is None and result[2] is cache
    given, _, none = ours(x, position_embeddings=(angles.cos(), angles.sin()), crayon=crayon)
    assert none is None
    for found in (result[0], given):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("own_rotary", [True, False], ids=["to 4.47", "to 5.4"])
def test_parts_over_a_cache_that_asks_for_positions(own_rotary: bool) -> None:
    """Masks as models made them: none for a prefill or a token, else added scores, one too many."""
    attention = source()
    ours: Any = CrayonAttention.from_attention(attention)
    if not own_rotary:
        ours = CrayonAttention(attention.config, 0, projections=dict(attention.named_children()))
    x, cache, parts = torch.randn(B, S, 32), Cache(), []
    angles = Tables().angles[POSITIONS]
    minus = torch.finfo(torch.float32).min
    with torch.no_grad():
        for first, end in ((0, 3), (3, 4), (4, 6), (6, 7)):
            at = slice(first, end)
            mask = None
            if first and end - first > 1:
                seen = torch.arange(end + 1) <= torch.arange(first, end)[:, None]
                mask = torch.zeros(seen.shape).masked_fill(~seen, minus).expand(B, 1, -1, -1)
            where = torch.arange(first, end)
            if own_rotary:
                out, _, _ = ours(x[:, at], mask, where[None], cache, cache_position=where)
            else:
                cos_sin = (angles[:, at].cos(), angles[:, at].sin())
                out, _ = ours(x[:, at], cos_sin, mask, past_key_value=cache, cache_position=where)
            assert torch.equal(cache.extras[-1]["cache_position"], where)
            assert {"cos", "sin"} < cache.extras[-1].keys()
            parts.append(out)
        whole = ours(x, None, POSITIONS) if own_rotary else ours(x, (angles.cos(), angles.sin()))
    torch.testing.assert_close(torch.cat(parts, 1), whole[0], atol=2e-6, rtol=1e-5)


def test_a_static_cache_that_hangs_at_the_module_and_its_mask() -> None:
    """So it is in 4.38: the mask has a row for every position there could be."""
    ours: Any = CrayonAttention.from_attention(source())
    x, where = torch.randn(B, S, 32), torch.arange(S)
    ours.past_key_value = Cache()
    mask = torch.full((B, 1, 9, 9), torch.finfo(torch.float32).min).triu(1)
    found, _, cache = ours(x, mask, POSITIONS, cache_position=where)
    assert cache.get_seq_length() == S
    del ours.past_key_value
    torch.testing.assert_close(found, ours(x, None, POSITIONS)[0], atol=2e-6, rtol=1e-5)


def test_what_is_unclear_without_a_mask_is_refused() -> None:
    """Several tokens on a filled cache, or more keys than tokens: older caches do not say which."""
    ours: Any = CrayonAttention.from_attention(source())
    x, cache = torch.randn(B, S, 32), Cache()
    ours(x[:, :2], None, POSITIONS[:, :2], cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected a mask for 5 token\(s\)"):
        ours(x[:, 2:], None, POSITIONS[:, 2:], cache)
    with pytest.raises(ValueError, match=r"^position_ids: expected positions"):
        ours(x)
    with pytest.raises(ValueError, match=r"^output_attentions: expected False"):
        ours(x, None, POSITIONS, output_attentions=True)


def test_a_window_is_in_the_masks() -> None:
    """Without one the first tokens fit into it, or 4.37's SDPA class had none at all."""
    config = source(sliding_window=3)
    ours: Any = CrayonAttention.from_attention(config)
    x = torch.randn(B, S, 32)
    wide: Any = CrayonAttention.from_attention(source())
    assert torch.equal(ours(x, None, POSITIONS)[0], wide(x, None, POSITIONS)[0])
    with pytest.raises(
        ValueError, match=r"^crayon.fused: expected None with a sliding window of 3"
    ):
        ours(x, None, POSITIONS, crayon=CrayonInputs(fused=True))


@pytest.mark.parametrize("name", ["LlamaFlashAttention2", "OlmoSdpaAttention"])
def test_other_classes_of_then_are_refused(name: str) -> None:
    """FlashAttention's gets masks of another kind; others rotate or scale in another way."""
    other = type(name, (LlamaAttention,), {"forward": LlamaAttention.forward})
    other.__module__ = LlamaAttention.__module__
    attention = source()
    attention.__class__ = other
    words = "one of sdpa or eager" if "Flash" in name else "transformers' LlamaAttention"
    with pytest.raises(ValueError, match=f"^attention: expected {words}.*got {name}"):
        CrayonAttention.from_attention(attention)


def test_a_rotary_child_of_today_is_still_refused_by_subclasses() -> None:
    """A subclass has today's call, which a decoder of then does not make."""

    class Own(CrayonAttention):
        pass

    with pytest.raises(ValueError, match=r"^attention.rotary_emb: not supported"):
        Own.from_attention(source())
    assert type(CrayonAttention.from_attention(stock("llama").model.layers[0].self_attn)) is (
        CrayonAttention
    )
