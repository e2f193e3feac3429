"""Random shapes and options of both operators that add up: their error beside PyTorch's own.

    python -m tests.fuzz.fuzz_accuracy --seconds 120 --seed 0

A case is drawn from its seed, computed once in float64 and once in its own dtype with PyTorch's
operators, and by the kernels of every instruction set that this machine has, outputs and gradients.
Every tensor has to keep its budget (``collavo_kernels/testing/budget.py``). The third operator,
``panoptic_lookup``, counts: its results are compared bit by bit elsewhere.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collavo_kernels import LoRAAdapter, crayon_attention
from collavo_kernels._native import ISA_CODES, native
from collavo_kernels._rows import sum_rows
from collavo_kernels.ops.crayon_attention.inputs import AttentionInputs
from collavo_kernels.ops.crayon_attention.reference import prepared
from collavo_kernels.ops.qlora_linear import NF4Weight
from collavo_kernels.testing.budget import error_budget
from collavo_kernels.testing.cases.crayon_attention import AttentionCase, eager, visible_keys
from collavo_kernels.testing.cases.qlora_linear import QLoRACall, QLoRACase, make_call

_LEAVES = ("q", "k", "v", "crayon_q", "crayon_k", "crayon_v")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
Named = dict[str, Tensor]


@dataclass(frozen=True)
class AccuracyCase:
    """One call of one operator.

    Attributes:
        seed: That it was drawn from, and of its values.
        dtype: Of x, or of q, k and v.
        operator: Its shapes and options.
        shift: Added to x, or to v: sums of terms of one sign grow, others hover around zero.
    """

    seed: int
    dtype: torch.dtype
    operator: QLoRACase | AttentionCase
    shift: float


class Verdict(NamedTuple):
    """How a tensor fared: its error as a share of the budget, above 1 if it broke it."""

    name: str
    share: float
    error: float
    honest: float


def draw(seed: int, dtype: torch.dtype | None = None) -> AccuracyCase:
    """Draw a case; sizes lie at the edges of vectors, tiles and blocks and between them."""
    r = random.Random(seed)
    drawn = r.choice(DTYPES)
    operator = _linear(r) if r.random() < 0.6 else _attention(r)
    return AccuracyCase(seed, dtype or drawn, operator, r.choice((0.0, 0.0, 0.0, 1.0)))


def _linear(r: random.Random) -> QLoRACase:
    k = r.choice((r.randint(1, 300), 64 * r.randint(1, 8), 64 * r.randint(8, 40)))
    ranks = (1, 3, 8, 16, 33, 64, 64, 130, 256)
    case = QLoRACase(
        "random",
        "",
        (r.choice((1, 1, r.randint(2, 16), r.randint(17, 64), r.randint(65, 260))),),
        n=r.choice((r.randint(1, 8), r.randint(9, 150), r.randint(150, 600))),
        k=k,
        ranks=tuple(r.choice(ranks) for _ in range(r.choice((0, 1, 2, 2, 3)))),
        block_size=r.choice((64, 64, 32, 128, 256)),
        double_quant=r.random() < 0.7,
        wide_adapters=r.random() < 0.2,
        mask=r.random() < 0.3,
        rows=r.choice((None, None, 1, 5)),
        bias=r.random() < 0.3,
    )
    return replace(case, panels=case.packable and r.random() < 0.5)


def _attention(r: random.Random) -> AttentionCase:
    length = r.choice((r.randint(2, 16), r.randint(17, 70), r.randint(71, 300)))
    batch, kv_heads = r.choice((1, 1, 2)), r.choice((1, 2, 3))
    ends = [sorted((r.randint(0, length), r.randint(0, length))) for _ in range(batch)]
    span = sorted((r.randint(0, length), r.randint(0, length)))
    return AttentionCase(
        "random",
        "",
        batch=batch,
        length=length,
        heads=kv_heads * r.choice((1, 2, 4)),
        kv_heads=kv_heads,
        head_dim=r.choice((2 * r.randint(1, 64), 64, 64, 128, 256)),
        rows=r.choice((1, 4, 20)),
        images=((span[0], span[1]),),
        ranges=tuple((a, b) for a, b in ends) if r.random() < 0.3 else None,
        causal=r.random() < 0.7,
        window=r.choice((None, None, None, r.randint(2, length))),
        scale=r.choice((None, None, None, 0.3, -0.2)),
        tables=r.choice(("", "k", "qv", "qkv", "qkv")),
        own_angles=r.random() < 0.3,
        rotated=r.random() < 0.7,
    )


def verdicts(case: AccuracyCase) -> Iterator[tuple[str, Verdict]]:
    """Yield, for every instruction set here and every tensor of a case, how it fared."""
    run = _linear_results if isinstance(case.operator, QLoRACase) else _attention_results
    kernels, plain, sizes = run(case)
    exact, low = plain(torch.float64), plain(case.dtype)
    for isa in native().isas():
        with _instruction_set(isa):
            found = kernels()
        for name, value in found.items():
            assert value.shape == exact[name].shape and value.dtype == low[name].dtype, name
            # What a float32 adapter's gradient went through is as narrow as x.
            narrow = (x.to(case.dtype) for x in (value, low[name]))
            yield isa, judge(name, *narrow, exact[name], sizes.get(name))


def judge(
    name: str, found: Tensor, low: Tensor, exact: Tensor, terms: Tensor | None = None
) -> Verdict:
    """Compare a tensor's error with its budget; ``terms`` as in ``error_budget``."""
    if found.numel() == 0:
        return Verdict(name, 0.0, 0.0, 0.0)
    error, honest = (float((x.double() - exact).abs().max()) for x in (found, low))
    budget = error_budget(low, exact, terms)
    share = error / budget if budget > 0 else math.inf if error > 0 else 0.0
    return Verdict(name, math.inf if math.isnan(share) else share, error, honest)


