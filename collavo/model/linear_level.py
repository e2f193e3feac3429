"""A decoder layer whose linear layers carry the crayon and the adapters, whatever lies between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn

from collavo.model.layer import (
    MLP_BRANCHES,
    LayerCallMixin,
    LayerSettings,
    add_branches,
    convert_linear,
    decoder_linears,
    name_in_decoder,
    with_table,
)
from collavo_kernels.nn import (
    QKV_PROJECTIONS,
    BoundLinearMixin,
    CrayonAttention,
    CrayonInputs,
    CrayonLinearMixin,
    bound_crayon,
    current_crayon,
    with_mixin,
)

# Which branches, side by side, are the rows of which linear layers, side by side.
_ROWS_OF = (
    (("crayon_qkv",), ("q_proj", "k_proj", "v_proj")),
    (("crayon_qkv",), ("qkv_proj",)),
    (("crayon_o",), ("o_proj",)),
    (("crayon_gate",), ("gate_proj",)),
    (("crayon_up",), ("up_proj",)),
    (("crayon_gate", "crayon_up"), ("gate_up_proj",)),
)


class BoundLayerMixin(LayerCallMixin):
    """Put before a decoder-layer class: the crayon is bound while transformers' forward runs."""

    def forward(
        self,
        hidden_states: Tensor,
        crayon_table: Tensor | None = None,
        *,
        crayon: CrayonInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the layer's output ``[B, S, hidden_size]``.

        Args:
            hidden_states: ``[B, S, hidden_size]``.
            crayon_table: ``[T, hidden_size]``: the crayon's table where ``crayon`` is without it.
            crayon: The forward pass's crayon, or None.
            **kwargs: The layer's own.
        """
        if crayon is not None and crayon_table is not None:
            crayon = with_table(crayon, crayon_table)
        if isinstance(cast(Any, self).self_attn, CrayonAttention):
            kwargs["crayon"] = crayon  # which all of these layers hand on to their attention
        with bound_crayon(crayon):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]


class BranchedMixin:
    """Put before an attention's or MLP's class: in projection mode its branches make the rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, the branches' rows bound for its linear layers."""
        crayon = current_crayon()
        if crayon is None or crayon.table is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        tables = dict(self._tables(crayon.table))
        with bound_crayon(with_table(crayon, None), tables):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _tables(self, table: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        parts = cast(nn.Module, self)._modules
        for branches, names in _ROWS_OF:
            linears = [cast(nn.Module, parts[name]) for name in names if name in parts]
            if linears:
                rows = torch.cat([cast(Any, parts[name])(table) for name in branches], dim=-1)
                widths = [cast(int, linear.out_features) for linear in linears]
                yield from zip(linears, torch.split(rows, widths, dim=-1), strict=True)


def build_linears(part: nn.Module, layer: nn.Module, config: Any, settings: LayerSettings) -> None:
    """Replace the linear layers of an attention or an MLP by such that heed the bound crayon.

    Args:
        part: ``layer.self_attn`` or ``layer.mlp``. Its mixin, in projection mode, and the layer's
            are given to them by whoever calls this, since a class swap is theirs to undo.
        layer: The decoder layer.
        config: Its configuration.
        settings: What to make of it.

    Raises:
        ValueError: if a linear layer is of an unknown kind.
    """
    outputs = dict.fromkeys(MLP_BRANCHES, config.intermediate_size)
    for parent, name in list(decoder_linears(layer)):
        if parent is not part:
            continue
        made = convert_linear(getattr(part, name), settings, name_in_decoder(layer, name))
        joins = settings.crayon_mode == "attention" and name in QKV_PROJECTIONS
        mixin: Any = CrayonLinearMixin if joins else BoundLinearMixin
        made.__class__ = with_mixin(mixin, cast(Any, type(made)))
        setattr(part, name, made)
    if part is layer.self_attn:
        qkv = [getattr(part, name) for name in QKV_PROJECTIONS if name in part._modules]
        widths = sum(linear.out_features for linear in qkv)
        outputs = {"crayon_qkv": widths, "crayon_o": config.hidden_size}
    if settings.crayon_mode == "projection":
        add_branches(part, config, settings, outputs)
