"""A transformers decoder layer made to carry the crayon and the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from collavo.configuration import CollavoTextConfig
from collavo.model.linear import CollavoLinear
from collavo.model.peft_layers import copy_adapters, is_peft_layer
from collavo_kernels.nn import (
    ATTENTION_PROJECTIONS,
    QKV_PROJECTIONS,
    CrayonAttention,
    CrayonBranch,
    CrayonInputs,
    register_attention,
    sdpa_without_plans,
)

HOOKS_OFF = "accelerate's: remove_hook_from_module(model, recurse=True) of accelerate.hooks"
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LINEARS = {
    "self_attn": (*QKV_PROJECTIONS, "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}
"""The linear layers that a decoder layer can have, by the part of it that has them."""
MLP_BRANCHES = ("crayon_gate", "crayon_up")
BRANCHES = ("crayon_qkv", "crayon_o", *MLP_BRANCHES)

register_attention()


class CollavoAttention(CrayonAttention):
    """``CrayonAttention`` that, without the fused prefill, uses the configured attention."""

    def _check_implementation(self) -> None:
        """Every implementation reads its own masks in ``attend``."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        offsets: tuple[int | Tensor, int] = (0, 0),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with transformers' registered implementation (SDPA, eager, flash, flex)."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        with sdpa_without_plans(query):
            mixed, weights = interface(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
        return cast(Tensor, mixed), cast("Tensor | None", weights)


class CrayonMLPMixin:
    """Put before a LLaMA-shaped MLP class: its linear layers are told of the image tokens.

    transformers' own forward calls them with one argument, which has no room for that.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor, crayon: CrayonInputs | None = None) -> Tensor:
        """Return ``down(act(gate(x)) * up(x))``, in projection mode with rows for gate and up.

        Args:
            x: ``[B, S, hidden_size]``.
            crayon: The forward pass's crayon, or None.
        """
        crayon = CrayonInputs() if crayon is None else crayon
        gate, up = (
            linear(x, crayon.adapter_mask, *self._rows(branch, crayon))
            for linear, branch in zip((self.gate_proj, self.up_proj), MLP_BRANCHES, strict=True)
        )
        return cast(Tensor, self.down_proj(self.act_fn(gate) * up, crayon.adapter_mask))

    def _rows(self, branch: str, crayon: CrayonInputs) -> tuple[Tensor | None, Tensor | None]:
        """Return a branch's table ``[T, intermediate_size]`` and the row index, or None twice."""
        if crayon.table is None or not hasattr(self, branch):
            return None, None
        return cast(Tensor, getattr(self, branch)(crayon.table)), crayon.row_index


class LayerCallMixin:
    """The call of a decoder layer with a crayon, under either kind of checkpointing too."""

    def __call__(
        self, hidden_states: Tensor, *, crayon: CrayonInputs | None = None, **kwargs: Any
    ) -> Any:
        """Run ``forward``, the crayon's table beside the hidden states.

        Re-entrant checkpointing takes gradients to tensors among the positional arguments alone.

        Raises:
            ValueError: if none of those asks for a gradient under it: what is trained inside the
                layer would get none; or if adapters act on image tokens alone and nothing says
                where those are.
        """
        if crayon is None:
            self._check_adapters()
        table = None if crayon is None else crayon.table
        if crayon is not None:
            crayon = with_table(crayon, None)
        if getattr(self, "gradient_checkpointing", False):
            self._check_checkpointing(hidden_states, table)
        return super().__call__(hidden_states, table, crayon=crayon, **kwargs)  # type: ignore[misc]

    def _check_adapters(self) -> None:
        names = getattr(cast(Any, self).mlp.down_proj, "image_adapters", ())
        if names:
            raise ValueError(
                f"crayon: expected the image tokens' places, on which alone {list(names)} act, got "
                "None: the decoder was called by itself; call the LLaVA model around it"
            )

    def _check_checkpointing(self, hidden_states: Tensor, table: Tensor | None) -> None:
        module = cast(nn.Module, self)
        arguments = getattr(module._gradient_checkpointing_func, "keywords", None)
        if not module.training or arguments is None or not arguments.get("use_reentrant", True):
            return
        asks = hidden_states.requires_grad or (table is not None and table.requires_grad)
        if torch.is_grad_enabled() and not asks:
            trained = [name for name, p in module.named_parameters() if p.requires_grad]
            if trained:
                raise ValueError(
                    f"gradient checkpointing: expected an input of the layer that asks for a "
                    f"gradient, or use_reentrant=False, got neither, so {trained[0]} would get "
                    "none; enable it with {'use_reentrant': False}, or call "
                    "model.enable_input_require_grads()"
                )


class CrayonLayerMixin(LayerCallMixin):
    """Put before a LLaMA-shaped decoder-layer class: hands the crayon to attention and MLP.

    The forward is LLaMA's, Mistral's and Qwen2's line by line, but for the MLP's argument: theirs
    sends the crayon to the attention alone.
    """

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        crayon_table: Tensor | None = None,
        attention_mask: Any | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        crayon: CrayonInputs | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output ``[B, S, hidden_size]``.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            crayon_table: ``[T, hidden_size]``: the crayon's table where ``crayon`` is without it.
            attention_mask: As the decoder layer's, like all that are not described.
            position_ids: int64 ``[B, S]``.
            past_key_values: The cache, or None.
            use_cache: Passed on.
            position_embeddings: cos and sin.
            crayon: The forward pass's crayon, or None.
            **kwargs: Passed on to the attention.
        """
        if crayon is not None and crayon_table is not None:
            crayon = with_table(crayon, crayon_table)
        mixed, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            crayon=crayon,
            **kwargs,
        )
        hidden_states = hidden_states + mixed
        normed = self.post_attention_layernorm(hidden_states)
        return cast(Tensor, hidden_states + self.mlp(normed, crayon=crayon))


def with_table(crayon: CrayonInputs, table: Tensor | None) -> CrayonInputs:
    """Return a crayon with another table.

    Args:
        crayon: A forward pass's.
        table: ``[T, hidden_size]`` or None.
    """
    # Field by field: torch 2.6 compiles neither _replace nor a slice of a named tuple.
    return CrayonInputs(
        table,
        crayon.row_index,
        crayon.adapter_mask,
        crayon.row_mask,
        crayon.key_range,
        crayon.fused,
    )


@dataclass(frozen=True)
class LayerSettings:
    """What makes a decoder layer a CoLLaVO layer; see ``CollavoTextConfig`` for the fields.

    Attributes:
        adapters: Rank and alpha of each adapter, by name, in the order of the mask's bits.
        sizes: Rank and alpha where a layer has others: by adapter and the layer's name.
        image_adapters: Those that act on image tokens alone.
    """

    crayon_mode: Literal["attention", "projection", "none"] = "attention"
    crayon_rank: int = 256
    crayon_scaling: float = 1.0
    crayon_dropout: float = 0.0
    adapters: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, tuple[int, float]]] = field(default_factory=dict)
    image_adapters: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    quantize: str | None = None
    double_quant: bool = True
    quant_block_size: int = 64
    adapter_dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, config: CollavoTextConfig) -> LayerSettings:
        """Read the settings from a text configuration."""
        own = ("adapters", "sizes", "adapter_dtype")
        given = {
            name: getattr(config, name) for name in cls.__dataclass_fields__ if name not in own
        }
        return cls(
            **given,
            adapters={name: config.adapter_size(name) for name in config.adapters},
            sizes={name: config.layer_sizes(name) for name in config.adapters},
            adapter_dtype=trainable_dtype(config),
        )


def trainable_dtype(config: CollavoTextConfig) -> torch.dtype:
    """Return the dtype of adapters and crayon."""
    if config.adapter_dtype is not None:
        return cast(torch.dtype, getattr(torch, config.adapter_dtype))
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def build_layer(layer: nn.Module, config: Any, settings: LayerSettings) -> None:
    """Replace a decoder layer's attention and linear layers, keeping their parameters.

    Args:
        layer: A LLaMA-shaped decoder layer. Its MLP and itself are given the two mixins by whoever
            calls this, since a class swap is theirs to undo.
        config: Its configuration.
        settings: What to make of it.

    Raises:
        ValueError: if a linear layer is of an unknown kind, or ``crayon_attention`` cannot serve
            the configuration.
    """
    build_attention(layer, settings)
    mlp = cast(nn.Module, layer.mlp)
    for name in MLP_PROJECTIONS:
        setattr(
            mlp, name, convert_linear(getattr(mlp, name), settings, name_in_decoder(layer, name))
        )
    if settings.crayon_mode == "projection":
        add_branches(mlp, config, settings, dict.fromkeys(MLP_BRANCHES, config.intermediate_size))


def build_attention(layer: nn.Module, settings: LayerSettings) -> None:
    """Put a ``CollavoAttention`` into the place of a decoder layer's attention.

    Args:
        layer: A decoder layer.
        settings: What to make of it.

    Raises:
        ValueError: as ``build_layer``.
    """
    attention = cast(nn.Module, layer.self_attn)
    made = {
        name: convert_linear(getattr(attention, name), settings, name_in_decoder(layer, name))
        for name in ATTENTION_PROJECTIONS
    }
    layer.self_attn = CollavoAttention.from_attention(
        attention,
        crayon_mode=settings.crayon_mode,
        crayon_rank=settings.crayon_rank,
        crayon_scaling=settings.crayon_scaling,
        crayon_dropout=settings.crayon_dropout,
        crayon_dtype=settings.adapter_dtype,
        projections=cast("dict[str, nn.Module]", made),
    )


def add_branches(
    part: nn.Module, config: Any, settings: LayerSettings, outputs: Mapping[str, int]
) -> None:
    """Give an attention or an MLP the branches of projection mode.

    Args:
        part: Its linear layers are converted.
        config: The decoder's configuration.
        settings: Of the layer.
        outputs: How many a branch has, by its name.
    """
    device = next(m.weight.device for m in part.modules() if isinstance(m, CollavoLinear))
    for name, out_features in outputs.items():
        branch = CrayonBranch(
            config.hidden_size,
            out_features,
            rank=settings.crayon_rank,
            scaling=settings.crayon_scaling,
            dropout=settings.crayon_dropout,
            device=device,
            dtype=settings.adapter_dtype,
        )
        part.add_module(name, branch.train(part.training))


def adapt_layer(layer: nn.Module, settings: LayerSettings) -> None:
    """Bring a built layer to new settings: more adapters, 4 bits, a frozen base.

    Args:
        layer: A decoder layer that ``build_layer`` made.
        settings: What to make of it.
    """
    for parent, name in decoder_linears(layer):
        full_name = name_in_decoder(layer, name)
        setattr(parent, name, convert_linear(getattr(parent, name), settings, full_name))
    freeze_linears(layer)


def freeze_linears(layer: nn.Module) -> None:
    """Take weights and biases of a built layer's linear layers out of training; adapters stay in.

    Args:
        layer: A decoder layer that ``build_layer`` made.
    """
    for parent, name in decoder_linears(layer):
        for parameter in getattr(parent, name).parameters(recurse=False):
            parameter.requires_grad_(False)


def decoder_linears(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the linear layers of a decoder layer, seven or with fused ones fewer: (parent, name).

    Args:
        layer: A decoder layer.
    """
    for part, names in LINEARS.items():
        parent = cast(nn.Module, getattr(layer, part))
        for name in names:
            if name in parent._modules:
                yield parent, name


def name_in_decoder(layer: nn.Module, name: str) -> str:
    """Return the name that a linear layer of a decoder layer has in the decoder.

    Args:
        layer: The decoder layer.
        name: One of the names that ``decoder_linears`` yields.
    """
    part = next(part for part, names in LINEARS.items() if name in names)
    return f"layers.{cast(Any, layer.self_attn).layer_idx}.{part}.{name}"


def adapter_sizes(decoder: nn.Module) -> dict[str, dict[str, tuple[int, float]]]:
    """Return rank and alpha by adapter and by the linear layer's name in the decoder.

    Args:
        decoder: Its ``layers`` are such that ``build_layer`` made.
    """
    sizes: dict[str, dict[str, tuple[int, float]]] = {}
    for layer in cast(nn.ModuleList, decoder.layers):
        for parent, name in decoder_linears(layer):
            linear = cast(CollavoLinear, getattr(parent, name))
            full_name = name_in_decoder(layer, name)
            for adapter in linear.adapter_names:
                sizes.setdefault(adapter, {})[full_name] = linear.adapter_size(adapter)
    return sizes


def convert_linear(linear: nn.Module, settings: LayerSettings, name: str) -> CollavoLinear:
    """Return a ``CollavoLinear`` with the settings' adapters; a dense weight is shared.

    Args:
        linear: ``nn.Linear``, bitsandbytes' ``Linear4bit``, one of these inside PEFT's LoRA layer
            (its adapters are copied), or ``CollavoLinear`` (changed in place).
        settings: What to make of it.
        name: What to call it in an error.

    Raises:
        ValueError: if the layer is of another kind.
    """
    if is_peft_layer(linear):
        converted = convert_linear(cast(nn.Module, linear.base_layer), settings, name)
        copy_adapters(linear, converted)
        return converted.train(linear.training)
    options: dict[str, Any] = {
        "adapters": (),
        "dropout": settings.lora_dropout,
        "block_size": settings.quant_block_size,
        "double_quant": settings.double_quant,
    }
    if isinstance(linear, CollavoLinear):
        made = linear
        made.dropout = settings.lora_dropout
    elif type(linear) is nn.Linear:
        quantized = settings.quantize is not None
        made = cast(
            CollavoLinear, CollavoLinear.from_linear(linear, quantized=quantized, **options)
        )
    elif type(linear).__name__ == "Linear4bit":
        made = cast(CollavoLinear, CollavoLinear.from_bitsandbytes(linear, **options))
    else:
        raise ValueError(
            f"{name}: expected nn.Linear or bitsandbytes' Linear4bit, got "
            f"{type(linear).__module__}.{type(linear).__qualname__}; "
            "put back first what was there (PEFT: merge_and_unload(); swap_linears returned it)"
        )
    if settings.quantize is not None and not made.quantized:
        made.quantize(settings.quant_block_size, settings.double_quant)
    made.image_adapters = tuple(settings.image_adapters)
    for adapter, usual in settings.adapters.items():
        if adapter not in made.adapter_names:
            rank, alpha = settings.sizes.get(adapter, {}).get(name, usual)
            made.add_adapter(adapter, rank, alpha, settings.adapter_dtype or torch.float32)
    return made.train(linear.training)
