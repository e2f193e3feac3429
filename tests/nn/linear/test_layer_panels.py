"""A layer's 4-bit codes in panels: when they go there, what brings them back, what they take."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels import NF4Weight
from collavo_kernels._native import native
from collavo_kernels.nn import DualQLoRALinear
from collavo_kernels.nn.linear import frozen
from collavo_kernels.testing import relative_error

needs_kernels = pytest.mark.skipif(native() is None, reason="needs the compiled CPU kernels")
K, N = 128, 40
X = (3, K)


def make_layer(k: int = K, n: int = N, **options: Any) -> DualQLoRALinear:
    """Make a layer whose last panel is short and whose adapters do something."""
    layer = DualQLoRALinear.from_linear(nn.Linear(k, n), **({"rank": 4, "alpha": 8.0} | options))
    for name in layer.adapter_names:
        nn.init.normal_(layer.adapter(name).b, std=0.1)
    return layer


def in_panels(layer: DualQLoRALinear) -> bool:
    base = layer.base()
    return isinstance(base, NF4Weight) and base.in_panels


def entries(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype and torch.equal(value, second[key]), key


@needs_kernels
def test_the_first_forward_packs_and_nothing_else_changes() -> None:
    layer = make_layer()
    x, state, old = torch.randn(X), entries(layer), layer.weight
    expected = torch.nn.functional.linear(x, layer.merge().merged_weight, layer.bias)  # type: ignore[arg-type]
    layer(x)
    assert not in_panels(layer), "a merged layer does not use its codes"
    out = layer.unmerge()(x)
    assert in_panels(layer) and tuple(layer.weight.shape) == (3, 2, 576)
    assert relative_error(out, expected) < 1e-5
    assert layer.weight is not old and torch.equal(old, state["weight"]), "others may hold it"
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    kept = layer.weight
    assert torch.equal(layer(x), out) and layer.weight is kept
    assert_equal_states(entries(layer), state)
    assert in_panels(layer), "saving does not change the order"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
def test_pack_and_unpack_are_inverse(double_quant: bool, block_size: int) -> None:
    layer = make_layer(double_quant=double_quant, block_size=block_size)
    x, state, rows = torch.randn(X), entries(layer), layer.weight.clone()
    assert layer.unpack() is layer and torch.equal(layer.weight, rows)
    assert layer.pack() is layer and in_panels(layer)
    packed, kept = layer(x), layer.weight
    assert layer.pack().weight is kept
    assert_equal_states(entries(layer), state)
    assert layer.unpack() is layer and torch.equal(layer.weight, rows)
    assert_equal_states(entries(layer), state)
    base = layer.base()
    assert isinstance(base, NF4Weight)
    expected = x @ base.dequantize().T + layer.bias  # type: ignore[operator]
    for name in layer.adapter_names:
        a, b, scaling = layer.adapter(name)
        expected = expected + scaling * (x @ a.T) @ b.T
    assert relative_error(packed, expected) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_layer(quantized=False), "weight: cannot lie in panels: it is dense"),
        (lambda: make_layer(k=96), "weight: cannot lie in panels: K = 96 in blocks of 64"),
        (
            lambda: make_layer(block_size=32),
            "weight: cannot lie in panels: K = 128 in blocks of 32",
        ),
        (lambda: make_layer().to("meta"), "weight: cannot lie in panels: it is on meta"),
    ],
)
def test_what_cannot_be_packed_says_so_and_works(
    make: Callable[[], DualQLoRALinear], message: str
) -> None:
    layer = make()
    weight = layer.weight
    with pytest.raises(ValueError, match=message):
        layer.pack()
    layer(torch.randn(2, layer.in_features, device=weight.device))
    assert layer.weight is weight and layer.unpack().weight is weight


def change(layer: DualQLoRALinear) -> None:
    """Alter every byte and factor, so that a load has something to bring back."""
    base = DualQLoRALinear.from_linear(nn.Linear(K, N)).base()
    layer._set_weight(base)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.add_(1.0)


@pytest.mark.parametrize("packed_source", [False, True])
@pytest.mark.parametrize("packed_target", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_travel(
    tmp_path: Path, packed_source: bool, packed_target: bool, assign: bool
) -> None:
    layer, x = make_layer(), torch.randn(X)
    state = entries(layer)
    if packed_source:
        layer.pack()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    assert_equal_states({key: loaded[key] for key in state}, state)
    target = make_layer(double_quant=False)
    change(target)
    if packed_target:
        target.pack()
    target.load_state_dict(loaded, assign=assign)
    assert not in_panels(target)
    assert_equal_states(entries(target), state)
    assert torch.equal(target.pack()(x), layer.pack()(x))
    assert_equal_states(entries(target), state)


def test_a_damaged_state_leaves_a_packed_layer_as_it_was() -> None:
    layer = make_layer().pack()
    state, weight = entries(layer), layer.weight
    with pytest.raises(RuntimeError, match=r"weight: expected 2560 bytes"):
        layer.load_state_dict({**state, "weight": state["weight"][1:]})
    assert layer.weight is weight
    adapters = {key: value for key, value in state.items() if "lora" in key}
    layer.load_state_dict(adapters, strict=False)
    assert layer.weight is weight, "adapters alone are no reason to pack again"


COPIES: dict[str, Callable[[DualQLoRALinear], DualQLoRALinear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _through_file(layer),
    "half and back": lambda layer: copy.deepcopy(layer).bfloat16().float(),
    "to the CPU": lambda layer: copy.deepcopy(layer).to("cpu"),
    "share_memory": lambda layer: copy.deepcopy(layer).share_memory(),
}


def _through_file(layer: DualQLoRALinear) -> DualQLoRALinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: DualQLoRALinear = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(COPIES))
def test_copies_and_moves_keep_every_byte(name: str, packed: bool) -> None:
    layer, x = make_layer(), torch.randn(X)
    if packed:
        layer.pack()
    state, weight = entries(layer), layer.weight
    made = COPIES[name](layer)
    assert layer.weight is weight and made.weight is not weight
    bytes_of = {k: v for k, v in state.items() if v.dtype == torch.uint8}
    assert_equal_states({k: made.state_dict()[k] for k in bytes_of}, bytes_of)
    assert in_panels(made) == (packed and name == "deepcopy")
    assert made.weight.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    if "half" not in name:
        assert_equal_states(entries(made), state)
        assert torch.equal(made.pack()(x), layer.pack()(x))


def test_a_pickle_has_no_bytes_from_around_the_panels() -> None:
    """Panels start on a huge page inside a larger allocation, which no file may show."""
    layer = make_layer(k=2048, n=2048, adapters=()).pack()
    weight = layer.weight
    room = weight.untyped_storage().nbytes() - weight.numel()
    assert room > 0
    codes = 2048 * 2048 // 2
    assert len(pickle.dumps(layer)) < codes + layer.weight_scales.numel() + (1 << 16)  # type: ignore[union-attr]


def test_a_flag_on_the_parameter_stays() -> None:
    """transformers marks what a checkpoint brought, and draws the rest anew."""
    layer = make_layer()
    layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    assert layer.pack().weight._is_hf_initialized  # type: ignore[attr-defined]
    assert layer.unpack().weight._is_hf_initialized  # type: ignore[attr-defined]


@needs_kernels
def test_panels_made_under_inference_mode_serve_training() -> None:
    layer, x = make_layer(), torch.randn(X, requires_grad=True)
    with torch.inference_mode():
        layer(x.detach())
    assert in_panels(layer) and not layer.weight.is_inference()
    layer(x).square().sum().backward()
    assert x.grad is not None and x.grad.any()


@needs_kernels
def test_panels_made_under_another_default_device_are_on_the_cpu() -> None:
    layer, x = make_layer(), torch.randn(X)
    state, expected = entries(layer), copy.deepcopy(layer)(x)
    with torch.device("meta"):
        layer(x)
    assert in_panels(layer) and layer.weight.device.type == "cpu"
    assert torch.equal(layer(x), expected)
    assert_equal_states(entries(layer), state)


@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_other_order(packed: bool) -> None:
    layer, x = make_layer(), torch.randn(5, K, requires_grad=True)
    other = copy.deepcopy(layer)
    if packed:
        layer.pack()
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    base = other.base()
    assert isinstance(base, NF4Weight) and not base.in_panels
    expected = y @ base.dequantize().T + other.bias  # type: ignore[operator]
    for name in other.adapter_names:
        a, b, scaling = other.adapter(name)
        expected = expected + scaling * (y @ a.T) @ b.T
    expected.square().sum().backward()
    assert y.grad is not None and x.grad is not None and relative_error(x.grad, y.grad) < 1e-5
    for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None and relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_either_order(packed: bool) -> None:
    layer, x = make_layer(), torch.randn(X)
    if packed:
        layer.pack()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert in_panels(layer) == packed, "a trace takes the order that is there"
    torch.testing.assert_close(out, layer.pack()(x), rtol=1e-5, atol=1e-5)
    # The order changed under a compiled layer: it compiles again.
    torch.testing.assert_close(compiled(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch 2.5 exports no module with a parameter of bytes"
)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_exports_in_either_order(packed: bool, strict: bool) -> None:
    layer, x = make_layer(), torch.randn(X)
    if packed:
        layer.pack()
    program = torch.export.export(layer, (x,), strict=strict)
    assert in_panels(layer) == packed
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def _functional(layer: DualQLoRALinear, x: Tensor) -> None:
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    torch.func.functional_call(layer, weights, (x,))


def _transformed(layer: DualQLoRALinear, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.func's derivatives are not supported"):
        torch.func.grad(lambda x: layer(x).sum())(x)


def _traced(layer: DualQLoRALinear, x: Tensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(layer)(x)


def _faked(layer: DualQLoRALinear, x: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, N)


def _counted(layer: DualQLoRALinear, x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        layer(x)


def _initialised(layer: DualQLoRALinear, x: Tensor) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        layer(x)
    finally:
        torch.distributed.destroy_process_group()


def _shared(layer: DualQLoRALinear, x: Tensor) -> None:
    layer.share_memory()(x)


@pytest.mark.parametrize(
    "watch", [_functional, _transformed, _traced, _faked, _counted, _initialised, _shared]
)
def test_who_watches_or_manages_the_parameters_finds_them_as_they_were(
    watch: Callable[[DualQLoRALinear, Tensor], None],
) -> None:
    layer, x = make_layer(), torch.randn(X)
    weight, state = layer.weight, entries(layer)
    watch(layer, x)
    assert layer.weight is weight or watch is _shared
    assert not in_panels(layer)
    assert_equal_states(entries(layer), state)
    assert layer.pack() is layer and in_panels(layer), "an explicit call is the user's decision"


def run_together(calls: list[Callable[[], Any]]) -> None:
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> None:
        start.wait()
        call()

    threads = [threading.Thread(target=begin, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not frozen._REORDERING.locked()


@needs_kernels
def test_concurrent_first_calls_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, made = make_layer(), torch.randn(X), []
    convert = NF4Weight.to_panels

    def slowly(weight: NF4Weight) -> NF4Weight:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return convert(weight)

    monkeypatch.setattr(NF4Weight, "to_panels", slowly)
    results: list[Tensor] = []
    run_together([lambda: results.append(layer(x))] * 4)
    assert len(made) == 1 and len(results) == 4
    assert all(torch.equal(out, results[0]) for out in results)


@needs_kernels
def test_calls_beside_a_change_of_order_see_whole_bytes() -> None:
    layer, x = make_layer(k=512, n=512), torch.randn(2, 512)
    expected, results = copy.deepcopy(layer)(x), []

    def call() -> None:
        results.extend(layer(x) for _ in range(20))

    def change_order() -> None:
        for _ in range(20):
            layer.unpack().pack()

    run_together([call, call, change_order])
    assert len(results) == 40
    for out in results:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def bytes_held(module: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in module.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@needs_kernels
def test_the_codes_are_held_once() -> None:
    layer = make_layer(k=1024, n=1024, adapters=())
    rows = weakref.ref(layer.weight)
    storage = weakref.ref(layer.weight.untyped_storage())
    layer.bias = None
    assert bytes_held(layer) / 2**20 < 0.5 + 0.02
    with torch.no_grad():
        layer(torch.randn(2, 1024))
    gc.collect()
    assert in_panels(layer) and rows() is None and storage() is None
    assert bytes_held(layer) / 2**20 < 0.5625 + 0.02
    packed = weakref.ref(layer.weight)
    layer.to(torch.bfloat16)
    gc.collect()
    assert packed() is None and bytes_held(layer) / 2**20 < 0.5 + 0.02


def allocations(make: Callable[[], Any], run: Callable[[Any], Any]) -> list[int]:
    """Return the bytes held beyond what ``make`` left, after each allocation in ``run``.

    Both are recorded: memory from before a recording is not seen when it is freed.
    """
    from torch.profiler import ProfilerActivity, profile

    mark = 1_234_567
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        made = make()
        torch.empty(mark, dtype=torch.uint8)
        run(made)
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    steps = [event.nbytes() for event in events if event.name() == "[memory]"]
    steps = steps[steps.index(-mark) + 1 :]
    return list(itertools.accumulate(steps))


@needs_kernels
@pytest.mark.parametrize("explicit", [False, True])
def test_packing_layers_holds_one_layer_more(explicit: bool) -> None:
    size, x = 1024, torch.randn(1, 1024)
    panels_of_one, rows_of_one = size * size * 9 // 16, size * size // 2

    def make() -> list[DualQLoRALinear]:
        return [make_layer(k=size, n=size, adapters=(), bias=False) for _ in range(3)]

    def run(layers: list[DualQLoRALinear]) -> None:
        with torch.no_grad():
            for layer in layers:
                layer.pack() if explicit else layer(x)
        assert all(in_panels(layer) for layer in layers)

    held = allocations(make, run)
    # Beyond what panels take more than rows: the panels of the layer at hand, and while they are
    # filled its codes once more, and its scales as they are made.
    grown, scales = 3 * (panels_of_one - rows_of_one), size * size // 16
    assert rows_of_one < max(held) < grown + panels_of_one + rows_of_one + 3 * scales
    assert grown <= held[-1] < grown + (1 << 16)
