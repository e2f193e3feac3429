"""Who is measured for ``qlora_linear``: this package, its peers, and what one would write by hand.

A provider makes a ``Layer``: one copy of the weights in memory of its own, and how to call it. The
benchmark makes as many as rotate past the last-level cache. Adapters are bfloat16 like the rest, or
float32 where a provider's name ends with ``-fp32-adapters``: those are what ``apply_to_llava`` and
PEFT make unless told otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import caches, machine, peers
from benchmarks.ops.qlora_linear_cases import (
    BASE_ONLY,
    DTYPE,
    FLOAT32_ADAPTERS,
    INT8,
    Case,
    Weights,
    copy_of,
    exact,
    streaming_copy_of,
    tokens,
    weights,
)
from benchmarks.registry import Call, Row, Unavailable
from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear
from collavo_kernels.testing import relative_error

ADAPTERS = ("image", "vl")
# y, or the gradients of x and of the adapters' factors.
Found = Tensor | tuple[Tensor, ...]
Forward = Callable[[Tensor], Tensor]
Adapters = tuple[LoRAAdapter, ...]


class Layer(NamedTuple):
    """A copy of the layer: its forward, and the adapters' factors A0, B0, A1, B1 that it trains."""

    forward: Forward
    leaves: tuple[Tensor, ...] = ()


def _adapted(forward: Callable[[Weights, Adapters], Forward]) -> Callable[[Weights, bool], Layer]:
    """Give what makes a forward adapters of its own to train."""

    def make(given: Weights, training: bool) -> Layer:
        own = tuple(
            LoRAAdapter(a.clone().requires_grad_(), b.clone().requires_grad_(), scaling)
            for a, b, scaling in given.adapters
        )
        return Layer(forward(given, own), tuple(factor for a, b, _ in own for factor in (a, b)))

    return make


def _operator(given: Weights, adapters: Adapters, backend: str) -> Forward:
    copy = streaming_copy_of if backend == "cpu" else copy_of
    weight = copy(given.nf4)
    return lambda x: qlora_linear(x, weight, adapters, backend=backend)


def _int8(given: Weights, training: bool) -> Layer:
    weight = streaming_copy_of(given.nf4)
    return Layer(lambda x: qlora_linear(x, weight, int8_activations=True))


def _dense(given: Weights, training: bool) -> Layer:
    weight = given.dense.clone()
    return Layer(lambda x: F.linear(x, weight))


def _dense_lora(given: Weights, adapters: Adapters) -> Forward:
    dense = given.dense.clone()
    return lambda x: _branches(F.linear(x, dense), x, adapters)


def _dequantize_lora(given: Weights, adapters: Adapters) -> Forward:
    base = _dequantizing(given)
    return lambda x: _branches(base(x), x, adapters)


def _compiled(given: Weights, adapters: Adapters) -> Forward:
    return functools.partial(_compiled_reference(), weight=copy_of(given.nf4), adapters=adapters)


