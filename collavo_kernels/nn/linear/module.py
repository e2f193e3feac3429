"""A linear layer over a frozen NF4 weight with named LoRA adapters side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collavo_kernels._validation import (
    REFERENCE_DTYPES,
    expect_int,
    expect_number,
    expect_tensor,
)
from collavo_kernels.nn.linear import peft
from collavo_kernels.nn.linear.slots import AdapterSlots
from collavo_kernels.ops.qlora_linear import LoRAAdapter, NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels.ops.qlora_linear.inputs import MAX_MASKED_ADAPTERS


class DualQLoRALinear(AdapterSlots):
    r"""Linear layer with a frozen 4-bit base and LoRA adapters that are all active (Dual QLoRA).

    ``y = W x + sum_i s_i B_i A_i x + table[row] + bias``, with W in NF4 (arXiv 2402.11248, section
    3.3; arXiv 2305.14314). It replaces ``nn.Linear`` and bitsandbytes' ``Linear4bit``. Every part
    of the NF4 weight is a uint8 parameter without gradient: ``.to(dtype)`` cannot change it, DDP
    does not send it again at every forward, FSDP2 shards it (from torch 2.12; before, it refuses
    integer parameters). ``state_dict()`` has bitsandbytes' keys for it and PEFT's names for the
    adapters (``lora_A.<name>.weight``, ``lora_B.<name>.weight``).

    The first forward on a CPU brings the 4-bit codes into the order that its kernels stream
    (``pack()``); state dicts, pickles and moves have bitsandbytes' order at all times. Under
    ``torch.compile`` the order stays what it is: call ``pack()`` before.

    Args:
        in_features: K.
        out_features: N.
        bias: Add a bias ``[N]``.
        adapters: Their names; may be empty.
        rank: R of every adapter.
        alpha: Every adapter's scaling is ``alpha / rank``.
        dropout: Applied to the input of the adapters while training; above 0 the branches run
            apart from the fused operator.
        quantized: Keep the base in NF4; False keeps a dense, trainable ``weight`` ``[N, K]``.
        block_size: Elements per scale of the NF4 weight.
        double_quant: Keep the scales in 8 bits.
        device: Where parameters are made.
        dtype: Of a dense weight and the bias; None is torch's default.
        adapter_dtype: Of the adapters; None is float32, as PEFT trains them (float64 beside a
            float64 base).

    Raises:
        TypeError: if a dtype is not floating.
        ValueError: if a rank, name, dropout or block size is not possible.

    Example:
        >>> import torch
        >>> layer = DualQLoRALinear(64, 32, rank=4)
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 32])
        >>> layer.set_trainable("image")
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['lora_A.image.weight', 'lora_B.image.weight']
    """

    # Of the forward's arguments; what stands around such a layer and hands them on says so too.
    takes_adapter_mask = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        adapters: Sequence[str] = ("image", "vl"),
        rank: int = 64,
        alpha: float = 64.0,
        dropout: float = 0.0,
        quantized: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_int("in_features", in_features, minimum=0)
        expect_int("out_features", out_features, minimum=0)
        _check_options(adapters, rank, alpha, dropout)
        expect_int("block_size", block_size, minimum=1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if adapter_dtype is None:
            adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        _check_dtypes(dtype=dtype, adapter_dtype=adapter_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.quantized, self.block_size, self.double_quant = quantized, block_size, double_quant
        self.base_dtype = dtype
        self.dropout = dropout
        self._make_base(bias, device)
        self._make_adapters(adapters, rank, alpha, device, adapter_dtype)
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> DualQLoRALinear:
        """Make a layer from a dense one: its weight is quantised, or shared if ``quantized=False``.

        Args:
            linear: Weight ``[N, K]`` in float32, bfloat16 or float16, on any device.
            options: Keyword arguments of the class (adapters, rank, alpha, quantized, ...).

        Raises:
            TypeError: if it is no ``nn.Linear``, or its weight is not floating.
            ValueError: if its weight is not ``[N, K]``.

        Example:
            >>> layer = DualQLoRALinear.from_linear(nn.Linear(64, 32), rank=4, alpha=8)
            >>> layer.bias is not None, layer.scaling
            (True, {'image': 2.0, 'vl': 2.0})
        """
        _check_linear(linear)
        layer = cls._without_base(linear.in_features, linear.out_features, linear.weight, options)
        if not layer.quantized:
            layer.weight = nn.Parameter(linear.weight, linear.weight.requires_grad)
        elif linear.weight.is_meta:
            layer._make_base(bias=False, device="meta")
        else:
            layer._set_weight(quantize_nf4(linear.weight, layer.block_size, layer.double_quant))
        layer.bias = linear.bias
        return layer

    @classmethod
    def from_bitsandbytes(cls, linear: nn.Module, **options: Any) -> DualQLoRALinear:
        """Make a layer from bitsandbytes' ``Linear4bit`` (NF4), taking its bytes as they are.

        Args:
            linear: A quantised ``Linear4bit``.
            options: Keyword arguments of the class (adapters, rank, alpha, dropout, ...).

        Raises:
            TypeError: if it is no ``Linear4bit``.
            ValueError: if the layer is not quantised yet, or not in NF4, or bitsandbytes has
                repacked it for its CPU kernel, which rounds its scales.
        """
        base: Any = linear
        if not hasattr(getattr(base, "weight", None), "quant_state"):
            raise TypeError(
                f"linear: expected bitsandbytes' Linear4bit, got {type(linear).__name__}; "
                "from_linear() takes a dense layer"
            )
        weight = NF4Weight.from_bitsandbytes(base.weight)
        options |= {"block_size": weight.block_size, "double_quant": weight.double_quant}
        example = torch.empty(0, dtype=weight.dtype, device=weight.device)
        layer = cls._without_base(weight.shape[1], weight.shape[0], example, options)
        layer._set_weight(weight)
        layer.bias = base.bias
        return layer

    @classmethod
    def _without_base(
        cls, in_features: int, out_features: int, example: Tensor, options: dict[str, Any]
    ) -> DualQLoRALinear:
        # The base comes later: made on "meta" it costs nothing.
        options = {"dtype": example.dtype} | options
        layer = cls(in_features, out_features, device="meta", **options)
        for factors in (layer.lora_A, layer.lora_B):
            factors.to_empty(device=example.device)
        layer._reset_adapters()
        return layer

    def reset_parameters(self) -> None:
        """Draw the base like ``nn.Linear`` and the adapters like PEFT: A at random, B zero."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        if not self.weight.is_meta:
            shape = (self.out_features, self.in_features)
            dense = torch.empty(shape, dtype=self.base_dtype, device=self.weight.device)
            nn.init.uniform_(dense, -bound, bound)
            if self.quantized:
                self._set_weight(quantize_nf4(dense, self.block_size, self.double_quant))
            else:
                self.weight.data.copy_(dense)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_adapters()

    def forward(
        self,
        x: Tensor,
        adapter_mask: Tensor | None = None,
        row_table: Tensor | None = None,
        row_index: Tensor | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: ``[..., K]``, floating.
            adapter_mask: uint8, x's leading shape; bit i = adapter i (in the order of the names) is
                active for the token. None: all are.
            row_table: ``[T, N]``, added to tokens that have a row.
            row_index: int32, x's leading shape; -1 for none.
            tokens: Of x ``[tokens + T, K]``: how many get the bias; the crayon's rows behind them
                do not. None: all of x do.

        Returns:
            ``[..., N]`` in x's dtype.

        Raises:
            ValueError: if shapes do not fit, a mask is given while the adapters are merged, or
                ``tokens`` beside a row table.
        """
        if tokens is not None and self.bias is not None:
            if row_table is not None:
                raise ValueError("tokens: expected None beside row_table, got a number of tokens")
            row_table = -self.bias[None]
            row_index = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
            row_index[:tokens] = -1
        if self.merged_weight is not None and adapter_mask is not None:
            raise ValueError("adapter_mask: adapters are merged for all tokens; unmerge() first")
        if self.merged_weight is None:
            self._pack_at_first_use()
        weight = self.base() if self.merged_weight is None else self.merged_weight
        names = self.adapter_names if self.merged_weight is None else ()
        adapters = []
        for name in names:
            a, b, scaling = self.adapter(name)
            adapters.append(LoRAAdapter(beside(x, a), beside(x, b), scaling))
        dropped = self.training and self.dropout > 0
        out = qlora_linear(
            x,
            weight,
            () if dropped else adapters,
            adapter_mask=None if dropped else adapter_mask,
            row_table=None if row_table is None else beside(x, row_table),
            row_index=row_index,
            bias=None if self.bias is None else beside(x, self.bias),
        )
        return self._add_branches(out, x, adapters, adapter_mask) if dropped else out

    def _add_branches(
        self, out: Tensor, x: Tensor, adapters: list[LoRAAdapter], adapter_mask: Tensor | None
    ) -> Tensor:
        _check_branches(x, adapters, adapter_mask, self.out_features)
        # Each adapter sees a dropout mask of its own, as in PEFT.
        for i, (a, b, scaling) in enumerate(adapters):
            dropped = F.dropout(x, self.dropout)
            branch = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * scaling
            if adapter_mask is not None:
                branch = torch.where(((adapter_mask >> i) & 1).bool()[..., None], branch, 0.0)
            out = out + branch
        return out

    @property
    def merged(self) -> bool:
        """Whether the adapters are merged into a dense weight."""
        return self.merged_weight is not None

    def merge(self, dtype: torch.dtype | None = None) -> DualQLoRALinear:
        """Fold all adapters into one dense weight, for inference; ``unmerge()`` takes it back.

        The NF4 bytes and the adapters stay as they are, and the state dict does not change.

        Args:
            dtype: Of the dense weight; None takes the dtype that the base had before quantisation.

        Returns:
            The layer itself.

        Raises:
            ValueError: if the weight is offloaded.
        """
        if self.weight.is_meta:
            raise ValueError(
                "weight: expected a weight with values to merge into, got one that is offloaded "
                "(on meta); merge before the model is offloaded"
            )
        base = self.base()
        with torch.no_grad():
            dense = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base.float()
            for name in self.adapter_names:
                a, b, scaling = self.adapter(name)
                dense = dense + scaling * (b.float() @ a.float())
            self.merged_weight = dense.to(self.base_dtype if dtype is None else dtype)
        return self

    def unmerge(self) -> DualQLoRALinear:
        """Undo ``merge()`` exactly: the NF4 bytes and the adapters were never touched."""
        self.merged_weight = None
        return self

    def load_peft_adapter(
        self,
        state: Mapping[str, Tensor],
        slot: str,
        *,
        config: Mapping[str, Any],
        module_name: str = "",
    ) -> None:
        """Load this layer's part of a LoRA adapter that PEFT saved.

        Args:
            state: Entries of ``adapter_model.safetensors``.
            slot: The adapter to fill; it takes the rank and scaling of what is loaded.
            config: ``adapter_config.json``; rank and alpha patterns and rsLoRA are honoured.
            module_name: This layer's name in the model; empty if ``state`` has just its entries.

        Raises:
            ValueError: if an entry is missing or of another shape, or the adapter uses DoRA,
                lora_bias, PiSSA or another setting that is not understood; it is named.
        """
        self.set_adapter(slot, *peft.read_layer(self, slot, state, config, module_name))

    def peft_state_dict(self, slot: str, module_name: str = "") -> dict[str, Tensor]:
        """Return one adapter under the keys that PEFT saves."""
        own = self.adapter(slot)
        keys = peft.factor_keys(module_name)
        return dict(zip(keys, (own.a.detach(), own.b.detach()), strict=True))

    def extra_repr(self) -> str:
        """Describe sizes, format and adapters for ``print(model)``."""
        base = f"nf4(block {self.block_size})" if self.quantized else str(self.base_dtype)
        names = ", ".join(self.adapter_names) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, base={base}, adapters=[{names}]"
        )


def beside(x: Tensor, value: Tensor) -> Tensor:
    """Return a bias, factor or table in a dtype that ``qlora_linear`` takes beside x.

    bitsandbytes' and PEFT's layers take a 16-bit one of either kind beside any x; so do ours. In
    float32 it is what it was.

    Args:
        x: The layer's input.
        value: Any floating tensor.
    """
    return value if value.dtype in (x.dtype, torch.float32) else value.float()


def _check_options(adapters: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Check what a layer with adapters is made with."""
    names = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    if (
        not names
        or not all(isinstance(name, str) for name in adapters)
        or len(set(adapters)) != len(adapters)
    ):
        raise ValueError(f"adapters: expected a tuple of distinct names, got {adapters!r}")
    expect_int("rank", rank, minimum=1)
    expect_number("alpha", alpha)
    if not 0.0 <= expect_number("dropout", dropout) < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def _check_dtypes(**dtypes: torch.dtype) -> None:
    """Check that each is floating; the keyword is the argument's name."""
    for name, dtype in dtypes.items():
        if dtype not in REFERENCE_DTYPES:
            names = ", ".join(str(each).removeprefix("torch.") for each in REFERENCE_DTYPES)
            raise TypeError(f"{name}: expected one of {names}, got {dtype}")


def _check_linear(linear: nn.Module) -> None:
    """Check that a module is a dense linear layer."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
    expect_tensor(
        "linear.weight",
        linear.weight,
        shape=(linear.out_features, linear.in_features),
        dtypes=REFERENCE_DTYPES,
        hint="from_bitsandbytes() takes a 4-bit layer",
    )


def _check_branches(
    x: Tensor, adapters: list[LoRAAdapter], mask: Tensor | None, out_features: int
) -> None:
    """Check what the fused operator checks where the branches run beside it."""
    for i, (a, b, _) in enumerate(adapters):
        expect_tensor(f"adapters[{i}].a", a, shape=("R", x.shape[-1]), device=x.device)
        expect_tensor(f"adapters[{i}].b", b, shape=(out_features, a.shape[0]), device=x.device)
    if mask is None:
        return
    expect_tensor("adapter_mask", mask, shape=x.shape[:-1], dtypes=(torch.uint8,), device=x.device)
    if len(adapters) > MAX_MASKED_ADAPTERS:
        raise ValueError(
            f"adapters: expected at most {MAX_MASKED_ADAPTERS} beside adapter_mask (a bit each), "
            f"got {len(adapters)}"
        )
