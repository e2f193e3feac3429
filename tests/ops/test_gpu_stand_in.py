"""The stand-in for a GPU: real launch code, machine code for the GPU, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from collavo_kernels import _gpu, crayon_attention, panoptic_lookup
from collavo_kernels.info import operators
from collavo_kernels.ops.qlora_linear.triton import tiles as triton_launch
from collavo_kernels.testing.cases import crayon_attention as attention_cases
from collavo_kernels.testing.cases import qlora_linear as linear_cases
from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

CPU = torch.device("cpu")


class Strides(NamedTuple):
    outer: Any
    inner: Any


@triton.jit(do_not_specialize=["length"])
def together(x, strides, length):  # type: ignore[no-untyped-def]
    tl.store(x + strides.outer + strides.inner, length)


@triton.jit(do_not_specialize=["length"])
def apart(x, outer, inner, length):  # type: ignore[no-untyped-def]
    tl.store(x + outer + inner, length)


def look_up() -> None:
    maps = torch.ones(1, 4, 4, dtype=torch.int32)
    ids = [torch.ones(1, dtype=torch.int32)]
    panoptic_lookup(maps, ids, ids, grid=(2, 2), backend="triton")


def state() -> tuple[object, ...]:
    """All that the stand-in changes."""
    tables = tuple((op.backends, dict(op._by_name)) for op in operators().values())
    chosen = (_gpu.kind_of, _gpu.processors, triton_launch.kind_of, triton_launch.processors)
    return driver._active, knobs.compilation.listener, chosen, tables


def test_launches_and_machine_code_are_seen() -> None:
    with gpu_stand_in() as gpu:
        assert (_gpu.kind_of(CPU), _gpu.processors(CPU)) == ("hopper", 132)
        assert (triton_launch.kind_of(CPU), triton_launch.processors(CPU)) == ("hopper", 132)
        look_up()
    assert [each.kernel for each in gpu.launches] == ["lookup_cells", "finish_rows"]
    assert gpu.launches[0].grid == (4, 1, 1)
    assert [each.kernel for each in gpu.compilations] == ["lookup_cells", "finish_rows"]
    for each in gpu.compilations:
        assert ".target sm_90a" in each.files["ptx"].read_text()
        assert each.files["cubin"].read_bytes()[:4] == b"\x7fELF"
    with gpu_stand_in() as again:
        look_up()
    assert [each.cached for each in again.compilations] == [True, True]


def test_everything_is_as_before_also_after_an_error() -> None:
    """A kernel that was loaded on the stand-in must not pass for one that a GPU has loaded."""
    before = state()
    with pytest.raises(ZeroDivisionError), gpu_stand_in():
        assert state() != before
        look_up()
        raise ZeroDivisionError
    assert state() == before
    with pytest.raises(ValueError, match="runs on cuda, not on cpu"):
        look_up()


def test_another_gpu_can_be_meant() -> None:
    with gpu_stand_in(80, "ampere", 108) as gpu:
        look_up()
    assert ".target sm_80" in gpu.compilations[0].files["ptx"].read_text()


def test_the_interpreter_is_refused() -> None:
    """There would be nothing to compile; what is meant to fill a cache would fill none."""
    code = (
        "from collavo_kernels.testing.gpu_stand_in import gpu_stand_in\nwith gpu_stand_in(): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RuntimeError: gpu_stand_in: TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize("strides", [(64, 1), (1, 17), (32, 3), (0, 2**33)])
def test_a_tuple_is_specialised_as_its_elements_are(strides: tuple[int, int]) -> None:
    """The kernels take strides as tuples: what is 1 or a multiple of 16 must be known there too."""
    x = torch.zeros(64, dtype=torch.int64)
    with gpu_stand_in():
        found = [together[(1,)](x, Strides(*strides), 16), apart[(1,)](x, *strides, 16)]
    one, other = (list(facts(each.src, tuple(each.src.signature.values()))) for each in found)
    assert one == other
    assert one[3] == ("i32", [], None), "the length would compile anew"


def facts(source: Any, types: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Each argument's type, what is known of its alignment, and its value where that is known."""
    if isinstance(types, tuple):
        for i, each in enumerate(types):
            yield from facts(source, each, (*path, i))
    else:
        yield types, source.attrs.get(path) or [], source.constants.get(path)


def test_bundles_hold_no_tuples_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 forgets a 1 there once the bundle is handed on: rank 1 did not compile."""
    bundles: dict[str, list[tuple[Any, ...]]] = {}
    run = triton.JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        bundles.setdefault(self.__name__, []).extend(x for x in args if hasattr(x, "_fields"))
        return run(self, *args, **options)

    monkeypatch.setattr(triton.JITFunction, "run", noted)
    layer = next(each for each in linear_cases.CASES if each.name == "three_rows")
    assert 1 in layer.ranks
    attention = next(each for each in attention_cases.CASES if each.name == "padding_window")
    with gpu_stand_in():
        look_up()
        call = linear_cases.make_call(layer, torch.bfloat16)
        call.gradients(torch.zeros_like(call.run("triton")), "triton")
        inputs = attention.make(torch.bfloat16, gradients=True)
        options = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
        crayon_attention(*inputs[:3], **options, backend="triton").out.sum().backward()
    assert len(bundles) > 8 and bundles["linear_kernel"], "launches were not seen"
    wrong = {
        kernel: field
        for kernel, found in bundles.items()
        for bundle in found
        for field, value in zip(bundle._fields, bundle, strict=True)  # type: ignore[attr-defined]
        if isinstance(value, tuple) and any(isinstance(x, (int, float)) for x in value)
    }
    assert not wrong, f"fields that hold tuples of numbers: {wrong}"
