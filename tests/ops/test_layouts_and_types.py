"""What is no dense tensor, no list or no number is named; PyTorch's own words would be obscure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import collavo_kernels as ck
from collavo_kernels import nn as modules

WEIGHT = ck.quantize_nf4(torch.randn(32, 64))
ADAPTER = ck.LoRAAdapter(torch.randn(4, 64), torch.randn(32, 4))
IDS = torch.tensor([1], dtype=torch.int32)
HEADS, ANGLES = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 8)
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "qlora_linear": (
        ck.qlora_linear,
        {
            "x": torch.randn(2, 5, 64),
            "weight": torch.randn(32, 64),
            "adapters": [ADAPTER],
            "adapter_mask": torch.ones(2, 5, dtype=torch.uint8),
            "row_table": torch.randn(3, 32),
            "row_index": torch.zeros(2, 5, dtype=torch.int32),
            "bias": torch.randn(32),
        },
    ),
    "crayon_attention": (
        ck.crayon_attention,
        {
            "q": HEADS,
            "k": HEADS,
            "v": HEADS,
            "cos": ANGLES,
            "sin": ANGLES,
            "crayon_q": torch.randn(3, 2, 8),
            "crayon_k": torch.randn(3, 2, 8),
            "crayon_v": torch.randn(3, 2, 8),
            "row_index": torch.zeros(2, 5, dtype=torch.int32),
            "key_range": torch.tensor([[0, 5], [0, 5]], dtype=torch.int32),
        },
    ),
    "panoptic_lookup": (
        ck.panoptic_lookup,
        {
            "segment_maps": torch.ones(1, 8, 8, dtype=torch.int32),
            "segment_ids": [IDS],
            "segment_classes": [IDS],
            "grid": (2, 2),
        },
    ),
    "quantize_nf4": (ck.quantize_nf4, {"weight": torch.randn(32, 64), "block_size": 64}),
    "decode_colours": (ck.decode_colours, {"colours": torch.zeros(2, 4, 3, dtype=torch.uint8)}),
    "NF4Weight": (
        ck.NF4Weight,
        {"packed": WEIGHT.packed, "scales": WEIGHT.scales, "shape": (32, 64), "block_size": 64},
    ),
}
TENSORS = [
    (name, argument)
    for name, (_, arguments) in FUNCTIONS.items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor) and name != "NF4Weight"
]


def nested(dense: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.nested.nested_tensor(list(dense), **options)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nested": nested,
    "jagged": lambda dense: nested(dense, layout=torch.jagged),
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_another_layout_is_refused_by_name(name: str, argument: str, layout: str) -> None:
    function, arguments = FUNCTIONS[name]
    function(**arguments)
    try:
        value = LAYOUTS[layout](arguments[argument])
    except (RuntimeError, IndexError):
        return  # no such tensor of this shape or dtype
    kind = "a nested one" if layout in ("nested", "jagged") else f"one of layout {layout}"
    with pytest.raises(TypeError, match=rf"^{argument}.*: expected a dense tensor, got {kind}"):
        function(**{**arguments, argument: value})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_are_factors_and_lists(layout: str) -> None:
    function, arguments = FUNCTIONS["qlora_linear"]
    a = LAYOUTS[layout](ADAPTER.a)
    with pytest.raises(TypeError, match=r"^adapters\[0\]\.a: expected a dense tensor"):
        function(**{**arguments, "adapters": [ADAPTER._replace(a=a)]})
    if layout in ("nested", "sparse_coo"):
        one = nested(IDS[None]) if layout == "nested" else IDS.to_sparse()
        function, arguments = FUNCTIONS["panoptic_lookup"]
        with pytest.raises(TypeError, match=r"^segment_ids\[0\]: expected a dense tensor"):
            function(**{**arguments, "segment_ids": [one]})


ODD: tuple[Any, ...] = (
    "text", 2.5, object(), {}, lambda: 0, torch.zeros(1), ADAPTER, WEIGHT, [None], "/tmp",
)  # fmt: skip
# Options that PyTorch's schema names with type and argument.
SCHEMA = ("reduce", "causal", "int8_activations")


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, arguments) in FUNCTIONS.items() for argument in arguments],
)
def test_another_type_is_named(name: str, argument: str) -> None:
    function, arguments = FUNCTIONS[name]
    for odd in ODD:
        if isinstance(odd, type(arguments[argument])) or (odd is WEIGHT and argument == "weight"):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, argument: odd})
        message = str(caught.value)
        assert message.startswith(argument) and "expected" in message, (type(odd), message)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (modules.CrayonPrompt, {"num_classes": 2.5}, "num_classes: expected an integer, got float"),
        (modules.CrayonPrompt, {"hidden_size": "8"}, "hidden_size: expected an integer, got str"),
        (modules.DualQLoRALinear, {"rank": None}, "rank: expected an integer, got NoneType"),
        (modules.DualQLoRALinear, {"alpha": "64"}, "alpha: expected a number, got str"),
        (modules.DualQLoRALinear, {"dropout": None}, "dropout: expected a number, got NoneType"),
        (modules.DualQLoRALinear, {"adapters": 3}, "adapters: expected a tuple of distinct names"),
        (modules.DualQLoRALinear, {"in_features": "a"}, "in_features: expected an integer"),
    ],
)
def test_options_of_modules_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    sizes = {"in_features": 64, "out_features": 32} if make is modules.DualQLoRALinear else {}
    with pytest.raises((TypeError, ValueError), match=message):
        make(**{**sizes, **options})


def test_modules_name_what_they_are_called_with() -> None:
    with pytest.raises(TypeError, match="crayon: expected a CrayonMap, got float32"):
        modules.CrayonPrompt(3, 2, 8, 16)(torch.zeros(2))
    with pytest.raises(TypeError, match="config: expected a configuration, got Linear"):
        modules.CrayonAttention(torch.nn.Linear(2, 2), 0)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        modules.load_peft_adapter("folder", torch.nn.Linear(2, 2), "image")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"maps\[1\]: expected a CrayonMap, got NoneType"):
        crayon = FUNCTIONS["panoptic_lookup"][0](**FUNCTIONS["panoptic_lookup"][1])
        ck.CrayonMap.cat([crayon, None])  # type: ignore[list-item]
