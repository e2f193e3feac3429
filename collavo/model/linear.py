"""The linear layers of a CoLLaVO decoder, and how what a checkpoint did not bring is drawn."""

from __future__ import annotations

import math
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import initialization as init

from collavo_kernels import quantize_nf4
from collavo_kernels.nn import DualQLoRALinear, LoRAFactor


class CollavoLinear(DualQLoRALinear):
    """A linear layer whose adapters and 4 bits may come after it was made or loaded."""

    def add_adapter(self, name: str, rank: int, alpha: float, dtype: torch.dtype) -> None:
        """Put one more adapter beside those that are there; its B is zero.

        Args:
            name: Its name.
            rank: R.
            alpha: Its scaling is ``alpha / rank``.
            dtype: dtype of its A and B.
        """
        device = self.weight.device
        self._make_adapter(name, rank, alpha, device, dtype)
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
        self._set_weight(quantize_nf4(self.weight.detach(), block_size, double_quant))
        self.quantized = True

    def draw_base(self, std: float) -> None:
        """Draw the base from a normal distribution, unless a checkpoint brought it.

        A base on "meta" is left there: nothing can be drawn, or offload keeps its values.

        Args:
            std: Its standard deviation.
        """
        if self.weight.is_meta:
            return
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
        # (collavo.model.files) brings the file to them.
        if self._has_no_values():
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)


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