def _branches(out: Tensor, x: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
    for a, b, scaling in adapters:
        out = torch.addmm(out, F.linear(x, a), b.t(), alpha=scaling)
    return out


def reference_forward(x: Tensor, weight: NF4Weight, adapters: Sequence[LoRAAdapter]) -> Tensor:
    """Run the reference as plain PyTorch, which torch.compile can see through."""
    from collavo_kernels.ops.qlora_linear import reference
    from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs

    a, b, scaling = (list(each) for each in zip(*adapters, strict=True))
    format_ = (weight.scales, weight.shape[0], weight.block_size, weight.double_quant)
    given = QLoRAInputs(x, weight.packed, *format_, a, b, scaling, None, None, None, None)
    return reference.forward(given).out


@functools.cache
def _compiled_reference() -> Callable[..., Tensor]:
    return torch.compile(reference_forward)


def _bitsandbytes(given: Weights, training: bool) -> Layer:
    return Layer(_bitsandbytes_module(given, training))


def _bitsandbytes_module(given: Weights, training: bool) -> nn.Module:
    bnb: Any = peers.require("bitsandbytes")
    (n, k), device = given.nf4.shape, given.nf4.device
    layer: nn.Module = bnb.nn.Linear4bit(
        k, n, bias=False, quant_type="nf4", compute_dtype=DTYPE, device="meta"
    )
    layer.weight = copy_of(given.nf4).to_bitsandbytes()
    if device.type == "cpu" and machine.isa() != "avx512":
        # It asks the processor, not torch: without this it would use AVX-512 under --isa avx2.
        layer.support_avx512bf16_for_cpu = False
    return layer.train(training)


def _peft(given: Weights, training: bool) -> Layer:
    peft: Any = peers.require("peft")
    model = nn.ModuleDict({"layer": _bitsandbytes_module(given, training)})
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


def _wide(make: Callable[[Weights, bool], Layer]) -> Callable[[Weights, bool], Layer]:
    """Give a provider adapters in float32."""

    def made(given: Weights, training: bool) -> Layer:
        wide = (LoRAAdapter(a.float(), b.float(), scaling) for a, b, scaling in given.adapters)
        return make(given._replace(adapters=tuple(wide)), training)

    return made


PROVIDERS: dict[str, Callable[[Weights, bool], Layer]] = {
    **{
        f"ours:{backend}": _adapted(functools.partial(_operator, backend=backend))
        for backend in ("cpu", "triton", "cuda")
    },
    INT8: _int8,
    "bitsandbytes": _bitsandbytes,
    "peft": _peft,
    "dense": _dense,
    "dense+lora": _adapted(_dense_lora),
    "dequantize+lora": _adapted(_dequantize_lora),
    "reference": _adapted(functools.partial(_operator, backend="reference")),
    "compile(reference)": _adapted(_compiled),
}
PROVIDERS |= {
    f"{name}{FLOAT32_ADAPTERS}": _wide(PROVIDERS[name])
    for name in ("ours:cpu", "ours:triton", "ours:cuda", "peft")
}


@functools.lru_cache(maxsize=1)
def kept_layers(
    shape: tuple[int, int], rank: int, training: bool, device: torch.device
) -> dict[str, list[Layer]]:
    """Return where the copies of one shape and rank are kept; the former ones are let go."""
    return {}


def layers(case: Case, provider: str, training: bool, x: Tensor) -> list[Layer]:
    """Return the provider's copies of the layer, as many as rotate past the cache."""
    device = x.device
    kept = kept_layers((case.k, case.n), case.rank, training, device)
    if provider not in kept:
        given = weights(case.k, case.n, case.rank, device)
        size = case.n * case.k * (DTYPE.itemsize if provider.startswith("dense") else 0.5)
        copies = range(caches.copies_past_cache(int(size), device))
        made = [PROVIDERS[provider](given, training) for _ in copies]
        for layer in () if training else made:
            layer.forward(x)  # bitsandbytes packs its weight anew at first use
        kept[provider] = made
    return kept[provider]


def calls(mode: str, copies: list[Layer], x: Tensor, grad: Tensor) -> list[Callable[[], Found]]:
    """Return what is timed, a call per copy."""

    def forward(layer: Layer) -> Tensor:
        return layer.forward(x)

    def both(layer: Layer) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.forward(x), [x, *layer.leaves], grad)

    run: Callable[[Layer], Found] = both if mode == "fwd+bwd" else forward
    return [functools.partial(run, layer) for layer in copies]


def error_of(found: Found, mode: str, provider: str, case: Case, device: torch.device) -> float:
    """Return the error against float64 of what the provider computes; of gradients, the worst."""
    expected = exact(
        case,
        device,
        dense=provider.startswith("dense"),
        adapted=provider not in BASE_ONLY,
        gradients=mode == "fwd+bwd",
    )
    if isinstance(found, Tensor):
        return relative_error(found.detach(), expected.y)
    wanted = (*expected.dx, *expected.factors)
    return max(relative_error(f, e) for f, e in zip(found, wanted, strict=True))


def prepare(row: Row, device: torch.device) -> Call:
    """Return the row's call: the next copy of the layer each time."""
    case, mode, provider = Case.parse(row.case), row.mode, row.provider
    training = mode != "fwd"
    x, grad = tokens(case, device)
    x = x.detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        try:
            copies = layers(case, provider, training, x)
            copies[0].forward(x)
        except (TypeError, ValueError) as reason:
            if not row.is_ours:
                raise
            raise Unavailable(str(reason)) from reason
    following = itertools.cycle(calls(mode, copies, x, grad))
    config: dict[str, object] = {"copies": len(copies)}
    if provider.startswith(("bitsandbytes", "peft")):
        config["hub_kernel"] = peers.has_hub_kernel()
    return Call(
        lambda: next(following)(),
        dtype=DTYPE,
        bytes=case.bytes(mode, provider),
        flops=case.flops(mode, provider),
        error=lambda: error_of(next(following)(), mode, provider, case, device),
        config=config,
        grad=training,
    )
