"""The layer: state dicts, merging, training switches, PEFT exchange, casts, sharding."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels import qlora_linear
from collavo_kernels.nn import DualQLoRALinear, load_peft_adapter, save_peft_adapter
from collavo_kernels.testing import relative_error


def make_layer(**options: Any) -> DualQLoRALinear:
    layer = DualQLoRALinear.from_linear(nn.Linear(64, 48), **({"rank": 4, "alpha": 8.0} | options))
    for name in layer.adapter_names:
        nn.init.normal_(layer.adapter(name).b, std=0.1)
    return layer


def test_a_new_adapter_changes_nothing_and_learns() -> None:
    linear = nn.Linear(64, 48)
    layer = DualQLoRALinear.from_linear(linear, rank=4)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), qlora_linear(x, layer.base(), bias=linear.bias))
    layer(x).square().sum().backward()
    for name in ("image", "vl"):
        a, b, scaling = layer.adapter(name)
        assert scaling == 16.0 and not b.any() and a.any()
        assert b.grad is not None and b.grad.any()


def test_only_adapters_and_bias_have_gradients() -> None:
    layer = make_layer()
    frozen = {n for n, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"weight", "weight_scales"}
    assert all(p.dtype == torch.uint8 for p in (layer.weight, layer.weight_scales))
    layer.set_trainable("vl")
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "bias",
        "lora_A.vl.weight",
        "lora_B.vl.weight",
    }
    layer.set_trainable(None)
    assert not any(p.requires_grad for n, p in layer.named_parameters() if "lora" in n)
    with pytest.raises(ValueError, match="adapter: expected one of image, vl, got 'text'"):
        layer.set_trainable("text")


def test_the_state_dict_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 48)
    theirs = bnb.nn.Linear4bit(64, 48, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    ours = DualQLoRALinear.from_linear(linear, adapters=())
    recorded, state = theirs.state_dict(), ours.state_dict()
    assert set(recorded) == set(state)
    assert all(torch.equal(recorded[key], state[key]) for key in recorded)
    taken = DualQLoRALinear.from_bitsandbytes(theirs, adapters=())
    assert all(torch.equal(taken.state_dict()[key], state[key]) for key in state)
    save_file(state, tmp_path / "layer.safetensors")
    fresh = DualQLoRALinear(64, 48, bias=True, adapters=(), double_quant=False)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), ours(x))


def test_meta_then_assign() -> None:
    layer = make_layer()
    shell = DualQLoRALinear(64, 48, bias=True, rank=4, alpha=8.0, device="meta")
    assert set(shell.state_dict()) == set(layer.state_dict())
    shell.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 3, 64)
    assert torch.equal(shell(x), layer(x))


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: without(s, "weight.absmax"), r"weight\.absmax: missing from the state dict"),
        (lambda s: without(s, "weight"), "weight: missing from the state dict"),
        (lambda s: s | {"weight": s["weight"][:-3]}, "weight: expected 1536 bytes"),
        (lambda s: s | {"weight": torch.randn(48, 64)}, "weight: expected 1536 bytes"),
        (lambda s: s | {"weight.more": s["weight"]}, r"Unexpected key.*weight\.more"),
        (lambda s: without(s, "lora_A.vl.weight"), r"Missing key.*lora_A\.vl\.weight"),
        (
            lambda s: s | {"lora_B.vl.weight": torch.zeros(48, 5)},
            r"size mismatch for .*weight",
        ),
        (lambda s: {k: v for k, v in s.items() if k[:6] != "weight"}, 'Missing key.*"weight"'),
        (lambda s: s | make_other().state_dict(), r"expected an NF4 matrix \[48, 64\], got"),
    ],
)
def test_damaged_state_dicts_are_named(damage: Any, message: str) -> None:
    layer = make_layer()
    before = {n: p.clone() for n, p in layer.named_parameters() if p.dtype == torch.uint8}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(damage(layer.state_dict()))
    assert all(torch.equal(getattr(layer, n), p) for n, p in before.items())


def make_other() -> DualQLoRALinear:
    return DualQLoRALinear(32, 48, bias=True, adapters=())


def test_casts_and_copies_leave_the_bytes_alone() -> None:
    layer = make_layer()
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.weight_scales, layer.weight_scales)
    x = torch.randn(4, 64)
    assert relative_error(other(x.bfloat16()), layer(x)) < 0.02
    # float32 adapters beside a bfloat16 activation, as PEFT trains them
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_merge_and_unmerge() -> None:
    layer = make_layer()
    x, state = torch.randn(5, 64), copy.deepcopy(layer.state_dict())
    before = layer(x)
    assert layer.merge().merged
    assert relative_error(layer(x), before) < 1e-5
    assert set(layer.state_dict()) == set(state)
    with pytest.raises(ValueError, match="adapter_mask: adapters are merged"):
        layer(x, adapter_mask=torch.ones(5, dtype=torch.uint8))
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_mask_and_rows_reach_the_operator() -> None:
    layer = make_layer()
    x, table = torch.randn(2, 3, 64), torch.randn(4, 48)
    mask = torch.tensor([[0, 1, 2], [3, 3, 0]], dtype=torch.uint8)
    index = torch.tensor([[-1, 0, 3], [2, 2, -1]], dtype=torch.int32)
    out = layer(x, adapter_mask=mask, row_table=table, row_index=index)
    expected = F.linear(x, layer.base().dequantize(), layer.bias)
    for i, name in enumerate(layer.adapter_names):
        a, b, scaling = layer.adapter(name)
        gate = ((mask >> i) & 1)[..., None]
        expected = expected + gate * scaling * F.linear(F.linear(x, a), b)
    expected = expected + torch.where((index >= 0)[..., None], table[index.clamp_min(0).long()], 0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_dropout_trains_with_masks_and_rests_in_eval() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(200, 64)
    mask = torch.zeros(200, dtype=torch.uint8)
    mask[100:] = 3
    layer.train()
    base = qlora_linear(x, layer.base(), bias=layer.bias)
    out = layer(x, adapter_mask=mask)
    assert torch.equal(out[:100], base[:100]) and not torch.equal(out, layer(x, adapter_mask=mask))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_dense_base_and_no_adapters() -> None:
    linear = nn.Linear(64, 48)
    layer = DualQLoRALinear.from_linear(linear, adapters=(), quantized=False)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight_scales is None
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_compiles() -> None:
    layer = make_layer()
    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"adapters": ("a", "a")}, "adapters: expected a tuple of distinct names"),
        ({"adapters": "image"}, "adapters: expected a tuple of distinct names"),
        ({"block_size": 60}, "block_size: expected one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualQLoRALinear(64, 48, **options)


class TwoLayers(nn.Module):
    """A model with the layer names that PEFT sees."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.q_proj, self.o_proj = make(64, 48), make(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(F.gelu(self.q_proj(x)))
        return out


