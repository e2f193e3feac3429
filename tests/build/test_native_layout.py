"""What Python hands to native code is what native code takes: every field, by name and place.

Structs that go as memory (the CUDA launchers', the image table) are compared with the C++ headers:
a compiler checks size, offset and kind of every field. Keyword arguments are checked by the native
functions themselves: here every argument of every function is left out once, misnamed once, and
given another type once, and the error must name it.
"""

from __future__ import annotations

import ctypes
import inspect
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import collavo_kernels as ck
from collavo_kernels import _native
from collavo_kernels.ops.panoptic_lookup.inputs import IMAGE
from collavo_kernels.ops.qlora_linear import cuda_arguments
from collavo_kernels.ops.qlora_linear.nf4 import panels

ROOT = Path(__file__).resolve().parents[2]
# A field's size, and what C++ must find true of its type.
KINDS = {
    ctypes.c_void_p: "std::is_pointer_v<{0}>",
    ctypes.c_bool: "std::is_same_v<{0}, bool>",
    ctypes.c_float: "std::is_same_v<{0}, float>",
    ctypes.c_int64: "std::is_same_v<{0}, int64_t>",
}
Field = tuple[str, int, int, str]


def structures() -> list[type[ctypes.Structure]]:
    return [
        each
        for _, each in inspect.getmembers(cuda_arguments, inspect.isclass)
        if issubclass(each, ctypes.Structure) and each is not cuda_arguments.Arguments
    ]


def fields_of(structure: type[ctypes.Structure]) -> Iterator[Field]:
    """A structure's name, offset, size and kind of every field."""
    for field in structure._fields_:
        name, kind = field[:2]
        where = getattr(structure, name)
        yield (
            name,
            where.offset,
            where.size,
            KINDS.get(kind, f"std::is_same_v<{{0}}, {kind.__name__}>"),
        )


def assertions(struct: str, size: int, fields: list[Field]) -> Iterator[str]:
    yield f'static_assert(sizeof({struct}) == {size}, "size of {struct}");'
    for name, offset, wide, kind in fields:
        member = f"decltype({struct}::{name})"
        for condition in (
            f"offsetof({struct}, {name}) == {offset}",
            f"sizeof({member}) == {wide}",
            kind.format(member),
        ):
            yield f'static_assert({condition}, "{struct}.{name}");'


def complaints(header: str, namespace: str, lines: list[str]) -> str:
    """What the compiler says of assertions about a header's structs; nothing if they hold."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    top = ["#include <cstddef>", "#include <type_traits>", f'#include "{header}"']
    source = "\n".join([*top, f"using namespace {namespace};", *lines])
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


def launcher_complaints(structure: type[ctypes.Structure], fields: list[Field]) -> str:
    lines = list(assertions(structure.__name__, ctypes.sizeof(structure), fields))
    return complaints("qlora_linear/cuda/arguments.h", "collavo::qlora_linear::cuda", lines)


@pytest.mark.parametrize("structure", structures(), ids=lambda each: each.__name__)
def test_launchers_structs_lie_as_in_the_header(structure: type[ctypes.Structure]) -> None:
    fields = list(fields_of(structure))
    assert launcher_complaints(structure, fields) == ""
    # And the comparison sees two neighbours that have changed places.
    swapped = [fields[1], fields[0], *fields[2:]]
    places = [
        (name, offset, size, kind)
        for (name, _, _, kind), (_, offset, size, _) in zip(swapped, fields, strict=True)
    ]
    assert f"{structure.__name__}.{fields[0][0]}" in launcher_complaints(structure, places)


def image_complaints(dtype: np.dtype[Any]) -> str:
    found = dtype.fields or {}
    fields = [
        (name, place[1], place[0].itemsize, "std::is_pointer_v<{0}>" if name == "map" else "true")
        for name, place in found.items()
    ]
    lines = list(assertions("Image", dtype.itemsize, fields))
    return complaints("panoptic_lookup/panoptic_lookup.h", "collavo::panoptic_lookup", lines)


def test_the_image_table_lies_as_in_the_header() -> None:
    assert image_complaints(IMAGE) == ""
    names = list(IMAGE.names or ())
    names[2], names[3] = names[3], names[2]
    assert "Image.height" in image_complaints(np.dtype([(name, np.int64) for name in names]))
    assert "size of Image" in image_complaints(np.dtype([(name, np.int64) for name in names[:-1]]))


def test_launchers_structs_name_what_is_wrong() -> None:
    fields = {"m": 1, "n": 2, "table_rows": 3, "dtype": 0}
    tensors = ("grad_out", "row_index", "errors", "grad_row_table")
    fields |= dict.fromkeys(tensors, torch.ones(2))
    assert cuda_arguments.SumRowsArguments(**fields).table_rows == 3
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        for wrong, message in (
            (rest, f"{name}: the field is missing"),
            ({**rest, name + "_": 1}, f"{name}: the field is missing"),
            ({**fields, name + "_": 1}, f"{name}_: expected one of .*{name}"),
            ({**fields, name: "12"}, f"{name}: "),
            ({**fields, name: 1.5}, f"{name}: "),
        ):
            with pytest.raises(TypeError, match=f"^SumRowsArguments: {message}"):
                cuda_arguments.SumRowsArguments(**wrong)


class Recorder:
    """The native module, with a note of every call's arguments."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def call(*positional: Any, **named: Any) -> Any:
            if named:
                self.calls.setdefault(name, named)
            return function(*positional, **named)

        return call if callable(function) else function


