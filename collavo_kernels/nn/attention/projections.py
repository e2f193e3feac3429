"""What a forward pass knows of its image tokens, and the calls of linear layers that heed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from collavo_kernels._rows import add_rows, checked_index, sum_rows
from collavo_kernels.nn.linear.module import DualQLoRALinear, beside
from collavo_kernels.nn.linear.offload import has_hooks, has_own_forward
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


Call = Callable[..., Tensor]


def project(
    layer: nn.Module,
    x: Tensor,
    adapter_mask: Tensor | None,
    row_table: Tensor | None = None,
    row_index: Tensor | None = None,
    call: Call | None = None,
) -> Tensor:
    """Call a projection, its adapters masked and a row table added where there is one.

    Args:
        layer: ``DualQLoRALinear``, ``nn.Linear`` or any module that is called like one.
        x: ``[..., K]``.
        adapter_mask: uint8 ``[...]``: adapters that act, bit by bit; only ``DualQLoRALinear`` has
            some.
        row_table: ``[T, N]`` or None.
        row_index: int32 ``[...]``, -1 = no row.
        call: What computes the layer, from inside of it a forward of its class; None = the layer.

    Returns:
        ``[..., N]``.
    """
    if takes_adapter_mask(layer):
        masked: Tensor = (call or layer)(x, adapter_mask, row_table, row_index)
        return masked
    if row_table is None or row_index is None or not _is_plain(layer, call):
        result: Tensor = (call or layer)(x)
        return result if row_table is None else with_rows(result, row_table, row_index)
    plain: Any = layer
    table = beside(x, row_table)
    return qlora_linear(x, plain.weight, row_table=table, row_index=row_index, bias=plain.bias)


def takes_adapter_mask(layer: nn.Module) -> TypeGuard[DualQLoRALinear]:
    """Tell whether a layer is called as a ``DualQLoRALinear`` is: one, or PEFT's around one.

    Args:
        layer: Any.
    """
    return getattr(layer, "takes_adapter_mask", False) is True


def project_with_rows(
    layer: nn.Module,
    x: Tensor,
    adapter_mask: Tensor | None,
    tokens: int,
    call: Call | None = None,
) -> Tensor:
    """Call a projection on tokens and, behind them, rows, which get no bias.

    Args:
        layer: As in ``project``.
        x: ``[tokens + T, K]``.
        adapter_mask: uint8 ``[tokens + T]`` or None.
        tokens: How many of x are tokens.
        call: As in ``project``.

    Returns:
        ``[tokens + T, N]``.
    """
    if takes_adapter_mask(layer):
        # Its bias is read inside: offload brings it there alone.
        masked: Tensor = (call or layer)(x, adapter_mask, tokens=tokens)
        return masked
    if _is_plain(layer, call):
        bias = cast("Tensor | None", layer.bias)
        if bias is None:
            return project(layer, x, adapter_mask, call=call)
        index = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
        index[:tokens] = -1
        return project(layer, x, adapter_mask, -bias[None], index, call)
    biases = _biases(layer)
    if not biases:
        return project(layer, x, adapter_mask, call=call)
    # Taken off again, a large bias would leave its rounding in the rows: they get none.
    of_tokens = project(layer, x[:tokens], adapter_mask, call=call)
    return torch.cat([of_tokens, _rows_without_bias(layer, x[tokens:], biases, call)])


def _biases(layer: nn.Module) -> dict[str, Tensor]:
    """Return the biases of a layer and of what is inside, which may have some that it has not."""
    tensors = chain(layer.named_parameters(), layer.named_buffers())
    return {name: value for name, value in tensors if name.rpartition(".")[2] == "bias"}


def _rows_without_bias(
    layer: nn.Module, x: Tensor, biases: dict[str, Tensor], call: Call | None
) -> Tensor:
    hooked = [m for m in layer.modules() if has_own_forward(m) and (call is None or m is not layer)]
    if any(bias.is_meta for bias in biases.values()) or (hooked and call is not None):
        raise ValueError(
            f"projections: the bias of a {type(layer).__name__} is offloaded, or under hooks, so "
            "the crayon's rows cannot leave it out; take the offload's hooks off, or make the "
            "layer a DualQLoRALinear (from_linear(layer, adapters=(), quantized=False)) before"
        )
    if hooked:
        none = {name: torch.zeros_like(bias) for name, bias in biases.items()}
        swapped: Tensor = torch.func.functional_call(layer, none, (x,))
        return swapped
    twin = _without_bias(layer)
    rows: Tensor = twin(x) if call is None else cast(Any, call).__func__(twin, x)
    return rows


def _without_bias(layer: nn.Module) -> nn.Module:
    """Return a module with the same parameters whose biases, and those inside, are zero.

    The layer itself stays as it is: another thread may be running it.
    """
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(layer.__dict__)
    twin._modules = {
        name: None if inner is None else _without_bias(inner)
        for name, inner in layer._modules.items()
    }
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    parameter, buffer = twin._parameters.get("bias"), twin._buffers.get("bias")
    if parameter is not None:
        zero = torch.zeros_like(parameter)
        twin._parameters["bias"] = nn.Parameter(zero, requires_grad=False)
    if buffer is not None:
        twin._buffers["bias"] = torch.zeros_like(buffer)
    return twin


def _is_plain(layer: nn.Module, call: Call | None) -> bool:
    """Whether calling the layer is the product with its weight and nothing more.

    A subclass (bitsandbytes' 4 bits, a wrapper of another package) has a forward of its own, and
    so has a layer with hooks.
    """
    if call is not None:
        return getattr(call, "__func__", None) is nn.Linear.forward
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not has_hooks(layer)


class _AddRows(torch.autograd.Function):
    """``x + table[index]``, whose backward sums a row's tokens in their order, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return add_rows(x, table, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        (index,) = ctx.saved_tensors
        wide = grad if grad.dtype == torch.float64 else grad.float()
        return grad, sum_rows(wide, index, ctx.rows).to(ctx.dtype), None


def with_rows(x: Tensor, table: Tensor, index: Tensor | None) -> Tensor:
    """Return ``x + table[index]`` in x's dtype; x's values where there is no row.

    Args:
        x: ``[..., N]``.
        table: ``[T, N]``.
        index: int32 ``[...]``, -1 = no row.

    Raises:
        ValueError: if the index is None, or on a CPU lies outside the table.
    """
    if index is None:
        raise ValueError("row_index: expected a tensor beside row_table, got None")
    summed: Tensor = _AddRows.apply(x, table, checked_index(index, table.shape[0]))  # type: ignore[no-untyped-call]
    return summed


def project_tokens_and_rows(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    crayon: CrayonInputs,
    table: Tensor,
    call: Call | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Call projections on tokens with the crayon's rows behind them: one pass per weight.

    Args:
        layers: As in ``project``, each with outputs of its own.
        hidden: ``[..., K]``.
        crayon: Its masks are read.
        table: ``[T, K]``: its rows.
        call: As in ``project``, of a single layer.

    Returns:
        Per layer the tokens' outputs ``[..., N]`` and the rows' ``[T, N]``, without bias.

    Raises:
        ValueError: if the table has another width, or one of the two masks is missing.
    """
    if table.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"crayon.table: expected [T, {hidden.shape[-1]}], a vector of the hidden size per "
            f"row, got {list(table.shape)}"
        )
    tokens = hidden.shape[:-1].numel()
    x = torch.cat([hidden.flatten(0, -2), table.to(hidden.dtype)])
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
        y = project_with_rows(layer, x, mask, tokens, call)
        states.append(y[:tokens].view(*hidden.shape[:-1], y.shape[-1]))
        tables.append(y[tokens:])
    return states, tables
