"""What the sources of the Triton kernels promise each other, read without compiling them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "collavo_kernels"
SOURCES = sorted((*PACKAGE.glob("ops/*/triton/*.py"), PACKAGE / "_rows_triton.py"))
MOST_PARAMETERS = 25  # a tuple counts as one


def jit_functions(source: str) -> Iterator[ast.FunctionDef]:
    """Yield what ``@triton.jit`` or ``@triton.jit(...)`` stands above."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            above = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
            if any(ast.unparse(each) in ("triton.jit", "jit") for each in above):
                yield node


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    return [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def test_kernels_have_few_parameters() -> None:
    """A tensor comes with its strides and constants come together, so that a call can be read."""
    found = {
        f"{path.relative_to(PACKAGE)}: {function.name}": len(parameters(function))
        for path in SOURCES
        for function in jit_functions(path.read_text(encoding="utf-8"))
    }
    kernels = [name for name in found if name.endswith("_kernel")]
    assert len(kernels) > 8 and len(found) > 40, "the sources were not found"
    assert {name: n for name, n in found.items() if n > MOST_PARAMETERS} == {}


def test_what_is_not_specialised_is_a_parameter() -> None:
    """Triton takes any name there and says nothing: each new length would compile anew."""
    for path in SOURCES:
        for function in jit_functions(path.read_text(encoding="utf-8")):
            for decorator in function.decorator_list:
                for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
                    unknown = set(ast.literal_eval(keyword.value)) - set(parameters(function))
                    assert not unknown, f"{path}: {function.name}: {unknown}"


def test_constants_of_the_same_values_are_one_object() -> None:
    """A launch looks its kernel up by them, and machine code is found again by their text."""
    pytest.importorskip("triton", reason="triton is not installed")
    from collavo_kernels._triton import Constants, constants

    some = constants(D=64, CAUSAL=True, PRECISION="ieee")
    assert constants(D=64, CAUSAL=True, PRECISION="ieee") is some
    assert some == "D=64, CAUSAL=True, PRECISION=ieee"
    assert constants(D=64, CAUSAL=False, PRECISION="ieee") != some
    again = Constants((("D", 64), ("CAUSAL", True), ("PRECISION", "ieee")))
    assert again == some and hash(again) == hash(some)