@pytest.fixture(scope="module")
def calls() -> dict[str, dict[str, Any]]:
    """Arguments of a call of every native function."""
    module = _native.native()
    if module is None:
        pytest.skip(f"no compiled module: {_native.native_reason()}")
    recorder = Recorder(module)
    before = _native._load_native
    _native._load_native = lambda: (recorder, None)  # type: ignore[assignment]
    try:
        call_everything()
    finally:
        _native._load_native = before
    return recorder.calls


def call_everything() -> None:
    ids = torch.tensor([3], dtype=torch.int32)
    ck.panoptic_lookup(torch.full((1, 4, 4), 3, dtype=torch.int32), [ids], [ids], grid=(2, 2))
    q, k, v, table = (torch.randn(1, 4, 2, 16, requires_grad=True) for _ in range(4))
    ranges = torch.tensor([[0, 4]], dtype=torch.int32)
    ck.crayon_attention(
        q, k, v, cos=torch.ones(1, 4, 16), sin=torch.zeros(1, 4, 16), crayon_q=table[0],
        crayon_k=table[0], crayon_v=table[0], row_index=ids[None] % 2 * torch.ones(1, 4).int(),
        key_range=ranges, backend="cpu",
    ).out.sum().backward()  # fmt: skip
    weight = ck.quantize_nf4(torch.randn(64, 64))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (2, 80):
            x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
            rows = torch.randn(2, 64, dtype=dtype, requires_grad=True)
            index = torch.zeros(tokens, dtype=torch.int32)
            factors = [
                torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((4, 64), (64, 4))
            ]
            ck.qlora_linear(
                x, weight, [ck.LoRAAdapter(*factors)], row_table=rows, row_index=index,
                backend="cpu",
            ).sum().backward()  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "_HUGE_PAGE", 1 << 12)
        ck.quantize_nf4(torch.randn(128, 64)).to_panels()


def leaves(named: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every argument, through dicts and lists of dicts."""
    for name, value in named.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif isinstance(value, list) and value:
            yield from leaves(value[0], (*path, name, 0))


def changed(
    named: dict[str, Any], path: tuple[Any, ...], change: Callable[[dict[str, Any], str], None]
) -> dict[str, Any]:
    """A copy of arguments, one of them changed."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copied(each) for name, each in value.items()}
        return [copied(each) for each in value] if isinstance(value, list) else value

    result = copied(named)
    at = result
    for step in path[:-1]:
        at = at[step]
    change(at, path[-1])
    return dict(result)


def drop(at: dict[str, Any], name: str) -> None:
    del at[name]


def misname(at: dict[str, Any], name: str) -> None:
    at[name + "_"] = at.pop(name)


def add(at: dict[str, Any], name: str) -> None:
    at[name + "_"] = at[name]


def replace(at: dict[str, Any], name: str) -> None:
    at[name] = SimpleNamespace()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(drop, r"{}: the argument is missing", id="missing"),
        pytest.param(misname, r"{}: the argument is missing", id="misnamed"),
        pytest.param(add, r"{}_: there is no such argument; expected ", id="unknown"),
        pytest.param(replace, r"{}: expected a.*, got types\.SimpleNamespace", id="another type"),
    ],
)
def test_a_wrong_argument_is_named(
    calls: dict[str, dict[str, Any]], change: Callable[[dict[str, Any], str], None], names: str
) -> None:
    module = _native.native()
    for function, named in calls.items():
        for path in leaves(named):
            full = ".".join(each for each in path if isinstance(each, str))
            with pytest.raises(TypeError, match=rf"^{function}: {names.format(full)}"):
                getattr(module, function)(**changed(named, path, change))


def test_every_function_was_called(calls: dict[str, dict[str, Any]]) -> None:
    """And none takes arguments by place, but for the code of an instruction set."""
    module: Any = _native.native()
    functions = {
        name for name, each in inspect.getmembers(module, callable) if "**" in (each.__doc__ or "")
    }
    assert len(functions) > 10
    pairs = {"qlora_linear_forward_many", "qlora_linear_grad_x_many"}
    unable = pairs if _native.best_isa() != "avx512" else set()
    missing = functions - set(calls) - unable
    assert not missing, f"call_everything() does not reach {sorted(missing)}"
    assert unable.isdisjoint(calls)
    others = {name for name, _ in inspect.getmembers(module, callable)} - functions
    by_place = {
        name
        for name in others
        if not name.startswith("_") and "()" not in getattr(module, name).__doc__
    }
    assert by_place == {"use_isa"}
