"""The attention of a LLaMA-family decoder layer with the crayon path."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from collavo_kernels.nn.crayon_branch import CrayonBranch
from collavo_kernels.nn.dual_qlora_linear import DualQLoRALinear
from collavo_kernels.ops.crayon_attention import crayon_attention, prepare
from collavo_kernels.ops.qlora_linear import qlora_linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LARGEST_HEAD = 256


class CrayonInputs(NamedTuple):
    """What a forward pass knows about its image tokens, computed once and handed to every layer.

    Attributes:
        table: The crayon, ``[T, hidden_size]``, one row per segment; None without crayon.
        row_index: int32 ``[B, S]``: the token's row, -1 where it has none; None without crayon.
        adapter_mask: uint8 ``[B, S]``: bit i set = adapter i acts on the token; None = all act.
        row_mask: uint8 ``[T]``: the same for the rows, equal to that of the rows' tokens; None =
            all act.
        key_range: int32 ``[B, 2]``: first and one-past-last valid key of each sample; None = all.
        fused: Whether the cache is empty and the mask is one interval per sample, so that
            ``crayon_attention`` applies.
    """

    table: Tensor | None = None
    row_index: Tensor | None = None
    adapter_mask: Tensor | None = None
    row_mask: Tensor | None = None
    key_range: Tensor | None = None
    fused: bool = False


class _Projected(NamedTuple):
    """q, k and v ``[B, S, heads, D]`` before RoPE, and their tables ``[T, heads, D]`` or None."""

    states: tuple[Tensor, Tensor, Tensor]
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]


class CrayonAttention(nn.Module):
    r"""Drop-in for the attention of a LLaMA, Mistral or Qwen2 decoder layer, with the crayon.

    At image tokens the rows of the crayon table join q, k and v before RoPE:

    ``q = W_q h + t_q[row]``, ``k = W_k h + t_k[row]``, ``v = W_v h + t_v[row]``

    with :math:`t_q = W_q c` (adapters included, no bias) in attention mode, where the T rows of c
    ride through the projections together with the tokens, and :math:`t_q = s B_{seg} A_{seg} c` in
    projection mode, which has one such branch for q, k and v together and one for the output
    projection. A prefill runs ``crayon_attention``; a call on a filled cache, or with a mask that
    is not one interval per sample, prepares q, k and v, updates the cache and attends with
    PyTorch's SDPA. Parameters and state-dict keys are those of the Hugging Face module (``q_proj``
    ... ``o_proj``; projection mode adds ``crayon_qkv`` and ``crayon_o``).

    Args:
        config: A LLaMA-shaped configuration (``hidden_size``, ``num_attention_heads`` ... by
            attribute).
        layer_idx: The layer's index in the cache.
        crayon_mode: ``"attention"``, ``"projection"`` or ``"none"``.
        crayon_rank: R of the branches in projection mode.
        crayon_scaling: s of the branches in projection mode.
        crayon_dropout: Dropout on the branches' rows, while training.
        crayon_dtype: dtype of the branches; None = the default dtype.
        projections: Linear layers to take over instead of making new ones, by name (``nn.Linear``
            or ``DualQLoRALinear``).

    Raises:
        ValueError: if the configuration asks for what the operator lacks (soft-capped scores,
            partial rotary, an odd head size or one above 256) or the heads cannot be grouped.

    Source: arXiv 2402.11248, section 3 and figure 6.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
        >>> attention = CrayonAttention(config, 0)
        >>> angle = torch.randn(1, 7, 16)
        >>> out, _ = attention(torch.randn(2, 7, 64), (angle.cos(), angle.sin()))
        >>> out.shape
        torch.Size([2, 7, 64])
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    crayon_qkv: CrayonBranch
    crayon_o: CrayonBranch

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        crayon_mode: Literal["attention", "projection", "none"] = "attention",
        crayon_rank: int = 256,
        crayon_scaling: float = 1.0,
        crayon_dropout: float = 0.0,
        crayon_dtype: torch.dtype | None = None,
        projections: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.crayon_mode = crayon_mode
        self.head_dim = _head_dim(config)
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads = int(config.num_key_value_heads)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
        self.is_causal = True
        self.sliding_window = _window(config, layer_idx)
        _refuse(config, self.head_dim, self.num_heads, self.num_key_value_heads)
        for name, layer in (projections or _new_projections(config, self.head_dim)).items():
            self.add_module(name, layer)
        if crayon_mode == "projection":
            sizes = {
                "qkv": (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim,
                "o": config.hidden_size,
            }
            for name, size in sizes.items():
                branch = CrayonBranch(
                    config.hidden_size,
                    size,
                    rank=crayon_rank,
                    scaling=crayon_scaling,
                    dropout=crayon_dropout,
                    dtype=crayon_dtype,
                )
                self.add_module(f"crayon_{name}", branch)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        crayon: CrayonInputs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[B, S, hidden_size]`` and, where they exist, the attention weights.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            position_embeddings: cos and sin, each ``[B or 1, S, D]``.
            attention_mask: ``[B or 1, 1, S, keys]``, bool (True = visible) or additive; None =
                causal. Not read where ``crayon.fused``.
            past_key_values: A Hugging Face cache (``update``, ``get_seq_length``), or None.
            crayon: The forward pass's crayon; None = plain attention.
            **kwargs: Passed on to ``attend``.
        """
        crayon = CrayonInputs() if crayon is None else crayon
        projected = self._project(hidden_states, crayon)
        weights: Tensor | None = None
        if crayon.fused:
            mixed = self._prefill(projected, position_embeddings, past_key_values, crayon)
        else:
            mixed, weights = self._cached(
                projected, position_embeddings, attention_mask, past_key_values, crayon, **kwargs
            )
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)
        table = self.crayon_o(crayon.table) if self._has_branch(crayon) else None
        index = None if table is None else crayon.row_index
        return _linear(self.o_proj, mixed, crayon.adapter_mask, table, index), weights

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_length: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the cache; a subclass may use another implementation.

        Args:
            query: ``[B, H, S, D]``, prepared.
            key: ``[B, G, keys, D]``, from the cache.
            value: ``[B, G, keys, D]``, from the cache.
            attention_mask: As in ``forward``.
            past_length: Tokens that were in the cache before this call.
            **kwargs: Not used here.

        Returns:
            The mixed values ``[B, S, H, D]``, and the weights ``[B, H, S, keys]`` or None.

        Raises:
            ValueError: if the mask has not four dimensions.
        """
        length = query.shape[2]
        if attention_mask is None:
            key, value = key[:, :, : past_length + length], value[:, :, : past_length + length]
            attention_mask = self._causal_mask(length, past_length, query.device)
        elif attention_mask.ndim != 4:
            raise ValueError(
                "attention_mask: expected [B, 1, S, keys], got "
                f"{list(attention_mask.shape)}; expand a padding mask, or give key_range"
            )
        mixed = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
            enable_gqa=self.num_key_value_groups > 1,
        )
        return mixed.transpose(1, 2), None

    def _causal_mask(self, length: int, past_length: int, device: torch.device) -> Tensor:
        i = torch.arange(past_length, past_length + length, device=device)[:, None]
        j = torch.arange(past_length + length, device=device)[None, :]
        visible = j <= i
        if self.sliding_window is not None:
            visible = visible & (i - j < self.sliding_window)
        return visible[None, None]

    def _has_branch(self, crayon: CrayonInputs) -> bool:
        return self.crayon_mode == "projection" and crayon.table is not None

    def _project(self, hidden: Tensor, crayon: CrayonInputs) -> _Projected:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.crayon_mode == "attention" and crayon.table is not None:
            return self._project_with_rows(layers, hidden, crayon.table, crayon)
        q, k, v = (self._heads(_linear(layer, hidden, crayon.adapter_mask)) for layer in layers)
        if not self._has_branch(crayon):
            return _Projected((q, k, v), (None, None, None))
        table = self._heads(self.crayon_qkv(crayon.table).to(hidden.dtype))
        groups = self.num_key_value_heads
        tq, tk, tv = torch.split(table, [self.num_heads, groups, groups], dim=-2)
        return _Projected((q, k, v), (tq, tk, tv))

    def _project_with_rows(
        self,
        layers: tuple[nn.Module, ...],
        hidden: Tensor,
        table: Tensor,
        crayon: CrayonInputs,
    ) -> _Projected:
        """Send the crayon's rows through the projections behind the tokens: one pass per weight."""
        tokens = hidden.shape[0] * hidden.shape[1]
        x = torch.cat([hidden.flatten(0, 1), table.to(hidden.dtype)])
        mask = None
        if crayon.adapter_mask is not None and crayon.row_mask is not None:
            mask = torch.cat([crayon.adapter_mask.flatten(), crayon.row_mask])
        elif crayon.adapter_mask is not None or crayon.row_mask is not None:
            missing = "row_mask" if crayon.row_mask is None else "adapter_mask"
            raise ValueError(
                f"crayon.{missing}: expected a mask beside the other one, got None; "
                "a row takes the adapters of its tokens"
            )
        states, tables = [], []
        for layer in layers:
            y = self._heads(_linear_without_row_bias(layer, x, mask, tokens))
            states.append(y[:tokens].view(*hidden.shape[:2], -1, self.head_dim))
            tables.append(y[tokens:])
        return _Projected((states[0], states[1], states[2]), (tables[0], tables[1], tables[2]))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def _prefill(
        self,
        projected: _Projected,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any | None,
        crayon: CrayonInputs,
    ) -> Tensor:
        (q, k, v), (tq, tk, tv) = projected
        cos, sin = position_embeddings
        result = crayon_attention(
            q,
            k,
            v,
            cos=cos,
            sin=sin,
            crayon_q=tq,
            crayon_k=tk,
            crayon_v=tv,
            row_index=crayon.row_index,
            key_range=crayon.key_range,
            causal=True,
            window=self.sliding_window,
            scale=self.scaling,
        )
        if past_key_values is not None:
            past_key_values.update(
                result.key.transpose(1, 2), result.value.transpose(1, 2), self.layer_idx
            )
        return result.out

    def _cached(
        self,
        projected: _Projected,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any | None,
        crayon: CrayonInputs,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = position_embeddings
        # Under autocast a branch's table can be wider than the projections.
        dtype = projected.states[0].dtype
        tq, tk, tv = (None if t is None else t.to(dtype) for t in projected.tables)
        states = prepare(
            *projected.states,
            cos=cos,
            sin=sin,
            crayon_q=tq,
            crayon_k=tk,
            crayon_v=tv,
            row_index=None if tq is None else crayon.row_index,
        )
        q, k, v = (x.transpose(1, 2) for x in states)
        past_length = 0
        if past_key_values is not None:
            if attention_mask is None:
                past_length = int(past_key_values.get_seq_length(self.layer_idx))
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.attend(q, k, v, attention_mask, past_length, **kwargs)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"layer_idx={self.layer_idx}, crayon_mode={self.crayon_mode!r}"


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _window(config: Any, layer_idx: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = kinds is None or kinds[layer_idx] == "sliding_attention"
    return int(window) if window and sliding else None


def _refuse(config: Any, head_dim: int, heads: int, groups: int) -> None:
    """Raise if the layer needs what ``crayon_attention`` lacks."""
    for name in ("attn_logit_softcapping", "attn_logit_softcap", "softcap"):
        if getattr(config, name, None):
            raise ValueError(
                f"config.{name}: soft-capped scores are not supported, got {getattr(config, name)}"
            )
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise ValueError(
            f"config.partial_rotary_factor: expected 1 (all of a head rotates), got {partial}"
        )
    if head_dim % 2 or not 0 < head_dim <= _LARGEST_HEAD:
        raise ValueError(
            f"config.head_dim: expected an even size up to {_LARGEST_HEAD}, got {head_dim}"
        )
    if heads % groups:
        raise ValueError(
            f"config.num_key_value_heads: expected a divisor of {heads} heads, got {groups}"
        )


def _new_projections(config: Any, head_dim: int) -> dict[str, nn.Module]:
    # Qwen2 hard-codes its biases: q, k and v have one, o has none.
    qwen2 = getattr(config, "model_type", None) == "qwen2"
    bias = bool(getattr(config, "attention_bias", False))
    query, group = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = {name: (config.hidden_size, group, bias or qwen2) for name in PROJECTIONS[1:3]}
    sizes["q_proj"] = (config.hidden_size, query, bias or qwen2)
    sizes["o_proj"] = (query, config.hidden_size, bias and not qwen2)
    return {
        name: nn.Linear(sizes[name][0], sizes[name][1], bias=sizes[name][2]) for name in PROJECTIONS
    }


def _linear(
    layer: nn.Module,
    x: Tensor,
    adapter_mask: Tensor | None,
    row_table: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """Call a projection, its adapters masked and a row table added where there is one."""
    if isinstance(layer, DualQLoRALinear):
        result: Tensor = layer(x, adapter_mask, row_table, row_index)
    elif row_table is None:
        result = layer(x)
    else:
        weight, bias = layer.weight, layer.bias
        result = qlora_linear(
            x,
            weight,  # type: ignore[arg-type]
            row_table=row_table,
            row_index=row_index,
            bias=bias,  # type: ignore[arg-type]
        )
    return result


def _linear_without_row_bias(
    layer: nn.Module, x: Tensor, adapter_mask: Tensor | None, tokens: int
) -> Tensor:
    """Call a projection on tokens and, behind them, rows, which get no bias."""
    bias = getattr(layer, "bias", None)
    if bias is None:
        return _linear(layer, x, adapter_mask)
    index = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    index[:tokens] = -1
    return _linear(layer, x, adapter_mask, -bias[None], index)
