"""The frozen base of a linear layer: NF4 bytes in bitsandbytes' state dict, or a dense weight."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from collavo_kernels._native import native
from collavo_kernels.nn.linear.offload import has_own_forward, offloaded_parameters, serve_bytes
from collavo_kernels.ops.qlora_linear import NF4Weight
from collavo_kernels.ops.qlora_linear.nf4.format import packed_bytes, scale_bytes
from collavo_kernels.ops.qlora_linear.nf4.interop import SCALE_KEYS
from collavo_kernels.ops.qlora_linear.nf4.panels import cannot_pack

_REORDERING = threading.Lock()
"""Held while any layer changes its order: one copy at a time, and one packing of a layer."""


class NF4Base(nn.Module):
    """A module whose ``weight`` and ``weight_scales`` are the bytes of an ``NF4Weight``.

    The bytes lie in bitsandbytes' order or, for CPU kernels, in panels; never in both. Whatever
    leaves the module (state dicts, pickles, moves to a device) is in bitsandbytes' order, which is
    also the one that is sharded and traced; panels are for calls that run now, on the CPU, in a
    process that owns its weights.
    """

    in_features: int
    out_features: int
    quantized: bool
    block_size: int
    double_quant: bool
    base_dtype: torch.dtype
    weight: nn.Parameter
    weight_scales: nn.Parameter | None
    bias: nn.Parameter | None

    def base(self) -> NF4Weight | Tensor:
        """Return the base: an ``NF4Weight`` over this layer's bytes, or the dense weight.

        The ``NF4Weight`` is in the order that the bytes have now (``in_panels``).
        """
        if self.weight_scales is None:
            return self.weight
        shape = (self.out_features, self.in_features)
        options = (self.block_size, self.double_quant, self.base_dtype)
        return NF4Weight(self.weight, self.weight_scales, shape, *options)

    def pack(self) -> Self:
        """Bring the 4-bit codes into panels, which CPU kernels stream; ``unpack()`` undoes it.

        The first forward on a CPU does it by itself, unless something manages, shares or traces
        the parameters: FSDP and DDP, ``share_memory()``, ``torch.compile``, ``torch.export``.
        Those run on bitsandbytes' order, correct and slower, so call this before
        ``torch.compile``. ``weight`` becomes a new parameter, uint8
        ``[ceil(N / 16), K / 64, 576]``, and the old one is let go. Casts, moves and loading go back
        to bitsandbytes' order; the state dict has it at all times.

        Returns:
            The layer itself.

        Raises:
            ValueError: if the base is dense, sharded or not on the CPU, K is no multiple of 64, or
                a block has fewer than 64 elements.

        Example:
            >>> from collavo_kernels.nn import DualQLoRALinear
            >>> layer = DualQLoRALinear(64, 32, rank=4).pack()
            >>> list(layer.weight.shape), list(layer.unpack().weight.shape)
            ([2, 1, 576], [1024, 1])
        """
        return self._reorder(in_panels=True)

    def unpack(self) -> Self:
        """Bring the 4-bit codes back into bitsandbytes' order, bit for bit.

        A dense base stays as it is.

        Returns:
            The layer itself.

        Raises:
            ValueError: if the panels are sharded.
        """
        return self._reorder(in_panels=False) if self._in_panels() else self

    def _reorder(self, in_panels: bool) -> Self:
        with _REORDERING:
            base = self.base()
            reason = _cannot_reorder(base)
            if reason is not None or not isinstance(base, NF4Weight):
                action = "lie in panels" if in_panels else "leave its panels"
                raise ValueError(f"weight: cannot {action}: {reason}")
            if base.in_panels != in_panels:
                # A forward may run under inference_mode or another default device; its panels are
                # on the CPU all the same, and serve training.
                with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                    codes = (base.to_panels() if in_panels else base.to_rows()).packed
                    self.weight = self._like_weight(codes)
        return self

    def _pack_at_first_use(self) -> None:
        # The commonest answer first: this stands in every forward. A compiler goes no further.
        if self._in_panels() or torch.compiler.is_compiling() or self.weight_scales is None:
            return
        shape = (self.out_features, self.in_features)
        if _cannot_pack_now(self.weight, shape, self.block_size) is not None:
            return
        if not has_own_forward(self):  # offload would bring the old order to the new shape
            self.pack()

    def _in_panels(self) -> bool:
        return self.weight.dim() == 3

    def _like_weight(self, codes: Tensor) -> nn.Parameter:
        # A new parameter, not new data: another thread may be reading the one that is there.
        made = nn.Parameter(codes, requires_grad=False)
        made.__dict__.update(self.weight.__dict__)
        return made

    def _set_weight(self, weight: NF4Weight) -> None:
        self.block_size, self.double_quant = weight.block_size, weight.double_quant
        self.base_dtype = weight.dtype
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.weight_scales = nn.Parameter(weight.scales, requires_grad=False)

    def _make_base(self, bias: bool, device: torch.device | str | None) -> None:
        shape = (self.out_features, self.in_features)
        if self.quantized:
            size = scale_bytes(shape, self.block_size, self.double_quant)
            packed = torch.empty(packed_bytes(shape), 1, dtype=torch.uint8, device=device)
            scales = torch.empty(size, dtype=torch.uint8, device=device)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.weight_scales = nn.Parameter(scales, requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=self.base_dtype))
            self.weight_scales = None
        self.bias = (
            nn.Parameter(torch.empty(self.out_features, device=device, dtype=self.base_dtype))
            if bias
            else None
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether all parameters require gradients; a 4-bit weight cannot.

        Raises:
            ValueError: if they should and the base is in 4 bits.
        """
        if requires_grad and self.weight_scales is not None:
            raise ValueError(
                "weight: a 4-bit weight cannot get a gradient, "
                f"got requires_grad=True for {list(self.weight.shape)}; train the adapters"
            )
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Panels are for the CPU. Those of a shard keep their order: no process has them all.
        if self._in_panels() and _is_plain(self.weight):
            self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _hf_hook(self) -> Any:
        """Accelerate's hook, where there is one."""
        try:
            return self.__dict__["_hf_hook"]
        except KeyError:
            raise AttributeError("_hf_hook") from None

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        self.__dict__["_hf_hook"] = hook
        if self.weight_scales is not None and serve_bytes(hook) and self._in_panels():
            # What comes back is in the state dict's order.
            shape = (packed_bytes((self.out_features, self.in_features)), 1)
            self.weight = self._like_weight(torch.empty(shape, dtype=torch.uint8, device="meta"))

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__["_hf_hook"]

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle stores: bitsandbytes' order, without the room around the panels."""
        state = self.__dict__.copy()
        base = self.base()
        if isinstance(base, NF4Weight) and base.in_panels and _is_plain(self.weight):
            rows = self._like_weight(base.to_rows().packed)
            state["_parameters"] = {**self._parameters, "weight": rows}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Through __getstate__ the rows of every layer of a model would live until the last is done.
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_scales is None:
            return
        del destination[prefix + "weight_scales"]
        packed: Tensor = self.weight
        scales: Tensor = self.weight_scales
        offloaded = offloaded_parameters(self) if packed.is_meta else None
        if offloaded is not None:
            packed, scales = offloaded["weight"], offloaded["weight_scales"]
        shape, parts = (self.out_features, self.in_features), (gathered(packed), gathered(scales))
        weight = NF4Weight(*parts, shape, self.block_size, self.double_quant, self.base_dtype)
        destination.update(weight.state_dict(prefix + "weight"))

    def _has_no_values(self) -> bool:
        """Tell whether the base is on "meta" and nothing holds its values."""
        return self.weight.is_meta and offloaded_parameters(self) is None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.weight_scales is not None:
            try:
                loaded = _pop_weight(own, prefix + "weight")
                if loaded is not None:
                    self._adopt_format(loaded, prefix)
                    own[prefix + "weight"] = sharded_like(loaded.packed, self.weight)
                    scales = sharded_like(loaded.scales, self.weight_scales)
                    own[prefix + "weight_scales"] = scales
            except ValueError as error:
                error_msgs.append(str(error))
                return
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(own, prefix, *arguments)
        # The scales travel inside bitsandbytes' entries, so their absence is the weight's.
        if prefix + "weight_scales" in missing_keys:
            missing_keys.remove(prefix + "weight_scales")

    def _adopt_format(self, loaded: NF4Weight, prefix: str) -> None:
        if loaded.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"{prefix}weight: expected an NF4 matrix [{self.out_features}, "
                f"{self.in_features}], got {list(loaded.shape)}"
            )
        self.unpack()
        same = (loaded.block_size, loaded.double_quant) == (self.block_size, self.double_quant)
        self.block_size, self.double_quant = loaded.block_size, loaded.double_quant
        self.base_dtype = loaded.dtype
        if not same and self.weight_scales is not None:
            empty = torch.empty_like(loaded.scales, device=self.weight_scales.device)
            self.weight_scales = nn.Parameter(empty, requires_grad=False)


