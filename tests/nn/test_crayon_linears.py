"""The crayon at linear level equals the dense form ``y = W (h + c[row]) + b``, for every kind."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collavo_kernels.nn import (
    BoundLinearMixin,
    CrayonInputs,
    CrayonLinearMixin,
    DualQLoRALinear,
    add_crayon_to_linears,
    bound_crayon,
    remove_crayon_from_linears,
    with_mixin,
)
from collavo_kernels.nn.linear import module as module_file
from collavo_kernels.testing import assert_within_budget

B, S, K, N, T = 2, 6, 64, 48, 3
ROWS = torch.tensor([[-1, 0, 1, 1, -1, -1], [2, 2, -1, 0, 1, -1]], dtype=torch.int32)
ADAPTED = (ROWS >= 0).to(torch.uint8) * 2 + 1  # the second adapter on image tokens alone


class Scaled(nn.Linear):
    """Another package's linear layer: a forward of its own, which needs its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class Packed(nn.Module):
    """Another package's quantised layer, as of GPTQ or AWQ: all that it has are buffers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = K, N
        linear = nn.Linear(K, N, bias=bias)
        self.register_buffer("qweight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach() if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qweight, self.bias)


def plain(bias: bool) -> nn.Module:
    return nn.Linear(K, N, bias=bias)


def scaled(bias: bool) -> nn.Module:
    return Scaled(K, N)


def dual(quantized: bool) -> Callable[[bool], nn.Module]:
    def make(bias: bool) -> nn.Module:
        layer = DualQLoRALinear(K, N, bias, rank=4, alpha=8, quantized=quantized)
        for name in layer.adapter_names:
            layer.lora_B[name].weight.data.normal_(0, 0.2)
        return layer

    return make


def four_bit(bias: bool) -> nn.Module:
    linear = nn.Linear(K, N, bias=bias)
    layer = bitsandbytes.nn.LinearNF4(K, N, bias=bias)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def with_peft(bias: bool, **options: Any) -> nn.Module:
    model = nn.ModuleDict({"q_proj": nn.Linear(K, N, bias=bias)})
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
    wrapped = peft.inject_adapter_in_model(config, model)
    return wrapped["q_proj"]


KINDS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": plain,
    "own forward": scaled,
    "dense dual": dual(quantized=False),
    "nf4 dual": dual(quantized=True),
    "bitsandbytes": four_bit,
    "peft": with_peft,
    "peft, biases of its own": partial(with_peft, lora_bias=True),
    "buffers": Packed,
}


def matrix(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of what a layer computes, by asking it, in float64."""
    bias = layer.bias
    with torch.no_grad():
        eye = torch.eye(K, dtype=torch.float64)
        twin = copy.deepcopy(layer)
        if isinstance(twin, DualQLoRALinear):
            weight = twin.merge(torch.float64).merged_weight
        elif isinstance(twin, bitsandbytes.nn.Linear4bit):
            state = twin.weight.quant_state
            weight = bitsandbytes.functional.dequantize_4bit(twin.weight.data, state)
        else:
            twin = twin.double()
            zero = twin(torch.zeros_like(eye))
            weight, bias = (twin(eye) - zero).mT, zero[0]
    return weight.double(), None if bias is None else bias.detach().double()


