"""The crayon in linear layers themselves: for any attention, whatever it does with q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from collavo_kernels.nn.attention.projections import (
    Call,
    CrayonInputs,
    project,
    project_tokens_and_rows,
    with_rows,
)
from collavo_kernels.nn.bound import current_crayon, current_table
from collavo_kernels.nn.linear.offload import has_own_forward
from collavo_kernels.nn.mixins import with_mixin

_APART = ("q_proj", "k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "W_pack")
QKV_PROJECTIONS = (*_APART, *_FUSED)
"""Linear layers that make queries, keys and values, by the names that they have in decoders."""


def qkv_names(attention: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's linear layers for q, k and v; none where it has not all.

    Args:
        attention: Any.
    """
    children = dict(attention.named_children())
    if all(name in children for name in _APART):
        return _APART
    return tuple(name for name in _FUSED if name in children)[:1]


def qkv_words() -> str:
    """Return what an error expects of an attention."""
    return f"{', '.join(_APART)} (or one of {', '.join(_FUSED)})"


class BoundLinearMixin:
    """Put before a linear layer's class: it heeds the adapter masks of the bound crayon.

    Where a row table is bound for it, the rows join its output: ``y = W x + b + table[row]``. With
    no crayon bound the layer is what it was.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[..., K]``; the bound crayon's ``row_index`` and ``adapter_mask`` are of its
                leading shape.
            *args: As the layer's own; refused beside a crayon.
            **kwargs: As the layer's own; refused beside a crayon.

        Raises:
            ValueError: if a bound crayon is of other tokens, or there are further arguments.
        """
        call: Call = super().forward  # type: ignore[misc]
        crayon = current_crayon()
        if crayon is None:
            return call(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(
                f"{type(self).__name__}: expected its input alone while a crayon is bound, got "
                f"further arguments {[*map(type, args), *kwargs]}"
            )
        return self._with_crayon(x, crayon, call)

    def _with_crayon(self, x: Tensor, crayon: CrayonInputs, call: Call) -> Tensor:
        layer = cast(nn.Module, self)
        table = current_table(layer)
        if crayon.adapter_mask is not None:
            _check_places(layer, "adapter_mask", crayon.adapter_mask, x)
        if table is None:
            return project(layer, x, crayon.adapter_mask, call=call)
        index = _row_index(layer, crayon, x)
        return project(layer, x, crayon.adapter_mask, table, index, call)


class CrayonLinearMixin(BoundLinearMixin):
    r"""Put before the class of a layer that makes q, k or v: the bound crayon joins its input.

    ``y = W (h + c[row]) + b``, computed as ``W h + b + (W c)[row]``: tokens and rows go through the
    weight together, the rows without the bias, each with the adapters of its mask. That is exact
    for what is linear: ``nn.Linear``, ``DualQLoRALinear``, bitsandbytes' ``Linear4bit``, one of
    them with PEFT's LoRA (dropout 0) around it, and a fused ``qkv_proj`` of any of these.
    """

    def _with_crayon(self, x: Tensor, crayon: CrayonInputs, call: Call) -> Tensor:
        layer = cast(nn.Module, self)
        if crayon.table is None:
            return super()._with_crayon(x, crayon, call)
        index = _row_index(layer, crayon, x)
        if crayon.adapter_mask is not None:
            _check_places(layer, "adapter_mask", crayon.adapter_mask, x)
        (y,), (table,) = project_tokens_and_rows((layer,), x, crayon, crayon.table, call)
        return with_rows(y, table, index)


def add_crayon_to_linears(
    attention: nn.Module, names: Sequence[str] | None = None
) -> list[nn.Module]:
    """Let the layers that make q, k and v add the bound crayon, whatever their attention does then.

    The class of each gets ``CrayonLinearMixin`` in front, on this instance alone; parameters,
    state-dict keys and hooks stay. While ``bound_crayon(crayon)`` is entered, what calls them gets
    q, k and v with the crayon; otherwise nothing changes. Adapters of PEFT go on before: put around
    a layer that carries the crayon, they would not see it (around a ``DualQLoRALinear`` they do).

    Args:
        attention: Its linear layers make q, k and v.
        names: Of these layers; None = ``q_proj``, ``k_proj`` and ``v_proj``, or a fused one of
            ``QKV_PROJECTIONS``.

    Returns:
        The layers, for ``remove_crayon_from_linears``.

    Raises:
        ValueError: if the attention has not all of them, or one that carries the crayon already or
            is no linear layer; nothing is changed then.

    Example:
        >>> import torch
        >>> from collavo_kernels.nn import CrayonInputs, bound_crayon
        >>> attention = nn.ModuleDict({"qkv_proj": nn.Linear(8, 24)})
        >>> layers = add_crayon_to_linears(attention)
        >>> rows = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
        >>> with bound_crayon(CrayonInputs(table=torch.randn(2, 8), row_index=rows)):
        ...     attention["qkv_proj"](torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 24])
    """
    children = dict(attention.named_children())
    wanted = qkv_names(attention) if names is None else names
    if not wanted or not all(name in children for name in wanted):
        # Some of them would give a crayon to some of q, k and v, in silence.
        expected = qkv_words() if names is None else f"layers {', '.join(names)}"
        raise ValueError(
            f"attention: expected {expected}, got a {type(attention).__name__} with "
            f"{', '.join(children) or 'no module'}; name those that make q, k and v (names=...)"
        )
    found = {name: children[name] for name in wanted}
    for name, layer in found.items():
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        if isinstance(layer, BoundLinearMixin):
            raise ValueError(f"attention.{name}: the {kind} carries the crayon already")
        if not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
            raise ValueError(
                f"attention.{name}: expected a linear layer (with in_features and out_features), "
                f"got {kind}"
            )
    for layer in found.values():
        layer.__class__ = with_mixin(cast(Any, CrayonLinearMixin), cast(Any, type(layer)))
    return list(found.values())


def remove_crayon_from_linears(layers: Sequence[nn.Module]) -> None:
    """Give layers the class back that they had before ``add_crayon_to_linears``.

    Args:
        layers: What that returned.

    Raises:
        ValueError: if a layer's class is not the one that it gave, or the layer has a forward of
            its own (a device map's hooks); nothing is changed then.
    """
    for layer in layers:
        bases = type(layer).__bases__
        ours = bases[:1] == (CrayonLinearMixin,) and type(layer) is with_mixin(*bases)
        if not ours or has_own_forward(layer):
            raise ValueError(
                f"layers: expected layers that carry the crayon, got a {type(layer).__name__}"
                f"{' with a forward of its own instance' if ours else ''}; take off what was put "
                "on it since"
            )
    for layer in layers:
        layer.__class__ = type(layer).__bases__[1]
        # Accelerate's hooks, taken off, leave the method that they found.
        layer.__dict__.pop("forward", None)


def _row_index(layer: nn.Module, crayon: CrayonInputs, x: Tensor) -> Tensor:
    if crayon.row_index is None:
        raise ValueError(
            f"crayon.row_index: expected a row for each token of the {type(layer).__name__}, "
            "got None beside a table"
        )
    _check_places(layer, "row_index", crayon.row_index, x)
    return crayon.row_index


def _check_places(layer: nn.Module, name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape[:-1]:
        raise ValueError(
            f"crayon.{name}: expected {list(x.shape[:-1])}, the leading shape of what the "
            f"{type(layer).__name__} was given, got {list(value.shape)}; bind the crayon for the "
            "forward that holds the image alone (bound_crayon), none for decode steps"
        )
