"""Named LoRA adapters beside a frozen base: their factors, their scalings, and what is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collavo_kernels._validation import describe, expect_choice
from collavo_kernels.nn.linear.frozen import NF4Base
from collavo_kernels.ops.qlora_linear import LoRAAdapter

_SCALING = "lora_scaling."


class LoRAFactor(nn.Module):
    """One factor of an adapter: a weight under PEFT's name (``lora_A.<adapter>.weight``).

    Args:
        rows: R for A, N for B.
        columns: K for A, R for B.
        device: Where the weight is made.
        dtype: Its dtype.

    Attributes:
        weight: ``[rows, columns]``, not drawn yet: the layer around it does that.

    Example:
        >>> LoRAFactor(4, 64, "cpu", torch.float32).weight.shape
        torch.Size([4, 64])
    """

    def __init__(
        self, rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

    def forward(self) -> Tensor:
        """Return the weight: where it is offloaded, a call is what brings it."""
        return self.weight


class AdapterSlots(NF4Base):
    """A frozen base with LoRA adapters by name, each with a rank and a scaling of its own.

    A state dict has ``lora_scaling.<name>`` beside the factors of an adapter whose rank or scaling
    is not what the layer was made with; where that entry is, ``load_state_dict`` takes over both.
    """

    merged_weight: Tensor | None
    adapter_names: tuple[str, ...]
    scaling: dict[str, float]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    image_adapters: tuple[str, ...] = ()
    """Adapters that a model around the layer applies to image tokens alone."""

    def _make_adapters(
        self,
        names: Sequence[str],
        rank: int,
        alpha: float,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        self.adapter_names, self.scaling = (), {}
        self._made_with: dict[str, tuple[int, float]] = {}
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for name in names:
            self._make_adapter(name, rank, alpha, device, dtype)

    def _make_adapter(
        self,
        name: str,
        rank: int,
        alpha: float,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        self.lora_A[name] = LoRAFactor(rank, self.in_features, device, dtype)
        self.lora_B[name] = LoRAFactor(self.out_features, rank, device, dtype)
        self.adapter_names = (*self.adapter_names, name)
        self.scaling[name] = alpha / rank
        self._made_with[name] = (rank, alpha / rank)

    def _reset_adapters(self) -> None:
        for name in self.adapter_names:
            nn.init.kaiming_uniform_(self._factor(self.lora_A, name), a=math.sqrt(5))
            nn.init.zeros_(self._factor(self.lora_B, name))

    @staticmethod
    def _factor(factors: nn.ModuleDict, name: str) -> nn.Parameter:
        factor: nn.Parameter = factors[name].weight  # type: ignore[assignment]
        return factor

    def adapter(self, name: str) -> LoRAAdapter:
        """Return one adapter: its parameters (offloaded ones brought back) and its scaling.

        Raises:
            ValueError: if there is no adapter of this name.
        """
        expect_choice("adapter", name, self.adapter_names)
        a, b = self.lora_A[name](), self.lora_B[name]()
        return LoRAAdapter(a, b, self.scaling[name])

    def set_adapter(self, name: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Fill one adapter; parameters keep their identity where the rank stays what it was.

        Args:
            name: Which.
            a: ``[R, K]``, on the adapter's device and in its dtype.
            b: ``[N, R]``, likewise.
            scaling: Of the branch.

        Raises:
            ValueError: if there is no adapter of this name, or it is offloaded.
        """
        expect_choice("adapter", name, self.adapter_names)
        own = LoRAAdapter(self._factor(self.lora_A, name), self._factor(self.lora_B, name))
        if own.a.is_meta or own.b.is_meta:
            raise ValueError(
                f"adapter: {name!r} is offloaded (on meta), so nothing can be loaded into it; load "
                "it first, and offload the model then"
            )
        with torch.no_grad():
            for factors, parameter, value in ((self.lora_A, own.a, a), (self.lora_B, own.b, b)):
                # A parameter made in inference mode takes no value outside of it.
                if parameter.shape == value.shape and not parameter.is_inference():
                    parameter.copy_(value)
                else:
                    factors[name].weight = nn.Parameter(value, parameter.requires_grad)
        self.scaling[name] = scaling
        self.merged_weight = None

    def adapter_size(self, name: str) -> tuple[int, float]:
        """Return an adapter's rank and the alpha for which ``alpha / rank`` is its scaling.

        Raises:
            ValueError: if there is no adapter of this name.

        Example:
            >>> from collavo_kernels.nn import DualQLoRALinear
            >>> DualQLoRALinear(64, 32, rank=6, alpha=4).adapter_size("vl")
            (6, 4)
        """
        rank = self.adapter(name).a.shape[0]
        return rank, _alpha(self.scaling[name], rank)

    def set_trainable(self, adapter: str | None) -> None:
        """Train one adapter and freeze the others; None freezes all. They all stay active.

        Raises:
            ValueError: if there is no adapter of this name.
        """
        if adapter is not None:
            expect_choice("adapter", adapter, self.adapter_names)
        for name in self.adapter_names:
            for factors in (self.lora_A, self.lora_B):
                self._factor(factors, name).requires_grad_(name == adapter)

    def scaling_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return every adapter's scaling, float64 ``[]``, as ``load_state_dict`` takes it."""
        return {prefix + _SCALING + n: _number(value) for n, value in self.scaling.items()}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What a layer made with the same arguments would not have; all else keeps PEFT's keys.
        for name, scaling in self.scaling.items():
            rank = self._factor(self.lora_A, name).shape[0]
            if (rank, scaling) != self._made_with.get(name):
                destination[prefix + _SCALING + name] = _number(scaling)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self.merged_weight = None
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name in self.adapter_names:
            key = prefix + _SCALING + name
            scaling = own.pop(key, None)
            if scaling is None:
                continue
            if scaling.numel() != 1:
                arguments[-1].append(f"{key}: expected one number, got {describe(scaling)}")
                continue
            self._adopt_rank(own, prefix, name)
            self.scaling[name] = float(scaling)
        super()._load_from_state_dict(own, prefix, *arguments)

    def _adopt_rank(self, own: Mapping[str, Tensor], prefix: str, name: str) -> None:
        # Only beside a scaling: with a rank alone nobody could say what the branch is scaled by.
        # The factors are modules of their own and are loaded after this.
        keys = [f"{prefix}{part}.{name}.weight" for part in ("lora_A", "lora_B")]
        if not all(key in own and own[key].dim() == 2 for key in keys):
            return
        rank = own[keys[0]].shape[0]
        for factors, shape in (
            (self.lora_A, (rank, self.in_features)),
            (self.lora_B, (self.out_features, rank)),
        ):
            old = self._factor(factors, name)
            if old.shape != shape:
                empty = torch.empty(shape, device=old.device, dtype=old.dtype)
                factors[name].weight = nn.Parameter(empty, old.requires_grad)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _alpha(scaling: float, rank: int) -> float:
    """Return the alpha that, divided by the rank, is the scaling; a whole one where there is."""
    product = scaling * rank
    near = (round(product), product, math.nextafter(product, math.inf), math.nextafter(product, 0))
    return next((alpha for alpha in near if alpha / rank == scaling), product)