def dense(weight: Tensor, bias: Tensor | None, hidden: Tensor, table: Tensor) -> Tensor:
    rows = torch.where((ROWS >= 0)[..., None], table[ROWS.clamp_min(0).long()], 0)
    return F.linear(hidden + rows, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_and_rows_as_in_the_dense_form(kind: str, bias: bool, dtype: Any) -> None:
    """Forward, and the gradients of hidden states and table."""
    layer = KINDS[kind](bias).to(dtype).train()
    weight, offset = matrix(layer)
    add_crayon_to_linears(nn.ModuleDict({"qkv_proj": layer}))
    given = [torch.randn(B, S, K), torch.randn(T, K), torch.randn(B, S, N)]

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        hidden, table, pull = (x.to(dtype) for x in given)
        hidden, table = hidden.requires_grad_(), table.requires_grad_()
        if ours:
            with bound_crayon(CrayonInputs(table, ROWS)):
                out = layer(hidden)
        else:
            b = None if offset is None else offset.to(dtype)
            out = dense(weight.to(dtype), b, hidden, table)
        return [out.detach(), *torch.autograd.grad(out, (hidden, table), pull)]

    # In 16 bits the inputs of the exact one are the rounded ones.
    given = [x.to(dtype).float() for x in given]
    for name, found, low, exact in zip(
        ("output", "hidden", "table"),
        run(dtype, ours=True),
        run(dtype, ours=False),
        run(torch.float64, ours=False),
        strict=True,
    ):
        assert_within_budget(found, low, exact, name=name)


def test_a_fused_projection_of_q_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is gone through once, for tokens and rows together."""
    calls, run = [], module_file.qlora_linear
    monkeypatch.setattr(
        module_file, "qlora_linear", lambda x, *a, **k: calls.append(len(x)) or run(x, *a, **k)
    )
    attention = nn.ModuleDict({"qkv_proj": dual(quantized=True)(False)})
    layer = attention["qkv_proj"]
    weight, _ = matrix(layer)
    assert add_crayon_to_linears(attention) == [layer]
    hidden, table = torch.randn(B, S, K), torch.randn(T, K)
    with bound_crayon(CrayonInputs(table, ROWS)):
        found = layer(hidden)
    assert calls == [B * S + T]
    low = dense(weight.float(), None, hidden, table)
    assert_within_budget(found, low, dense(weight, None, hidden.double(), table.double()))


def test_masked_adapters_act_on_tokens_and_their_rows_alone() -> None:
    layer = dual(quantized=False)(True)
    both, _ = matrix(layer)
    a, b, scaling = layer.adapter("vl")
    first = both - scaling * b.double() @ a.double()
    add_crayon_to_linears(nn.ModuleDict({"qkv_proj": layer}))
    hidden, table = torch.randn(B, S, K), torch.randn(T, K)
    crayon = CrayonInputs(table, ROWS, ADAPTED, torch.full((T,), 3, dtype=torch.uint8))
    with bound_crayon(crayon):
        found = layer(hidden)
    with bound_crayon(CrayonInputs(None, None, ADAPTED)):  # a decode step
        decoded = layer(hidden)

    def expected(dtype: torch.dtype, table: Tensor) -> Tensor:
        outs = (
            dense(w.to(dtype), layer.bias.detach().to(dtype), hidden.to(dtype), table.to(dtype))
            for w in (first, both)
        )
        return torch.where((ROWS >= 0)[..., None], *reversed(list(outs)))

    for own, at in ((found, table), (decoded, 0 * table)):
        assert_within_budget(own.detach(), expected(torch.float32, at), expected(torch.float64, at))


def test_a_bound_table_joins_the_output() -> None:
    """Projection mode: rows of a branch, on layers that hand no crayon through their weight."""
    layers = [plain(True), dual(quantized=True)(True), four_bit(True)]
    for layer in layers:
        layer.__class__ = with_mixin(BoundLinearMixin, type(layer))
    hidden, table = torch.randn(B, S, K), torch.randn(T, N)
    for layer in layers:
        alone = layer(hidden)
        crayon = CrayonInputs(torch.randn(T, K), ROWS)
        with bound_crayon(crayon, {layer: table}):
            found = layer(hidden)
        with bound_crayon(crayon):
            assert torch.equal(layer(hidden), alone)
        rows = torch.where((ROWS >= 0)[..., None], table[ROWS.clamp_min(0).long()], 0)
        torch.testing.assert_close(found, alone + rows)


def test_nothing_changes_without_a_crayon_and_after_removal() -> None:
    layers = [make(bias) for make in KINDS.values() for bias in (False, True)]
    kinds = [type(layer) for layer in layers]
    hidden = torch.randn(B, S, K)
    before = [
        (layer(hidden), {k: v.clone() for k, v in layer.state_dict().items()}) for layer in layers
    ]
    added = [add_crayon_to_linears(nn.ModuleDict({"qkv_proj": layer}))[0] for layer in layers]
    for layer, (out, state) in zip(added, before, strict=True):
        assert torch.equal(layer(hidden), out)
        assert list(layer.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    remove_crayon_from_linears(added)
    assert [type(layer) for layer in layers] == kinds


def test_layers_pickle_and_copy() -> None:
    layer = add_crayon_to_linears(nn.ModuleDict({"qkv_proj": plain(True)}))[0]
    crayon = CrayonInputs(torch.randn(T, K), ROWS)
    hidden = torch.randn(B, S, K)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    twins = [
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.load(saved, weights_only=False),
    ]
    with bound_crayon(crayon):
        expected = layer(hidden)
        for twin in twins:
            assert type(twin) is type(layer)
            assert torch.equal(twin(hidden), expected)


def test_hooks_see_the_tokens_alone() -> None:
    layer, seen = plain(True), []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    add_crayon_to_linears(nn.ModuleDict({"qkv_proj": layer}))
    with bound_crayon(CrayonInputs(torch.randn(T, K), ROWS)):
        layer(torch.randn(B, S, K))
    assert seen == [((B, S, K), (B, S, N))]


def test_two_threads_with_crayons_of_their_own() -> None:
    """A bias that is left out for the rows must not be missing in another thread's forward."""
    layer = add_crayon_to_linears(nn.ModuleDict({"qkv_proj": scaled(True)}))[0]
    hidden, tables = torch.randn(B, S, K), [torch.randn(T, K), torch.randn(T, K)]
    crayons = [CrayonInputs(table, ROWS) for table in tables] + [None]
    results: list[list[Tensor]] = [[], [], []]

    def run(i: int) -> None:
        for _ in range(50):
            with torch.no_grad(), bound_crayon(crayons[i]):
                results[i].append(layer(hidden))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, crayon in zip(results, crayons, strict=True):
        with torch.no_grad(), bound_crayon(crayon):
            expected = layer(hidden)
        assert len(own) == 50 and all(torch.equal(out, expected) for out in own)


def test_what_does_not_fit_is_refused_by_name() -> None:
    layer = plain(False)
    refused: list[tuple[str, dict[str, Any], Any]] = [
        ("expected q_proj, k_proj, v_proj .*got a ModuleDict with c_attn", {"c_attn": layer}, None),
        # Its keys would be without the crayon.
        ("expected q_proj, k_proj, v_proj .*with q_proj, kv_b", {"q_proj": layer, "kv_b": 0}, None),
        ("expected layers q, kv, got", {"q": layer, "k": layer}, ("q", "kv")),
        (r"attention\.k: expected a linear layer", {"q": layer, "k": nn.Identity()}, ("q", "k")),
    ]
    for match, parts, names in refused:
        attention = nn.ModuleDict({name: part or plain(False) for name, part in parts.items()})
        with pytest.raises(ValueError, match=match):
            add_crayon_to_linears(attention, names)
    assert type(layer) is nn.Linear
    attention = nn.ModuleDict({"q": layer})
    (added,) = add_crayon_to_linears(attention, ["q"])
    with pytest.raises(ValueError, match=r"attention\.q: .* carries the crayon already"):
        add_crayon_to_linears(attention, ["q"])
    table, hidden = torch.randn(T, K), torch.randn(B, S, K)
    for match, crayon, args in (
        (r"crayon\.row_index: expected a row", CrayonInputs(table), (hidden,)),
        (r"crayon\.row_index: expected \[2, 1\]", CrayonInputs(table, ROWS), (hidden[:, :1],)),
        (r"crayon\.adapter_mask: .*none for", CrayonInputs(None, None, ADAPTED[:1]), (hidden,)),
        (r"crayon\.table: expected \[T, 64\]", CrayonInputs(table[:, 1:], ROWS), (hidden,)),
        (r"row_index: expected entries from -1 to 1", CrayonInputs(table[:2], ROWS), (hidden,)),
        ("expected its input alone", CrayonInputs(table, ROWS), (hidden, None)),
    ):
        with pytest.raises(ValueError, match=match), bound_crayon(crayon):
            added(*args)
    with pytest.raises(ValueError, match="expected layers that carry the crayon"):
        remove_crayon_from_linears([added, nn.Linear(2, 2)])
    assert isinstance(added, CrayonLinearMixin)
