"""PEFT's LoRA around a ``DualQLoRALinear``; importing this imports PEFT."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from collavo_kernels.nn.bound import bound_crayon
from collavo_kernels.nn.crayon_linears import BoundLinearMixin, CrayonLinearMixin
from collavo_kernels.nn.linear.module import DualQLoRALinear
from collavo_kernels.nn.linear.peft_config import check_branches
from collavo_kernels.nn.mixins import with_mixin


class PeftDualQLoRALinear(Linear):  # type: ignore[misc]
    """What PEFT puts in the place of a ``DualQLoRALinear``: its branches beside the layer's own.

    The forward is PEFT's, which hands every further argument (``adapter_mask``, ``row_table``,
    ``row_index``, ``tokens``) to the layer inside. PEFT's adapters act on all tokens and rows. Of a
    layer that heeds the bound crayon this one takes over that part.

    Args:
        base_layer: The layer.
        adapter_name: Of the first adapter.
        *args: As PEFT gives them.
        **kwargs: As PEFT gives them.

    Raises:
        ValueError: if an adapter has the name of one of the layer's own, or is more than a branch
            ``s B A x``.
    """

    takes_adapter_mask = True

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise ValueError(
                "target_parameters: expected none of a DualQLoRALinear, got "
                f"{kwargs['parameter_name']!r}; name the layer in target_modules"
            )
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        for mixin in (CrayonLinearMixin, BoundLinearMixin):
            if isinstance(base_layer, mixin):
                # The branches see rows too, and who binds tables for a layer finds this one.
                self.__class__ = with_mixin(cast(Any, mixin), PeftDualQLoRALinear)
                break

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with those of PEFT's active adapters.

        Args:
            x: ``[..., K]``.
            *args: The layer's own.
            **kwargs: The layer's own.
        """
        with bound_crayon(None) if isinstance(self, BoundLinearMixin) else nullcontext():
            return cast(Tensor, super().forward(x, *args, **kwargs))

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT warns of layers that it does not know.
        base: Any = module
        return base.in_features, base.out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does.

        Args:
            adapter_name: Its name.
            *args: As PEFT gives them.
            **kwargs: As PEFT gives them.

        Raises:
            ValueError: as for the class.
        """
        base: DualQLoRALinear = self.get_base_layer()
        if adapter_name in base.adapter_names:
            # In a state dict the two could not be told apart.
            raise ValueError(
                f"adapter_name: {adapter_name!r} is an adapter of the DualQLoRALinear itself; give "
                "PEFT's another name"
            )
        config: Any = kwargs.get("config")
        if config is not None:
            check_branches(config.to_dict())
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add PEFT's adapters to a dense weight; one in 4 bits is not rounded anew.

        Args:
            safe_merge: As in PEFT.
            adapter_names: As in PEFT.

        Raises:
            ValueError: if the layer's weight is in 4 bits, or its own adapters are merged.
        """
        base: DualQLoRALinear = self.get_base_layer()
        if base.quantized:
            raise ValueError(
                "merge: expected a dense weight, got one in 4 bits, which would have to be rounded "
                "again; call unload() to take the adapter off, and load it from its folder with "
                "load_peft_adapter into a slot, which merge() of the DualQLoRALinear folds in"
            )
        if base.merged:
            raise ValueError(
                "merge: expected the adapters of the DualQLoRALinear itself apart from its weight, "
                "got merged ones; call its unmerge() first"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