@contextmanager
def _instruction_set(isa: str) -> Iterator[None]:
    module = native()
    before = module.best_isa()
    module.use_isa(ISA_CODES[isa])
    try:
        yield
    finally:
        module.use_isa(ISA_CODES[before])


# The kernels; PyTorch in a dtype; how large the terms of a tensor's sums are, by its name.
Runs = tuple[Callable[[], Named], Callable[[torch.dtype], Named], Named]


def _linear_results(case: AccuracyCase) -> Runs:
    """Return what runs the kernels, and what runs ``plain_linear`` in a dtype."""
    call = make_call(case.operator, case.dtype, seed=case.seed)
    call = replace(call, x=(call.x.detach() + case.shift).requires_grad_())
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (*call.x.shape[:-1], case.operator.n)
    grad = torch.randn(shape, generator=generator).to(case.dtype)
    names = ["x", *(f"{each}{i}" for i in range(len(call.adapters)) for each in "ab")]
    names += [n for n in ("row_table", "bias") if getattr(call, n) is not None]

    def results(out: Tensor, leaves: list[Tensor], grad: Tensor = grad) -> Named:
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        found = {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
        return {"out": out.detach(), **found}

    def plain(dtype: torch.dtype) -> Named:
        other = call.double() if dtype == torch.float64 else call
        return results(plain_linear(other), other.leaves())

    squared = _squared(call.double())
    leaves = squared.leaves()[: len(names)]  # behind them is the weight, dense now
    squares = results(plain_linear(squared), leaves, grad.double().square())
    terms = {name: value.sqrt() for name, value in squares.items()}
    return lambda: results(call.run("cpu"), call.leaves()), plain, terms


def _squared(call: QLoRACall) -> QLoRACall:
    """Return the call of squares: its sums are those of the squares of the call's terms."""

    def square(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().square().requires_grad_()

    adapters = tuple(LoRAAdapter(square(a), square(b), s * s) for a, b, s in call.adapters)
    weight = call.weight.dequantize(torch.float64).square()
    x, table, bias = square(call.x), square(call.row_table), square(call.bias)
    return replace(call, x=x, weight=weight, adapters=adapters, row_table=table, bias=bias)


def plain_linear(call: QLoRACall) -> Tensor:
    """Return the operator's formula in PyTorch's operators, all of it in x's dtype."""
    x, dtype = call.x, call.x.dtype
    dense = call.weight.dequantize(dtype) if isinstance(call.weight, NF4Weight) else call.weight
    out = F.linear(x, dense)
    for i, (a, b, scaling) in enumerate(call.adapters):
        branch = scaling * F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
        if call.adapter_mask is not None:
            branch = branch * (call.adapter_mask >> i & 1)[..., None].to(dtype)
        out = out + branch
    if call.row_table is not None and call.row_index is not None:
        rows = call.row_table.to(dtype)[call.row_index.clamp_min(0).long()]
        out = out + rows * (call.row_index >= 0)[..., None]
    return out if call.bias is None else out + call.bias.to(dtype)


def _attention_results(case: AccuracyCase) -> Runs:
    """Return what runs the kernels, the usual PyTorch in a dtype, and sizes of terms."""
    low = case.operator.make(case.dtype, seed=case.seed, gradients=True)
    low = low._replace(v=(low.v.detach() + case.shift).requires_grad_())
    leaves = [n for n in _LEAVES if getattr(low, n) is not None]
    generator = torch.Generator().manual_seed(case.seed + 1)
    with torch.no_grad():
        shapes = [x.shape for x in eager(low)]
    # Of the output alone, or of what a cache stores too.
    grads = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    grads = grads if case.seed % 2 else grads[:1]

    def results(inputs: AttentionInputs, outputs: tuple[Tensor, ...]) -> Named:
        loss = sum((x * g).sum() for x, g in zip(outputs, grads, strict=False))
        tensors = [getattr(inputs, n) for n in leaves]
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        found = dict(zip(("out", "key", "value"), (x.detach() for x in outputs), strict=True))
        return found | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    def kernels() -> Named:
        options = dict(zip(low._fields[3:], low[3:], strict=True))
        return results(low, tuple(crayon_attention(low.q, low.k, low.v, **options, backend="cpu")))

    def plain(dtype: torch.dtype) -> Named:
        inputs = low if dtype == case.dtype else _double(low)
        return results(inputs, eager(inputs))

    return kernels, plain, _attention_terms(_double(low), [g.double() for g in grads])


def _attention_terms(inputs: AttentionInputs, grads: list[Tensor]) -> Named:
    """Return how large the terms of the gradients' sums are, for ``error_budget``.

    - ``dS = P (dP - delta)``: a query that sees one key has gradients of zero for q and k, and what
      any arithmetic leaves of them is the rounding of two equal numbers of the size of dP.
    - ``P = exp(score - lse)``: the score's rounding is a relative error of the weight, one for all
      head_dim numbers that it is multiplied with. In the backward so is the rounding of ``lse``,
      which is kept in float32, as in PyTorch's flash attention.
    """
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
    _, key, value, lse = torch.ops.collavo.crayon_attention(q, k, v, *rest, backend="reference")
    key, value = key if inputs.changes_key else k, value if inputs.changes_value else v
    query = prepared(q, inputs.crayon_q, inputs.row_index, inputs.cos, inputs.sin).detach()
    group = q.shape[2] // k.shape[2]
    q, k, v, grad = (
        x.transpose(1, 2).repeat_interleave(n, 1)
        for x, n in ((query, 1), (key, group), (value, group), (grads[0], 1))
    )
    seen, valid = visible_keys(inputs)
    scores = (q @ k.mT * inputs.softmax_scale).masked_fill(~seen[:, None], -math.inf)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0) * valid[:, None, :, None]
    squares = weights.square() * (grad.square() @ v.square().mT) * inputs.softmax_scale**2

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    sizes = {"q": (squares @ k.square()).transpose(1, 2), "k": shared(squares.mT @ q.square())}
    sizes["v"] = shared(weights.square().mT @ grad.square())
    for name, extra in zip("kv", grads[1:], strict=False):
        sizes[name] = sizes[name] + extra.square()
    for name in [n for n in "qkv" if getattr(inputs, f"crayon_{n}") is not None]:
        sizes[f"crayon_{name}"] = sum_rows(sizes[name], inputs.row_index, inputs.table_rows or 0)
    # As relative errors of a weight: the score's as of any sum of such terms; of lse half an eps.
    rounded = [(q.square() @ k.square().mT).sqrt() * abs(inputs.softmax_scale), lse.abs() / 12]
    parts = [float(x.where(x.isfinite(), 0.0).max()) for x in rounded]
    return {f"d{name}": size.sqrt() * max(1.0, *parts) for name, size in sizes.items()}


def _double(inputs: AttentionInputs) -> AttentionInputs:
    def wide(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return AttentionInputs(*map(wide, inputs))


def main() -> int:
    """Run cases until the time is over; returns 1 if a tensor broke the budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after these")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=2**31, help="stop after so many")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    worst: dict[tuple[str, ...], tuple[float, AccuracyCase]] = {}
    end, seed, tensors, over = time.monotonic() + options.seconds, options.seed, 0, 0
    while time.monotonic() < end and seed < options.seed + options.cases:
        case = draw(seed, dtype)
        for isa, found in verdicts(case):
            tensors += 1
            kind = (type(case.operator).__name__, found.name.rstrip("0123456789"))
            key = (*kind, str(case.dtype)[6:], isa)
            if found.share > worst.get(key, (0.0,))[0]:
                worst[key] = found.share, case
            if found.share > 1:
                over += 1
                print(f"{isa}: {found} of {case}", flush=True)
        seed += 1
    for key, (share, case) in sorted(worst.items()):
        print(f"{' '.join(key):52s} worst share of the budget {share:.2f}, seed {case.seed}")
    print(f"{over} of {tensors} tensors of {seed - options.seed} cases are over their budget")
    return int(over > 0)


if __name__ == "__main__":
    raise SystemExit(main())
