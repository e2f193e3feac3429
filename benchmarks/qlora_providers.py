"""Who is measured for ``qlora_linear``: this package, its peers, and what one would write by hand.

A provider makes a ``Layer``: one copy of the weights in memory of its own, and how to call it. The
benchmark makes as many as rotate past the last-level cache. Adapters are bfloat16 like the rest, or
float32 where a provider's name ends with ``-fp32-adapters``: those are what ``apply_to_llava`` and
PEFT make unless told otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers, report
from benchmarks.qlora_problem import (
    DTYPE,
    FLOAT32_ADAPTERS,
    Weights,
    copy_of,
    streaming_copy_of,
)
from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear
from collavo_kernels.ops.qlora_linear import reference
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs

ADAPTERS = ("image", "vl")


class Layer(NamedTuple):
    """A copy of the layer: its forward, and the adapters' factors A0, B0, A1, B1 that it trains."""

    forward: Callable[[Tensor], Tensor]
    leaves: tuple[Tensor, ...] = ()


def make(provider: str, given: Weights, *, training: bool) -> Layer:
    """Return one copy; skips the benchmark, with the reason, where the provider is absent."""
    name = provider.removesuffix(FLOAT32_ADAPTERS)
    if provider.endswith(FLOAT32_ADAPTERS):
        wide = (LoRAAdapter(a.float(), b.float(), scaling) for a, b, scaling in given.adapters)
        given = given._replace(adapters=tuple(wide))
    if name == "bitsandbytes":
        return Layer(_bitsandbytes(given, training))
    if name == "peft":
        return _peft(given, training)
    if name == "dense":
        weight = given.dense.clone()
        return Layer(lambda x: F.linear(x, weight))
    adapters = tuple(
        LoRAAdapter(a.clone().requires_grad_(), b.clone().requires_grad_(), scaling)
        for a, b, scaling in given.adapters
    )
    leaves = tuple(factor for a, b, _ in adapters for factor in (a, b))
    return Layer(_with_adapters(name, given, adapters), leaves)


def _with_adapters(
    name: str, given: Weights, adapters: tuple[LoRAAdapter, ...]
) -> Callable[[Tensor], Tensor]:
    if name == "dense+lora":
        dense = given.dense.clone()
        return lambda x: _branches(F.linear(x, dense), x, adapters)
    if name == "dequantize+lora":
        base = _dequantizing(given)
        return lambda x: _branches(base(x), x, adapters)
    if name == "compile(reference)":
        return functools.partial(_compiled(), weight=copy_of(given.nf4), adapters=adapters)
    if name == "reference":
        return _operator(copy_of(given.nf4), adapters, name)
    if name == "ours:int8":
        packed = streaming_copy_of(given.nf4)
        return lambda x: qlora_linear(x, packed, int8_activations=True)
    backend = name.removeprefix("ours:")
    copy = streaming_copy_of if backend == "cpu" else copy_of
    return _operator(copy(given.nf4), adapters, backend)


def _operator(
    weight: NF4Weight, adapters: tuple[LoRAAdapter, ...], backend: str
) -> Callable[[Tensor], Tensor]:
    return lambda x: qlora_linear(x, weight, adapters, backend=backend)


def _branches(out: Tensor, x: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
    for a, b, scaling in adapters:
        out = torch.addmm(out, F.linear(x, a), b.t(), alpha=scaling)
    return out


def reference_forward(x: Tensor, weight: NF4Weight, adapters: Sequence[LoRAAdapter]) -> Tensor:
    """Run the reference as plain PyTorch, which torch.compile can see through."""
    a, b, scaling = (list(each) for each in zip(*adapters, strict=True))
    format_ = (weight.scales, weight.shape[0], weight.block_size, weight.double_quant)
    return reference.forward(
        QLoRAInputs(x, weight.packed, *format_, a, b, scaling, None, None, None, None)
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(reference_forward)


def _bitsandbytes(given: Weights, training: bool) -> nn.Module:
    bnb: Any = peers.require("bitsandbytes")
    (n, k), device = given.nf4.shape, given.nf4.device
    layer: nn.Module = bnb.nn.Linear4bit(
        k, n, bias=False, quant_type="nf4", compute_dtype=DTYPE, device="meta"
    )
    layer.weight = copy_of(given.nf4).to_bitsandbytes()
    if device.type == "cpu" and report.isa() != "avx512":
        # It asks the processor, not torch: without this it would use AVX-512 under --isa avx2.
        layer.support_avx512bf16_for_cpu = False
    return layer.train(training)


def _peft(given: Weights, training: bool) -> Layer:
    peft: Any = peers.require("peft")
    model = nn.ModuleDict({"layer": _bitsandbytes(given, training)})
    rank = given.adapters[0].a.shape[0]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank * given.adapters[0].scaling,
        target_modules=["layer"],
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTERS[0])
    wrapped.add_adapter(ADAPTERS[1], config)
    lora = wrapped.base_model.model["layer"]
    lora.set_adapter(list(ADAPTERS))
    leaves: list[Tensor] = []
    for name, (a, b, _) in zip(ADAPTERS, given.adapters, strict=True):
        for factor, values in ((lora.lora_A[name], a), (lora.lora_B[name], b)):
            factor.weight.data = values.clone()  # PEFT's own are float32
            leaves.append(factor.weight)
    return Layer(lora.train(training), tuple(leaves))


class _DequantizedLinear(torch.autograd.Function):
    """Dequantise, then a dense product; the backward does it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Any, dequantize: Callable[..., Tensor]) -> Tensor:
        ctx.params, ctx.dequantize = params, dequantize
        return F.linear(x, dequantize(params.data, params.quant_state))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dense = ctx.dequantize(ctx.params.data, ctx.params.quant_state)
        return grads[0] @ dense, None, None


def _dequantizing(given: Weights) -> Callable[[Tensor], Tensor]:
    bnb: Any = peers.require("bitsandbytes")
    params = copy_of(given.nf4).to_bitsandbytes()
    return lambda x: _DequantizedLinear.apply(x, params, bnb.functional.dequantize_4bit)
