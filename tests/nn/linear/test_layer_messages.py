"""Bad input to the operator and to the layer: the argument, what was expected, and what came.

One table for both: what a row names is what a user has to change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collavo_kernels import LoRAAdapter, NF4Weight, qlora_linear, quantize_nf4
from collavo_kernels.nn import DualQLoRALinear

N, K, R = 48, 64, 4
SIZES = "32, 64, 128, 256, 512, 1024, 2048, 4096"
FACTS = "weight.quant_state.bitsandbytes__nf4"
X = torch.randn(3, K)
A, B = torch.randn(R, K), torch.randn(N, R)
MASK = torch.ones(3, dtype=torch.uint8)
PACKED, SCALES = (lambda w: (w.packed, w.scales))(quantize_nf4(torch.randn(N, K)))
WEIGHT = NF4Weight(PACKED, SCALES, (N, K))


def make_layer(**options: Any) -> DualQLoRALinear:
    return DualQLoRALinear.from_linear(nn.Linear(K, N), **({"rank": R} | options))


def call(**arguments: Any) -> Callable[[], object]:
    every = {"x": X, "weight": WEIGHT, "adapters": [LoRAAdapter(A, B)], **arguments}
    return lambda: qlora_linear(every.pop("x"), every.pop("weight"), **every)


def with_factor(side: str, value: Tensor, dropout: float = 0.0) -> Callable[[], object]:
    def run() -> None:
        layer = make_layer(dropout=dropout)
        getattr(layer, side)["vl"].weight = nn.Parameter(value)
        layer(X)

    return run


def with_weight(value: Tensor) -> Callable[[], object]:
    def run() -> None:
        layer = make_layer()
        layer.weight = nn.Parameter(value)
        layer(X)

    return run


def load(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[], object]:
    """Load a state with one entry changed (None takes it out) into a layer that has packed."""

    def run() -> None:
        layer = make_layer()
        state = layer.state_dict()
        layer(X)
        entry = state.pop(name)
        if change is not None:
            state[name] = change(entry)
        layer.load_state_dict(state)

    return run


def load_facts(**changes: Any) -> Callable[[], object]:
    def change(facts: Tensor) -> Tensor:
        text = json.dumps(json.loads(bytes(facts.tolist())) | changes)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return load(FACTS, change)


WRONG: dict[str, tuple[Callable[[], object], type[Exception], tuple[str, ...]]] = {
    # --- a weight that asks for gradients: bytes have none, so it is no uint8 weight either
    "operator, weight with gradient": (
        lambda: NF4Weight(PACKED.float().requires_grad_(), SCALES, (N, K)),
        TypeError,
        ("packed: expected dtype uint8", "got float32 [1536, 1] on cpu"),
    ),
    "layer, weight with gradient": (
        with_weight(torch.randn(N, K)),
        TypeError,
        ("packed: expected dtype uint8", "got float32 [48, 64] on cpu"),
    ),
    "layer, requires_grad_": (
        lambda: make_layer().requires_grad_(),
        ValueError,
        ("weight: a 4-bit weight cannot get a gradient", "got requires_grad=True", "adapters"),
    ),
    # --- adapters
    "operator, a": (
        call(adapters=[LoRAAdapter(A, B), LoRAAdapter(A[:, 1:], B)]),
        ValueError,
        ("adapters[1].a: expected shape [R, 64]", "got float32 [4, 63] on cpu"),
    ),
    "operator, b": (
        call(adapters=[LoRAAdapter(A, B[:, 1:])]),
        ValueError,
        ("adapters[0].b: expected shape [48, 4]", "got float32 [48, 3] on cpu"),
    ),
    "operator, a on meta": (
        call(adapters=[LoRAAdapter(A.to("meta"), B)]),
        ValueError,
        ("adapters[0].a: expected a tensor on cpu", "got float32 [4, 64] on meta"),
    ),
    "operator, dtype of b": (
        call(adapters=[LoRAAdapter(A, B.half())]),
        TypeError,
        ("adapters[0].b: expected dtype float32", "got float16 [48, 4] on cpu"),
    ),
    "layer, a": (
        with_factor("lora_A", A[:, 1:]),
        ValueError,
        ("adapters[1].a: expected shape [R, 64]", "got float32 [4, 63] on cpu"),
    ),
    "layer, b on meta": (
        with_factor("lora_B", B.to("meta")),
        ValueError,
        ("adapters[1].b: expected a tensor on cpu", "got float32 [48, 4] on meta"),
    ),
    "layer with dropout, b": (
        with_factor("lora_B", B[1:], dropout=0.5),
        ValueError,
        ("adapters[1].b: expected shape [48, 4]", "got float32 [47, 4] on cpu"),
    ),
    "layer with dropout, a on meta": (
        with_factor("lora_A", A.to("meta"), dropout=0.5),
        ValueError,
        ("adapters[1].a: expected a tensor on cpu", "got float32 [4, 64] on meta"),
    ),
    "layer, name of an adapter": (
        lambda: make_layer().adapter("text"),
        ValueError,
        ("adapter: expected one of image, vl", "got 'text'"),
    ),
    # --- the mask
    "operator, mask": (
        call(adapter_mask=MASK[:2]),
        ValueError,
        ("adapter_mask: expected shape [3]", "got uint8 [2] on cpu"),
    ),
    "layer, mask": (
        lambda: make_layer()(X, MASK[:2]),
        ValueError,
        ("adapter_mask: expected shape [3]", "got uint8 [2] on cpu"),
    ),
    # A mask of one entry would broadcast over all tokens.
    "layer with dropout, mask": (
        lambda: make_layer(dropout=0.5)(X, MASK[:1]),
        ValueError,
        ("adapter_mask: expected shape [3]", "got uint8 [1] on cpu"),
    ),
    "layer with dropout, dtype of the mask": (
        lambda: make_layer(dropout=0.5)(X, MASK.bool()),
        TypeError,
        ("adapter_mask: expected dtype uint8", "got bool [3] on cpu"),
    ),
    "layer with dropout, too many adapters": (
        lambda: make_layer(dropout=0.5, adapters=tuple("abcdefghi"))(X, MASK),
        ValueError,
        ("adapters: expected at most 8 beside adapter_mask", "got 9"),
    ),
    "layer, mask on meta": (
        lambda: make_layer()(X, MASK.to("meta")),
        ValueError,
        ("adapter_mask: expected a tensor on cpu", "got uint8 [3] on meta"),
    ),
    # --- x
    "operator, x": (
        call(x=X[:, 4:]),
        ValueError,
        ("x: expected [..., 64] for the weight [48, 64]", "got float32 [3, 60] on cpu"),
    ),
    "layer, x": (
        lambda: make_layer()(X[:, 4:]),
        ValueError,
        ("x: expected [..., 64] for the weight [48, 64]", "got float32 [3, 60] on cpu"),
    ),
    "layer, dtype of x": (
        lambda: make_layer()(X.int()),
        TypeError,
        ("x: expected dtype float32", "got int32 [3, 64] on cpu"),
    ),
    "layer in panels, x on meta": (
        lambda: make_layer().pack()(X.to("meta")),
        ValueError,
        ("weight: expected a tensor on meta", "got uint8 [3, 1, 576] on cpu"),
    ),
    # --- block sizes and dtypes
    "quantize_nf4, block size": (
        lambda: quantize_nf4(torch.randn(N, K), block_size=48),
        ValueError,
        (f"block_size: expected one of {SIZES}", "got 48"),
    ),
    "layer, block size": (
        lambda: DualQLoRALinear(K, N, block_size=48),
        ValueError,
        (f"block_size: expected one of {SIZES}", "got 48"),
    ),
    "quantize_nf4, dtype": (
        lambda: quantize_nf4(torch.randn(N, K, dtype=torch.float64)),
        TypeError,
        ("weight: expected dtype float32 or bfloat16 or float16", "got float64 [48, 64] on cpu"),
    ),
    "layer, dtype": (
        lambda: DualQLoRALinear(K, N, dtype=torch.int8),
        TypeError,
        ("dtype: expected one of float32, bfloat16, float16, float64", "got torch.int8"),
    ),
    "layer, dtype of adapters": (
        lambda: DualQLoRALinear(K, N, adapter_dtype=torch.uint8),
        TypeError,
        ("adapter_dtype: expected one of float32", "got torch.uint8"),
    ),
    "layer, merged dtype": (
        lambda: make_layer().pack().base().dequantize(torch.int8),  # type: ignore[union-attr]
        TypeError,
        ("dtype: expected one of float32", "got torch.int8"),
    ),
    "from_linear of another module": (
        lambda: DualQLoRALinear.from_linear(nn.Embedding(N, K)),  # type: ignore[arg-type]
        TypeError,
        ("linear: expected nn.Linear", "got Embedding"),
    ),
    "from_bitsandbytes of a dense layer": (
        lambda: DualQLoRALinear.from_bitsandbytes(nn.Linear(K, N)),
        TypeError,
        ("linear: expected bitsandbytes' Linear4bit", "got Linear", "from_linear()"),
    ),
    # --- state dicts
    "state, codes missing": (
        load("weight", None),
        RuntimeError,
        ("weight: missing from the state dict", "absmax, quant_map"),
    ),
    "state, scales missing": (
        load("weight.absmax", None),
        RuntimeError,
        ("weight.absmax: missing from the state dict", "codes and scales"),
    ),
    "state, nested scales missing": (
        load("weight.nested_absmax", None),
        RuntimeError,
        ("weight.nested_absmax: missing from the state dict",),
    ),
    "state, number of bytes": (
        load("weight", lambda codes: codes[:-3]),
        RuntimeError,
        ("weight: expected 1536 bytes (uint8) for an NF4 matrix [48, 64]", "got uint8 [1533, 1]"),
    ),
    "state, dtype of codes": (
        load("weight", lambda codes: codes.float()),
        RuntimeError,
        ("weight: expected 1536 bytes (uint8)", "got float32 [1536, 1] on cpu"),
    ),
    "state, number of scales": (
        load("weight.absmax", lambda scales: scales[:-1]),
        RuntimeError,
        ("weight.absmax: expected 48 values of uint8 for [48, 64]", "got uint8 [47] on cpu"),
    ),
    "state, dtype of nested scales": (
        load("weight.nested_absmax", lambda scales: scales.bfloat16()),
        RuntimeError,
        ("weight.nested_absmax: expected 1 values of float32", "got bfloat16 [1] on cpu"),
    ),
    "state, another code": (
        load("weight.quant_map", lambda code: code[:3]),
        RuntimeError,
        ("weight.quant_map: expected the 16 values of NF4", "got [-1.0, "),
    ),
    "state, facts on meta": (
        load(FACTS, lambda facts: facts.to("meta")),
        RuntimeError,
        (f"{FACTS}: expected JSON in bytes", "on meta"),
    ),
    "state, facts that are no JSON": (
        load(FACTS, lambda facts: facts[1:]),
        RuntimeError,
        (f"{FACTS}: expected JSON in bytes, got something else",),
    ),
    "state, format": (
        load_facts(quant_type="fp4"),
        RuntimeError,
        (f"{FACTS}: expected quant_type nf4", 'got "fp4"'),
    ),
    "state, block size": (
        load_facts(blocksize=48),
        RuntimeError,
        (f"{FACTS}: expected blocksize one of {SIZES}", "got 48"),
    ),
    "state, nested block size": (
        load_facts(nested_blocksize=128),
        RuntimeError,
        (f"{FACTS}: expected nested_blocksize 256", "got 128"),
    ),
    "state, dtype": (
        load_facts(dtype=["int8"]),
        RuntimeError,
        (f"{FACTS}: expected dtype one of float32, bfloat16, float16", 'got ["int8"]'),
    ),
    "state, shape": (
        load_facts(shape=[48, None]),
        RuntimeError,
        (f"{FACTS}: expected shape two sizes [N, K]", "got [48, null]"),
    ),
    "state, offset": (
        load_facts(nested_offset="0"),
        RuntimeError,
        (f"{FACTS}: expected nested_offset a number", 'got "0"'),
    ),
    "state of another layer": (
        lambda: make_layer().load_state_dict(
            DualQLoRALinear(32, N, bias=True, rank=R).state_dict()
        ),
        RuntimeError,
        ("weight: expected an NF4 matrix [48, 64]", "got [48, 32]"),
    ),
    "state, adapter": (
        load("lora_A.vl.weight", lambda a: a[:, 1:]),
        RuntimeError,
        ("lora_A.vl.weight", "[4, 63]", "[4, 64]"),
    ),
    "state, bias": (load("bias", lambda b: b[1:]), RuntimeError, ("bias", "[47]", "[48]")),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_named(name: str) -> None:
    wrong, error, words = WRONG[name]
    with pytest.raises(error) as raised:
        wrong()
    message = str(raised.value)
    assert all(word in message for word in words), message