@pytest.mark.parametrize("rslora", [False, True])
def test_exchange_with_peft(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    dense = TwoLayers(nn.Linear)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"o_proj": 8},
        alpha_pattern={"q_proj": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(dense), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TwoLayers(DualQLoRALinear)
    for name in ("q_proj", "o_proj"):
        linear = getattr(dense, name)
        setattr(ours, name, DualQLoRALinear.from_linear(linear, rank=2, quantized=False))
    assert load_peft_adapter(ours, tmp_path / "theirs", "vl") == ["o_proj", "q_proj"]
    x = torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    save_peft_adapter(ours, tmp_path / "ours", "vl")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is set; adapters with DoRA"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"r": 3}, "expected rank 3"),
    ],
)
def test_adapters_that_cannot_be_loaded(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = nn.ModuleDict({"q_proj": make_layer()})
    save_peft_adapter(model, tmp_path, "image")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path, "vl")


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    save_peft_adapter(nn.ModuleDict({"k_proj": make_layer()}), tmp_path, "image")
    with pytest.raises(ValueError, match=r"belong to no DualQLoRALinear.*k_proj"):
        load_peft_adapter(nn.ModuleDict({"q_proj": make_layer()}), tmp_path, "image")
    with pytest.raises(ValueError, match="slot: no layer of the model has an adapter 'text'"):
        save_peft_adapter(nn.ModuleDict({"q_proj": make_layer()}), tmp_path, "text")


def _shard(rank: int, port: int) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = nn.Sequential(make_layer(), nn.GELU(), DualQLoRALinear(48, 33, rank=3))
    sharded = copy.deepcopy(plain)
    DistributedDataParallel(copy.deepcopy(plain))(torch.randn(8, 64)).sum().backward()
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 12):
        # Its fully_shard makes every parameter require a gradient for a moment; bytes cannot.
        _leave()
    from torch.distributed.fsdp import fully_shard

    fully_shard(sharded[0])
    fully_shard(sharded)
    x = torch.randn(8, 64)
    plain(x).square().sum().backward()
    sharded(x).square().sum().backward()
    expected = plain[0].adapter("vl").a.grad
    assert torch.equal(sharded[0].adapter("vl").a.grad.full_tensor(), expected)
    state, whole = sharded.state_dict(), plain.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole.items() if v.dtype == torch.uint8)
    with torch.no_grad():
        sharded[0].weight_scales.to_local().zero_()
    sharded.load_state_dict(state)
    assert torch.equal(sharded(x), plain(x))
    assert plain[0].weight.dim() == 2, "beside torch.distributed nothing packs by itself"
    _shard_panels(plain, x)
    _shard_adapters(plain, sharded, x)
    _leave()


def _shard_panels(plain: nn.Module, x: Tensor) -> None:
    """Panels made before sharding are used and saved; no process has them all, so they stay."""
    from torch.distributed.fsdp import fully_shard

    packed = copy.deepcopy(plain)
    packed[0].pack()
    fully_shard(packed[0])
    fully_shard(packed)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    whole, state = plain.state_dict(), packed.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole.items() if v.dtype == torch.uint8)
    assert packed.float()[0].weight.dim() == 3
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"weight: cannot leave its panels: it is a DTensor"):
        packed.load_state_dict(state)


def _shard_adapters(plain: nn.Module, sharded: nn.Module, x: Tensor) -> None:
    """A folder has whole factors, whoever saves it, and a sharded model takes its shards of it."""
    with tempfile.TemporaryDirectory() as folder:
        save_peft_adapter(sharded, folder, "vl")
        for name in ("0", "2"):
            nn.init.zeros_(sharded.get_submodule(name).adapter("vl").b)
        load_peft_adapter(sharded, folder, "vl")
        assert torch.equal(sharded(x), plain(x))
        other = copy.deepcopy(plain)
        load_peft_adapter(other, folder, "vl")
        assert torch.equal(other(x), plain(x))
        other[0].set_adapter("vl", torch.ones(2, 64), torch.ones(48, 2), 1.0)
        save_peft_adapter(other, folder, "vl")
        with pytest.raises(ValueError, match="before the model is sharded"):
            load_peft_adapter(sharded, folder, "vl")


def _leave() -> None:
    """End a worker: gloo's threads can outlive the group, and a plain exit may then abort."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_two_processes_shard_and_replicate() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_shard, args=(port,), nprocs=2)
