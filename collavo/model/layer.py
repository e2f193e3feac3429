"""A transformers decoder layer made to carry the crayon and the adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from collavo.configuration import CollavoTextConfig
from collavo_kernels import quantize_nf4
from collavo_kernels.nn import (
    ATTENTION_PROJECTIONS,
    CrayonAttention,
    CrayonBranch,
    CrayonInputs,
    DualQLoRALinear,
    LoRAFactor,
    register_attention,
)

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MLP_BRANCHES = ("crayon_gate", "crayon_up")
BRANCHES = ("crayon_qkv", "crayon_o", *MLP_BRANCHES)

register_attention()


class CollavoLinear(DualQLoRALinear):
    """A linear layer that takes its mask and row table from the decoder layer around it.

    transformers' MLP calls its linear layers with one argument. The decoder layer sets ``call``
    before and clears it after, inside its own forward, so that activation checkpointing repeats
    both.
    """

    call: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def add_adapter(self, name: str, rank: int, alpha: float, dtype: torch.dtype) -> None:
        """Put one more adapter beside those that are there; its B is zero.

        Args:
            name: Its name.
            rank: R.
            alpha: Its scaling is ``alpha / rank``.
            dtype: dtype of its A and B.
        """
        device = self.weight.device
        self.lora_A[name] = LoRAFactor(rank, self.in_features, device, dtype)
        self.lora_B[name] = LoRAFactor(self.out_features, rank, device, dtype)
        self.adapter_names = (*self.adapter_names, name)
        self.scaling[name] = alpha / rank
        for factor, zero in ((self.lora_A[name], False), (self.lora_B[name], True)):
            cast(Any, factor).starts_at_zero = zero
            if device.type != "meta":
                init_leaf(factor)

    def quantize(self, block_size: int, double_quant: bool) -> None:
        """Replace the dense weight by its NF4 bytes.

        Args:
            block_size: Weights per scale.
            double_quant: Whether to quantise the scales too.
        """
        if self.weight.is_meta:
            self.block_size, self.double_quant, self.quantized = block_size, double_quant, True
            self._make_base(self.bias is not None, "meta")
            return
        self._take(quantize_nf4(self.weight.detach(), block_size, double_quant))
        self.quantized = True

    def draw_base(self, std: float) -> None:
        """Draw the base from a normal distribution, unless a checkpoint brought it.

        Args:
            std: Its standard deviation.
        """
        if self.weight_scales is None:
            init.normal_(self.weight, mean=0.0, std=std)
        elif not getattr(self.weight, "_is_hf_initialized", False):
            shape = (self.out_features, self.in_features)
            dense = torch.randn(shape, dtype=self.base_dtype, device=self.weight.device) * std
            drawn = quantize_nf4(dense, self.block_size, self.double_quant)
            self.unpack()
            self.weight.data.copy_(drawn.packed)
            self.weight_scales.data.copy_(drawn.scales)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # transformers plans a load from the state dict of a model on "meta". Without bytes there is
        # no bitsandbytes layout: the parameters themselves stand for it, and the loader
        # (collavo.loading) brings the file to them.
        if self.weight.is_meta:
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(
        self,
        x: Tensor,
        adapter_mask: Tensor | None = None,
        row_table: Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> Tensor:
        """Return ``[..., out_features]``; as ``DualQLoRALinear``, with defaults from ``call``."""
        mask, table, index = self.call
        if adapter_mask is None:
            adapter_mask = mask
        if row_table is None:
            row_table, row_index = table, index
        return super().forward(x, adapter_mask, row_table, row_index)


def init_leaf(module: nn.Module, std: float = 0.02) -> bool:
    """Draw a module of this package that has parameters of its own; tell whether it was one.

    What is marked ``starts_at_zero`` does: an adapter's B and, of each crayon path, exactly one
    factor.

    Args:
        module: Any module.
        std: Standard deviation of what starts at random.
    """
    if isinstance(module, CollavoLinear):
        module.draw_base(std)
    elif getattr(module, "starts_at_zero", False):
        for parameter in module.parameters(recurse=False):
            init.zeros_(parameter)
    elif isinstance(module, LoRAFactor):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    else:
        return False
    return True


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


class CrayonLayerMixin:
    """Put before a decoder-layer class: hands the crayon to the MLP's linear layers."""

    mlp: nn.Module

    def forward(
        self, hidden_states: Tensor, *args: Any, crayon: CrayonInputs | None = None, **kwargs: Any
    ) -> Any:
        """Run the layer of the class behind this one.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            *args: As the decoder layer's.
            crayon: The forward pass's crayon, or None.
            **kwargs: As the decoder layer's.
        """
        forward = cast(Callable[..., Any], super().forward)  # type: ignore[misc]
        if crayon is None:
            return forward(hidden_states, *args, **kwargs)
        layers = [cast(CollavoLinear, getattr(self.mlp, name)) for name in MLP_PROJECTIONS]
        tables = (*mlp_tables(self.mlp, crayon), None)
        try:
            for layer, table in zip(layers, tables, strict=True):
                layer.call = (
                    crayon.adapter_mask,
                    table,
                    crayon.row_index if table is not None else None,
                )
            return forward(hidden_states, *args, crayon=crayon, **kwargs)
        finally:
            for layer in layers:
                layer.call = (None, None, None)