def _is_plain(weight: Tensor) -> bool:
    """Tell whether a weight is an ordinary parameter: no shard, no fake, no stand-in."""
    return type(weight) is nn.Parameter


def _cannot_reorder(base: NF4Weight | Tensor) -> str | None:
    """Say why a base cannot change its order, or None."""
    if not isinstance(base, NF4Weight):
        return "it is dense"
    if not _is_plain(base.packed):
        return f"it is a {type(base.packed).__name__}; change its order before it is sharded"
    return None


def _cannot_pack_now(weight: Tensor, shape: tuple[int, int], block_size: int) -> str | None:
    """Say why a forward leaves a weight in bitsandbytes' order, or None."""
    # The first two answer for most layers that never pack, so they stay cheap.
    if weight.device.type != "cpu" or not _is_plain(weight):
        return "it is not an ordinary parameter on the CPU"
    reason = cannot_pack(shape, block_size)
    if reason is None and native() is None:
        reason = "the compiled kernels are not there"
    return reason or _watched() or _managed(weight)


def _watched() -> str | None:
    traced = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    if traced or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a trace, a mode or a transform is watching"
    return None


def _managed(weight: Tensor) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised: FSDP and DDP manage parameters themselves"
    if cast(Any, weight).is_shared():
        return "other processes share the memory"
    return None


def _pop_weight(entries: dict[str, Tensor], name: str) -> NF4Weight | None:
    """Take an NF4 weight's entries out of a state dict; None if it has none of them.

    Raises:
        ValueError: if the entries are incomplete or corrupt; the entry is named.
    """
    names = [name, *(f"{name}.{key}" for key in SCALE_KEYS)]
    if not any(each in entries for each in names):
        return None
    weight = NF4Weight.from_state_dict(entries, name)
    for each in names:
        entries.pop(each, None)
    return weight


def gathered(parameter: Tensor) -> Tensor:
    """Return a parameter's bytes; a sharded one is gathered, so all processes have to take part."""
    plain: Any = parameter.detach()
    whole: Tensor = plain.full_tensor() if hasattr(plain, "full_tensor") else plain
    return whole


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a value laid out as a parameter is: sharded alike if that is sharded."""
    sharded: Any = parameter.detach()
    if not hasattr(sharded, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = sharded.device_mesh, sharded.placements
    return distribute_tensor(value.to(sharded.device), mesh, placements)
