"""What a forward pass knows of its image tokens, and the calls of linear layers that heed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from collavo_kernels._rows import add_rows, checked_index
from collavo_kernels.nn.linear.module import DualQLoRALinear, beside
from collavo_kernels.ops.qlora_linear import qlora_linear


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
            ``crayon_attention`` applies; None = each layer decides, from its mask and cache.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from collavo_kernels.nn import CrayonAttention
        >>> config = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
        >>> rows = torch.tensor([[-1, 0, 0, 1, -1]], dtype=torch.int32)
        >>> crayon = CrayonInputs(table=torch.randn(2, 64), row_index=rows)
        >>> turn, hidden = torch.ones(1, 5, 16), torch.randn(1, 5, 64)
        >>> attention = CrayonAttention(config, 0)
        >>> plain, _ = attention(hidden, (turn, 0 * turn))
        >>> drawn, _ = attention(hidden, (turn, 0 * turn), crayon=crayon)
        >>> (drawn != plain).any(dim=2).tolist()
        [[False, True, True, True, True]]
    """

    table: Tensor | None = None
    row_index: Tensor | None = None
    adapter_mask: Tensor | None = None
    row_mask: Tensor | None = None
    key_range: Tensor | None = None
    fused: bool | None = None


def project(
    layer: nn.Module,
    x: Tensor,
    adapter_mask: Tensor | None,
    row_table: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """Call a projection, its adapters masked and a row table added where there is one.

    Args:
        layer: ``DualQLoRALinear``, ``nn.Linear`` or any module that is called like one.
        x: ``[..., K]``.
        adapter_mask: uint8 ``[...]``: adapters that act, bit by bit; only ``DualQLoRALinear`` has
            some.
        row_table: ``[T, N]`` or None.
        row_index: int32 ``[...]``, -1 = no row.

    Returns:
        ``[..., N]``.
    """
    if isinstance(layer, DualQLoRALinear):
        masked: Tensor = layer(x, adapter_mask, row_table, row_index)
        return masked
    if row_table is None or row_index is None or not _is_plain(layer):
        result: Tensor = layer(x)
        return result if row_table is None else _with_rows(result, row_table, row_index)
    table = beside(x, row_table)
    return qlora_linear(x, layer.weight, row_table=table, row_index=row_index, bias=layer.bias)


def project_with_rows(
    layer: nn.Module, x: Tensor, adapter_mask: Tensor | None, tokens: int
) -> Tensor:
    """Call a projection on tokens and, behind them, rows, which get no bias.

    Args:
        layer: As in ``project``.
        x: ``[tokens + T, K]``.
        adapter_mask: uint8 ``[tokens + T]`` or None.
        tokens: How many of x are tokens.

    Returns:
        ``[tokens + T, N]``.
    """
    if isinstance(layer, DualQLoRALinear):
        # Its bias is read inside: offload brings it there alone.
        masked: Tensor = layer(x, adapter_mask, tokens=tokens)
        return masked
    bias = getattr(layer, "bias", None)
    if bias is None:
        return project(layer, x, adapter_mask)
    if not _is_plain(layer):
        # Taken off again, a large bias would leave its rounding in the rows: they get none.
        names = [n for n, _ in layer.named_parameters() if n.split(".")[-1] == "bias"]
        none = {name: torch.zeros_like(layer.get_parameter(name)) for name in names}
        _refuse_offloaded(layer, none)
        rows = torch.func.functional_call(layer, none, (x[tokens:],))
        return torch.cat([project(layer, x[:tokens], adapter_mask), rows])
    index = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    index[:tokens] = -1
    return project(layer, x, adapter_mask, -bias[None], index)


def _refuse_offloaded(layer: nn.Module, biases: dict[str, Tensor]) -> None:
    if any(bias.is_meta for bias in biases.values()):
        raise ValueError(
            f"projections: the bias of a {type(layer).__name__} is offloaded, so the crayon's rows "
            "cannot leave it out; take the offload's hooks off, or make the layer a "
            "DualQLoRALinear (from_linear(layer, adapters=(), quantized=False)) before"
        )


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is the product with its weight and nothing more.

    A subclass (bitsandbytes' 4 bits, a wrapper of another package) has a forward of its own, and
    so has a layer with hooks.
    """
    own = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not own


def _with_rows(x: Tensor, table: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        raise ValueError("row_index: expected a tensor beside row_table, got None")
    return add_rows(x, table, checked_index(index, table.shape[0]))


def project_tokens_and_rows(
    layers: Sequence[nn.Module], hidden: Tensor, crayon: CrayonInputs, table: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Call projections on tokens with the crayon's rows behind them: one pass per weight.

    Args:
        layers: As in ``project``, each with outputs of its own.
        hidden: ``[B, S, K]``.
        crayon: Its masks are read.
        table: ``[T, K]``: its rows.

    Returns:
        Per layer the tokens' outputs ``[B, S, N]`` and the rows' ``[T, N]``, without bias.

    Raises:
        ValueError: if the table has another width, or one of the two masks is missing.
    """
    if table.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"crayon.table: expected [T, {hidden.shape[-1]}], a vector of the hidden size per "
            f"row, got {list(table.shape)}"
        )
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
        y = project_with_rows(layer, x, mask, tokens)
        states.append(y[:tokens].view(*hidden.shape[:2], y.shape[-1]))
        tables.append(y[tokens:])
    return states, tables