def mlp_tables(mlp: nn.Module, crayon: CrayonInputs) -> tuple[Tensor | None, Tensor | None]:
    """Return the tables of gate and up, each ``[T, intermediate_size]``, or None twice."""
    if crayon.table is None or not hasattr(mlp, MLP_BRANCHES[0]):
        return None, None
    gate, up = (cast(Tensor, getattr(mlp, name)(crayon.table)) for name in MLP_BRANCHES)
    return gate, up


@dataclass(frozen=True)
class LayerSettings:
    """What makes a decoder layer a CoLLaVO layer; see ``CollavoTextConfig`` for the fields.

    Attributes:
        adapters: Rank and alpha of each adapter, by name, in the order of the mask's bits.
    """

    crayon_mode: Literal["attention", "projection", "none"] = "attention"
    crayon_rank: int = 256
    crayon_scaling: float = 1.0
    crayon_dropout: float = 0.0
    adapters: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    lora_dropout: float = 0.0
    quantize: str | None = None
    double_quant: bool = True
    quant_block_size: int = 64
    adapter_dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, config: CollavoTextConfig) -> LayerSettings:
        """Read the settings from a text configuration."""
        own = ("adapters", "adapter_dtype")
        given = {
            name: getattr(config, name) for name in cls.__dataclass_fields__ if name not in own
        }
        return cls(
            **given,
            adapters={name: config.adapter_size(name) for name in config.adapters},
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
        layer: A LLaMA-shaped decoder layer.
        config: Its configuration.
        settings: What to make of it.

    Raises:
        ValueError: if a linear layer is of an unknown kind, or ``crayon_attention`` cannot serve
            the configuration.
    """
    attention, mlp = cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)
    made = {name: convert_linear(getattr(attention, name), settings, name) for name in ATTENTION_PROJECTIONS}
    layer.self_attn = CollavoAttention.from_attention(
        attention,
        crayon_mode=settings.crayon_mode,
        crayon_rank=settings.crayon_rank,
        crayon_scaling=settings.crayon_scaling,
        crayon_dropout=settings.crayon_dropout,
        crayon_dtype=settings.adapter_dtype,
        projections=cast("dict[str, nn.Module]", made),
    )
    for name in MLP_PROJECTIONS:
        setattr(mlp, name, convert_linear(getattr(mlp, name), settings, name))
    if settings.crayon_mode == "projection":
        device = made["q_proj"].weight.device
        for name in MLP_BRANCHES:
            branch = CrayonBranch(
                config.hidden_size,
                config.intermediate_size,
                rank=settings.crayon_rank,
                scaling=settings.crayon_scaling,
                dropout=settings.crayon_dropout,
                device=device,
                dtype=settings.adapter_dtype,
            )
            mlp.add_module(name, branch.train(layer.training))


def adapt_layer(layer: nn.Module, settings: LayerSettings) -> None:
    """Bring a built layer to new settings: more adapters, 4 bits, a frozen base.

    Args:
        layer: A decoder layer that ``build_layer`` made.
        settings: What to make of it.
    """
    for parent, name in decoder_linears(layer):
        setattr(parent, name, convert_linear(getattr(parent, name), settings, name))
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
    """Yield the seven linear layers of a decoder layer, each as (parent, name)."""
    for name in ATTENTION_PROJECTIONS:
        yield cast(nn.Module, layer.self_attn), name
    for name in MLP_PROJECTIONS:
        yield cast(nn.Module, layer.mlp), name


def convert_linear(linear: nn.Module, settings: LayerSettings, name: str) -> CollavoLinear:
    """Return a ``CollavoLinear`` with the settings' adapters; a dense weight is shared.

    Args:
        linear: ``nn.Linear``, bitsandbytes' ``Linear4bit`` or ``CollavoLinear`` (changed in place).
        settings: What to make of it.
        name: What to call it in an error.

    Raises:
        ValueError: if the layer is of another kind.
    """
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
            f"{name}: expected nn.Linear or bitsandbytes' Linear4bit, got {type(linear).__name__}; "
            "merge or unload other wrappers (PEFT: merge_and_unload()) first"
        )
    if settings.quantize is not None and not made.quantized:
        made.quantize(settings.quant_block_size, settings.double_quant)
    for adapter, (rank, alpha) in settings.adapters.items():
        if adapter not in made.adapter_names:
            made.add_adapter(adapter, rank, alpha, settings.adapter_dtype or torch.float32)
    return made.train(linear.training)
