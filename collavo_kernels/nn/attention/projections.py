"""Calls of an attention's linear layers: adapters masked, table rows added, rows without bias."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from collavo_kernels.nn.linear.module import DualQLoRALinear
from collavo_kernels.ops.qlora_linear import qlora_linear


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
    return qlora_linear(x, layer.weight, row_table=row_table, row_index=row_index, bias=layer.bias)


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
    bias = getattr(layer, "bias", None)
    if bias is None:
        return project(layer, x, adapter_mask)
    if not (isinstance(layer, DualQLoRALinear) or _is_plain(layer)):
        # Taken off again, a large bias would leave its rounding in the rows: they get none.
        names = [n for n, _ in layer.named_parameters() if n.split(".")[-1] == "bias"]
        none = {name: torch.zeros_like(layer.get_parameter(name)) for name in names}
        rows = torch.func.functional_call(layer, none, (x[tokens:],))
        return torch.cat([project(layer, x[:tokens], adapter_mask), rows])
    index = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    index[:tokens] = -1
    return project(layer, x, adapter_mask, -bias[None], index)


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
    rows = index.long()
    added = table.to(x.dtype)[rows.clamp_min(0)]
    return x + torch.where((rows >= 0)[..., None], added, torch.zeros_like(added))
