"""Weights that accelerate's hooks keep elsewhere and bring to a module when it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from collavo_kernels.ops.qlora_linear import NF4Weight


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether an instance has a forward in place of its class's: a hook's or a patch's.

    Accelerate's hooks, taken off, leave the class's own method as an attribute; that is none.

    Args:
        module: Any.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.forward = layer.forward
        >>> has_own_forward(layer)
        False
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps what runs around its forward and backward."""


def has_hooks(module: nn.Module) -> bool:
    """Tell whether something runs around a module's forward or backward.

    Args:
        module: Any.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_full_backward_hook(lambda *_: None)
        >>> has_hooks(layer)
        True
    """
    return any(getattr(module, hooks) for hooks in MODULE_HOOKS)


class OffloadedBytes(Mapping[str, Tensor]):
    """An offloaded NF4 layer's tensors by parameter, read from its state dict's entries.

    Offload stores a state dict and asks it for parameters; in bitsandbytes' layout the scales are
    none.

    Args:
        entries: The layer's state dict, or what loads its entries when asked.
    """

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Tensor:
        """Return a parameter's value; ``KeyError`` if there is none of that name."""
        if key == "weight_scales":
            return NF4Weight.from_state_dict(self.entries, "weight").scales
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the entries' names."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.entries)


def serve_bytes(hook: Any) -> bool:
    """Let a hook that offloads an NF4 layer find its scales; tell whether it reads a state dict.

    Args:
        hook: Accelerate's ``ModelHook``, or a sequence of them in one.
    """
    served = False
    for each in getattr(hook, "hooks", (hook,)):
        entries = getattr(each, "weights_map", None)
        if getattr(each, "offload", False) and entries is not None:
            if "weight_scales" not in entries:
                each.weights_map = OffloadedBytes(entries)
            served = served or isinstance(each.weights_map, OffloadedBytes)
    return served


def offloaded_parameters(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Return an NF4 layer's offloaded tensors by parameter, or None where it has its own.

    They come from its state dict's entries, or, where a model was loaded offloaded or the hook
    itself took them, are stored by parameter; then packed bytes lie as they lay in the layer.

    Args:
        module: The layer.
    """
    hook: Any = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False):
            return cast("Mapping[str, Tensor] | None", each.weights_map)
    return None
