"""qlora_linear beside bitsandbytes' base, PEFT on it, and a dense layer with two LoRA branches.

The work is the whole operator with two adapters; ``bitsandbytes`` does the base alone, and is given
less to do on purpose: it is the anchor. Weights rotate, so that none is still in a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.conftest import Measure
from collavo_kernels import LoRAAdapter, qlora_linear, quantize_nf4
from collavo_kernels.testing import relative_error

PROVIDERS = ("ours", "bitsandbytes", "peft", "dense+lora", "reference")
QUICK = ("4096x4096/m1/r64", "4096x4096/m16/r64", "4096x4096/m128/r64")
FULL = tuple(
    case
    for shape in ("4096x4096", "4096x11008", "11008x4096", "5120x13824")
    for m in (1, 4, 16, 128, 1024)
    for rank in (16, 64, 256)
    if (case := f"{shape}/m{m}/r{rank}") not in QUICK
)
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)]
DTYPE = torch.bfloat16
ROTATION_BYTES = 64 << 20


class Problem:
    """One shape: K x N, M tokens, two adapters of one rank in bfloat16."""

    def __init__(self, case: str, device: torch.device) -> None:
        shape, tokens, rank = case.split("/")
        self.k, self.n = (int(size) for size in shape.split("x"))
        self.m, self.rank = int(tokens[1:]), int(rank[1:])
        self.device = device
        self.x = torch.randn(self.m, self.k, device=device).to(DTYPE)
        self.dense = [self._weight() for _ in range(2)]
        self.nf4 = [quantize_nf4(weight) for weight in self.dense]
        self.adapters = [self._adapter() for _ in range(2)]
        self.copies = max(1, ROTATION_BYTES // (self.n * self.k // 2) // 2)

    def _weight(self) -> Tensor:
        return (torch.randn(self.n, self.k, device=self.device) / self.k**0.5).to(DTYPE)

    def _adapter(self) -> LoRAAdapter:
        a = torch.randn(self.rank, self.k, device=self.device) / self.k**0.5
        b = torch.randn(self.n, self.rank, device=self.device) / self.rank**0.5
        return LoRAAdapter(a.to(DTYPE).requires_grad_(), b.to(DTYPE).requires_grad_(), 1.0)

    def rotated(self, items: Sequence[Any], clone: Callable[[Any], Any]) -> Callable[[], Any]:
        """Return a function that gives another copy at every call."""
        everything = [*items, *(clone(i) for _ in range(self.copies) for i in items)]
        following = itertools.cycle(everything)
        return lambda: next(following)

    def exact(self) -> Tensor:
        """Return the output in float64."""
        adapters = [LoRAAdapter(a.double(), b.double(), s) for a, b, s in self.adapters]
        with torch.no_grad():
            return qlora_linear(self.x.double(), self.nf4[0], adapters, backend="reference")

    @property
    def bytes(self) -> int:
        """Bytes that the operator has to read and write."""
        weight = self.n * self.k * (0.5 + 1 / 64)
        return int(weight + 4 * self.rank * (self.n + self.k) + 2 * self.m * (self.n + self.k))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the forward."""
        return 2 * self.m * (self.n * self.k + 2 * self.rank * (self.n + self.k))


def make(provider: str, problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the provider's forward."""
    if provider in ("ours", "reference"):
        backend = "" if provider == "ours" else provider
        weight = problem.rotated(problem.nf4, lambda w: type(w)(w.packed.clone(), *_rest(w)))
        return lambda x: qlora_linear(x, weight(), problem.adapters, backend=backend)
    if provider == "dense+lora":
        dense = problem.rotated(problem.dense, torch.clone)
        return lambda x: _dense(x, dense(), problem.adapters)
    layers = [_bitsandbytes(problem, i, with_peft=provider == "peft") for i in (0, 1)]
    layer = problem.rotated(layers, lambda each: each)
    return lambda x: layer()(x)


def _rest(weight: Any) -> tuple[Any, ...]:
    return weight.scales.clone(), weight.shape, weight.block_size, weight.double_quant, weight.dtype


def _dense(x: Tensor, weight: Tensor, adapters: list[LoRAAdapter]) -> Tensor:
    out = F.linear(x, weight)
    for a, b, scaling in adapters:
        out = out + scaling * F.linear(F.linear(x, a), b)
    return out


def _bitsandbytes(problem: Problem, index: int, *, with_peft: bool) -> nn.Module:
    bnb: Any = peers.require("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        problem.k, problem.n, bias=False, quant_type="nf4", compute_dtype=DTYPE
    )
    layer.weight = problem.nf4[index].to_bitsandbytes()
    if not with_peft:
        return layer.eval()
    peft: Any = peers.require("peft")
    model = nn.ModuleDict({"layer": layer})
    options = {"r": problem.rank, "lora_alpha": problem.rank, "target_modules": ["layer"]}
    config = peft.LoraConfig(**options, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="image")
    wrapped.add_adapter("vl", config)
    lora = wrapped.base_model.model["layer"]
    lora.set_adapter(["image", "vl"])
    for name, (a, b, _) in zip(("image", "vl"), problem.adapters, strict=True):
        lora.lora_A[name].weight.data = a.detach().clone()
        lora.lora_B[name].weight.data = b.detach().clone()
    return lora.eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_forward(measure: Measure, device: torch.device, provider: str, case: str) -> None:
    """Inference: no gradients."""
    problem = Problem(case, device)
    fn = make(provider, problem)
    with torch.no_grad():
        # The dense layer has other weights, and bitsandbytes has no adapters.
        whole = provider in ("ours", "reference", "peft")
        error = relative_error(fn(problem.x), problem.exact()) if whole else None
        measure(
            lambda: fn(problem.x),
            op="qlora_linear",
            provider=_name(provider, device),
            case=case,
            dtype=DTYPE,
            bytes=problem.bytes,
            flops=problem.flops,
            error=error,
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "bitsandbytes"])
def bench_training(measure: Measure, device: torch.device, provider: str, case: str) -> None:
    """Forward and backward: gradients of x and both adapters."""
    problem = Problem(case, device)
    fn = make(provider, problem)
    x = problem.x.clone().requires_grad_()
    grad = torch.randn(problem.m, problem.n, device=device).to(DTYPE)
    measure(
        lambda: fn(x).backward(grad),
        op="qlora_linear",
        provider=_name(provider, device),
        case=case,
        mode="fwd+bwd",
        dtype=DTYPE,
        bytes=2 * problem.bytes,
        flops=2 * problem.flops,
    )


def _name(provider: str, device: torch.device) -> str:
    if provider != "ours":
        return provider
    return "ours:cpu" if device.type == "cpu" else "ours:triton"
