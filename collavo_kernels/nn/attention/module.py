"""The attention of a LLaMA-family decoder layer with the crayon path."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from collavo_kernels._requirements import OLDEST_WITH_SEAMS, installed_version, shortfall
from collavo_kernels._sdpa import grouped_attention
from collavo_kernels.nn.attention.masks import (
    cache_offsets,
    is_prefill_mask,
    read_prefill_mask,
    visible_keys,
)
from collavo_kernels.nn.attention.older import OwnRotary, PositionedCache, check_unmasked
from collavo_kernels.nn.attention.projections import (
    CrayonInputs,
    project,
    project_tokens_and_rows,
)
from collavo_kernels.nn.attention.source import (
    ATTENTION_PROJECTIONS,
    check_projections,
    check_source,
    head_dim,
    new_projections,
    refuse_config,
    sliding_window,
)
from collavo_kernels.nn.crayon_branch import CrayonBranch
from collavo_kernels.ops.crayon_attention import crayon_attention, prepare

# Implementations of transformers whose masks the module reads; None is a module on its own.
_READABLE = (None, "sdpa", "eager", "crayon")
# Found out here: a compiled forward cannot.
_OLDER = (
    installed_version("transformers") is not None
    and shortfall("transformers", OLDEST_WITH_SEAMS) is not None
)


class _Projected(NamedTuple):
    """q, k and v ``[B, S, heads, D]`` before RoPE, and their tables ``[T, heads, D]`` or None."""

    states: tuple[Tensor, Tensor, Tensor]
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]


class CrayonAttention(nn.Module):
    r"""Drop-in for the attention of a LLaMA-shaped decoder layer, with the crayon.

    At image tokens the rows of the crayon table join q, k and v before RoPE:

    ``q = W_q h + t_q[row]``, ``k = W_k h + t_k[row]``, ``v = W_v h + t_v[row]``

    with :math:`t_q = W_q c` (adapters included, no bias) in attention mode, where the T rows of c
    ride through the projections together with the tokens, and :math:`t_q = s B_{seg} A_{seg} c` in
    projection mode, which has one such branch for q, k and v together and one for the output
    projection. A prefill runs ``crayon_attention``; a call on a filled cache, or with a mask that
    is not one interval per sample, prepares q, k and v, updates the cache and attends with
    PyTorch's SDPA. Parameters and state-dict keys are those of the Hugging Face module (``q_proj``
    ... ``o_proj``; projection mode adds ``crayon_qkv`` and ``crayon_o``). ``from_attention`` takes
    over a loaded module. In a stock model, ``attn_implementation="crayon"``
    (``register_attention``) lets padded batches run fused too; with ``"sdpa"`` and ``"eager"`` they
    take the slower path.

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
            or ``DualQLoRALinear``, or what is called like one).

    Raises:
        TypeError: if ``config`` is no configuration.
        ValueError: if the configuration asks for what the operator lacks (soft-capped scores,
            partial rotary, a head dim that is odd or above 256), the heads cannot be grouped, or a
            projection has other sizes.

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
        if not hasattr(config, "num_attention_heads"):
            raise TypeError(f"config: expected a configuration, got {type(config).__name__}")
        self.config = config
        self.layer_idx = layer_idx
        self.crayon_mode = crayon_mode
        self.head_dim = head_dim(config)
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads = int(config.num_key_value_heads)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        multiplier = getattr(config, "attention_multiplier", None)  # Granite's
        self.scaling = self.head_dim**-0.5 if multiplier is None else float(multiplier)
        rotates = getattr(config, "no_rope_layers", None)  # SmolLM3's: 1 where a layer does
        self.rotates = rotates is None or bool(rotates[layer_idx])
        self.attention_dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
        self.is_causal = True
        self.sliding_window = sliding_window(config, layer_idx)
        refuse_config(config)
        if projections is None:
            projections = new_projections(config)
        check_projections(projections, config)
        for name in ATTENTION_PROJECTIONS:
            self.add_module(name, projections[name])
        if crayon_mode == "projection":
            outputs = {
                "qkv": (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim,
                "o": config.hidden_size,
            }
            for name, out_features in outputs.items():
                branch = CrayonBranch(
                    config.hidden_size,
                    out_features,
                    rank=crayon_rank,
                    scaling=crayon_scaling,
                    dropout=crayon_dropout,
                    dtype=crayon_dtype,
                )
                self.add_module(f"crayon_{name}", branch)

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        *,
        crayon_mode: Literal["attention", "projection", "none"] = "attention",
        crayon_rank: int = 256,
        crayon_scaling: float = 1.0,
        crayon_dropout: float = 0.0,
        crayon_dtype: torch.dtype | None = None,
        projections: dict[str, nn.Module] | None = None,
    ) -> Self:
        """Return a module that takes the place of a loaded one, its projections shared.

        Nothing is copied: dense weights, bitsandbytes' 4 bits and adapters are those of the module,
        and stay what they are if it is put back.

        Args:
            attention: transformers' ``LlamaAttention`` (LLaMA, Vicuna, LLaVA) or that of Mistral,
                Qwen2, Granite or SmolLM3. One of before 4.48, with ``sdpa`` or ``eager``, brings
                its rotary embedding, and the new module is called as it was.
            crayon_mode: As in the constructor.
            crayon_rank: As in the constructor.
            crayon_scaling: As in the constructor.
            crayon_dropout: As in the constructor.
            crayon_dtype: As in the constructor.
            projections: Linear layers to use in place of the module's, all four by name.

        Returns:
            The new module, on the device and in the mode (train, eval) of the old one.

        Raises:
            TypeError: if ``attention`` is no module.
            ValueError: naming what the module has that this one lacks (norms of q and k, sinks,
                cross attention, ...), or for a configuration that the constructor refuses.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            ...     num_attention_heads=4, vocab_size=16)
            >>> model = LlamaForCausalLM(config)
            >>> for layer in model.model.layers:
            ...     layer.self_attn = CrayonAttention.from_attention(layer.self_attn)
            >>> model(torch.tensor([[1, 2, 3]])).logits.shape
            torch.Size([1, 3, 16])
        """
        own_rotary = cls is CrayonAttention and hasattr(attention, "rotary_emb")
        check_source(attention, own_rotary)
        source: Any = attention
        taken = {name: getattr(source, name) for name in ATTENTION_PROJECTIONS}
        made: Any = (RotaryCrayonAttention if own_rotary else cls)(
            source.config,
            source.layer_idx,
            crayon_mode=crayon_mode,
            crayon_rank=crayon_rank,
            crayon_scaling=crayon_scaling,
            crayon_dropout=crayon_dropout,
            crayon_dtype=crayon_dtype,
            projections=taken if projections is None else projections,
        )
        made.scaling = float(getattr(source, "scaling", made.scaling))
        made.rotates = bool(getattr(source, "use_rope", True))
        if own_rotary:
            made.take_rotary(source.rotary_emb)
        made.training = attention.training
        device = next(made.q_proj.parameters()).device
        for branch in (getattr(made, name, None) for name in ("crayon_qkv", "crayon_o")):
            if branch is not None:
                branch.to(device).train(attention.training)
        return cast(Self, made)

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
            attention_mask: ``[B or 1, 1, S, keys]``, bool (True = visible) or additive, or what
                ``attn_implementation="crayon"`` makes of a padding mask; None = causal, within
                ``crayon.key_range``. Not read where ``crayon.fused``.
            past_key_values: A Hugging Face cache, or None.
            crayon: The forward pass's crayon; None = plain attention.
            **kwargs: Passed on to ``attend``.

        Raises:
            ValueError: if a mask or one of the crayon's inputs cannot be read.
        """
        crayon = CrayonInputs() if crayon is None else crayon
        self._check_implementation()
        if kwargs.get("is_causal") is False:  # transformers sends a bidirectional configuration so
            raise ValueError(
                f"is_causal: expected True or nothing, got False; a {type(self).__name__} is causal"
            )
        fused, key_range = crayon.fused, crayon.key_range
        if _OLDER:
            # Until 4.55 a cache comes under the second name.
            given = kwargs.pop("past_key_value", None) if past_key_values is None else None
            past_key_values = given if past_key_values is None else past_key_values
            position = kwargs.get("cache_position")
            if past_key_values is not None:
                past_key_values = PositionedCache(past_key_values, position_embeddings, position)
        if fused is None:
            fused = self._is_prefill(attention_mask, past_key_values)
        if is_prefill_mask(attention_mask):
            of_mask, _ = read_prefill_mask(attention_mask)
            attention_mask = None
            key_range = of_mask if key_range is None else key_range
        # Field by field: torch 2.6 compiles neither _replace nor a slice of a named tuple.
        crayon = CrayonInputs(
            crayon.table, crayon.row_index, crayon.adapter_mask, crayon.row_mask, key_range, fused
        )
        projected = self._project(hidden_states, crayon)
        weights: Tensor | None = None
        if crayon.fused:
            mixed = self._prefill(projected, position_embeddings, past_key_values, crayon)
        else:
            mixed, weights = self._cached(
                projected, position_embeddings, attention_mask, past_key_values, crayon, **kwargs
            )
        mixed = mixed.flatten(2)
        table = self.crayon_o(crayon.table) if self._has_branch(crayon) else None
        index = None if table is None else crayon.row_index
        return project(self.o_proj, mixed, crayon.adapter_mask, table, index), weights

    def _implementation(self) -> str | None:
        name = getattr(self.config, "_attn_implementation", None)
        return None if name is None else str(name)

    def _check_implementation(self) -> None:
        """Raise where transformers' model makes masks this module would misread."""
        if self._implementation() not in _READABLE:
            raise ValueError(
                f"config._attn_implementation: expected sdpa, eager or crayon around a "
                f"{type(self).__name__}, got {self._implementation()!r}, whose masks it cannot "
                'read; call model.set_attn_implementation("sdpa")'
            )

    def _is_prefill(self, attention_mask: Tensor | None, past_key_values: Any | None) -> bool:
        """Tell whether ``crayon_attention`` applies, without waiting for a GPU."""
        dropout = self.training and self.attention_dropout > 0
        if dropout or self._implementation() not in _READABLE:
            return False
        if attention_mask is not None or past_key_values is None:
            return attention_mask is None or is_prefill_mask(attention_mask)
        length = past_key_values.get_seq_length(self.layer_idx)
        if isinstance(length, Tensor):  # a static cache that was used before
            readable = length.device.type == "cpu" and not torch.compiler.is_compiling()
            return readable and int(length) == 0
        return int(length) == 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        offsets: tuple[int | Tensor, int] = (0, 0),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the cache; a subclass may use another implementation.

        Args:
            query: ``[B, H, S, D]``, prepared.
            key: ``[B, G, keys, D]``, from the cache.
            value: ``[B, G, keys, D]``, from the cache.
            attention_mask: As in ``forward``, of four dimensions; None = causal.
            offsets: Positions of the first query and of the first key.
            **kwargs: Not used here.

        Returns:
            The mixed values ``[B, S, H, D]``, and the weights ``[B, H, S, keys]`` or None.

        Raises:
            ValueError: if the mask has not four dimensions.
        """
        if attention_mask is None and not (_OLDER and query.shape[2] == 1):
            attention_mask = visible_keys(
                query.shape[2],
                key.shape[2],
                window=self.sliding_window,
                query_offset=offsets[0],
                key_offset=offsets[1],
                device=query.device,
            )
        elif attention_mask is not None and attention_mask.ndim != 4:
            raise ValueError(
                "attention_mask: expected [B, 1, S, keys], got "
                f"{list(attention_mask.shape)}; expand a padding mask, or give crayon.key_range"
            )
        elif attention_mask is not None and _OLDER:  # eager's have a key more than there are
            attention_mask = attention_mask[..., : key.shape[2]]
        mixed = grouped_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return mixed.transpose(1, 2), None

    def _has_branch(self, crayon: CrayonInputs) -> bool:
        return self.crayon_mode == "projection" and crayon.table is not None

    def _project(self, hidden: Tensor, crayon: CrayonInputs) -> _Projected:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.crayon_mode == "attention" and crayon.table is not None:
            states, tables = project_tokens_and_rows(layers, hidden, crayon, crayon.table)
            q, k, v = (self._heads(x) for x in states)
            tq, tk, tv = (self._heads(x) for x in tables)
            return _Projected((q, k, v), (tq, tk, tv))
        q, k, v = (self._heads(project(layer, hidden, crayon.adapter_mask)) for layer in layers)
        if not self._has_branch(crayon):
            return _Projected((q, k, v), (None, None, None))
        table = self._heads(self.crayon_qkv(crayon.table).to(hidden.dtype))
        kv_heads = self.num_key_value_heads
        tq, tk, tv = torch.split(table, [self.num_heads, kv_heads, kv_heads], dim=-2)
        return _Projected((q, k, v), (tq, tk, tv))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

    def _prefill(
        self,
        projected: _Projected,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any | None,
        crayon: CrayonInputs,
    ) -> Tensor:
        (q, k, v), (tq, tk, tv) = projected
        cos, sin = position_embeddings if self.rotates else (None, None)
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
        cos, sin = position_embeddings if self.rotates else (None, None)
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
        offsets: tuple[int | Tensor, int] = (0, 0)
        if past_key_values is not None:
            if attention_mask is None:
                offsets = cache_offsets(past_key_values, q, self.layer_idx)
            k, v = past_key_values.update(k, v, self.layer_idx)
            if attention_mask is None and _OLDER:
                check_unmasked(q.shape[2], k.shape[2], int(offsets[0]), crayon.key_range)
        if attention_mask is None and crayon.key_range is not None:
            attention_mask = visible_keys(
                q.shape[2],
                k.shape[2],
                window=self.sliding_window,
                key_range=crayon.key_range,
                query_offset=offsets[0],
                key_offset=offsets[1],
                device=q.device,
            )
        return self.attend(q, k, v, attention_mask, offsets, **kwargs)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"layer_idx={self.layer_idx}, crayon_mode={self.crayon_mode!r}"


class RotaryCrayonAttention(OwnRotary, CrayonAttention):  # type: ignore[misc]
    """A ``CrayonAttention`` of ``from_attention``, for a decoder of transformers 4.37 to 4.47."""
