"""Runs every operator and module of ``collavo_kernels``; test_requirements.py blocks the rest.

A script of its own, because what the test run has imported cannot be taken away again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import collavo_kernels
import collavo_kernels.nn as layers
from collavo_kernels import info

BACKENDS = ("reference", "cpu")


def usable(operator: str) -> list[str]:
    """Return the backends that run here; "cpu" is missing where nothing is compiled."""
    reasons = {b.name: b.reason_against("cpu") for b in info.operators()[operator].backends}
    return [name for name in BACKENDS if reasons[name] is None]


def crayon_map(backend: str = "") -> collavo_kernels.CrayonMap:
    maps = torch.tensor([[[3, 3], [0, 3]]], dtype=torch.int32)
    ids, classes = torch.tensor([[3], [0]], dtype=torch.int32)
    return collavo_kernels.panoptic_lookup(maps, [ids], [classes], grid=(2, 2), backend=backend)


def run_panoptic_lookup(backend: str) -> None:
    assert crayon_map(backend).row_index.tolist() == [[1, 1, 0, 1]]


def run_qlora_linear(backend: str) -> None:
    weight = collavo_kernels.quantize_nf4(torch.randn(32, 64))
    factors = torch.randn(8, 64, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    x = torch.randn(5, 64, requires_grad=True)
    adapter = collavo_kernels.LoRAAdapter(*factors, 2.0)
    y = collavo_kernels.qlora_linear(x, weight, [adapter], backend=backend)
    expected = x @ weight.dequantize().T + 2 * (x @ factors[0].T) @ factors[1].T
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-4)
    check_gradients(y, [x, *factors])


def run_crayon_attention(backend: str) -> None:
    inputs = [torch.randn(1, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    table = torch.randn(2, 2, 8, requires_grad=True)
    rows = torch.tensor([[-1, 0, 0, 1, 1, -1]], dtype=torch.int32)
    result = collavo_kernels.crayon_attention(
        *inputs, crayon_k=table, row_index=rows, backend=backend
    )
    check_gradients(result.out, [*inputs, table])


def check_gradients(out: Tensor, leaves: list[Tensor]) -> None:
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert bool(gradient.isfinite().all()) and bool(gradient.any())


def run_modules() -> None:
    layer = layers.DualQLoRALinear.from_linear(nn.Linear(64, 32), rank=4)
    nn.init.normal_(layer.adapter("vl").b)
    x = torch.randn(5, 64, requires_grad=True)
    check_gradients(layer(x), [x, layer.adapter("vl").a, layer.adapter("vl").b])
    folder = Path(sys.argv[1])
    layers.save_peft_adapter(nn.ModuleDict({"q_proj": layer}), folder, "vl")
    layers.load_peft_adapter(nn.ModuleDict({"q_proj": layer}), folder, "image")
    assert torch.equal(layer.adapter("image").b, layer.adapter("vl").b)

    prompt = layers.CrayonPrompt(embed_dim=8, hidden_size=64, zero_init=False)
    check_gradients(prompt(crayon_map()), list(prompt.mlp.parameters()))

    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    attention = layers.CrayonAttention(config, 0)
    hidden = torch.randn(2, 7, 64, requires_grad=True)
    angle = torch.randn(1, 7, 16)
    out, _ = attention(hidden, (angle.cos(), angle.sin()))
    check_gradients(out, [hidden, *attention.parameters()])
    branch = layers.CrayonBranch(64, 48, rank=4)
    nn.init.normal_(branch.B.weight)
    check_gradients(branch(hidden), [hidden, *branch.parameters()])
    try:
        layers.register_attention()
    except ImportError as error:
        print(error)


def main() -> None:
    torch.manual_seed(0)
    runs = {name: globals()[f"run_{name}"] for name in info.operators()}
    for name, run in runs.items():
        for backend in usable(name):
            run(backend)
            print(f"{name} {backend}")
    run_modules()


if __name__ == "__main__":
    main()
