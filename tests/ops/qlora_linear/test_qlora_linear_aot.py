"""qlora_linear's Triton kernels, compiled for GPUs that are not there: no spills, memory fits.

Every configuration that a launch can choose is compiled. The look-up in PTX, which the interpreter
cannot run, is carried out here instruction by instruction.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels import _rows_triton
from collavo_kernels._triton import constants
from collavo_kernels.ops.qlora_linear import quantize_nf4
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4.format import NF4_CODE
from collavo_kernels.ops.qlora_linear.triton import launch, tiles
from collavo_kernels.ops.qlora_linear.triton.forward import Epilogue
from collavo_kernels.ops.qlora_linear.triton.weight import Weight, permutations
from collavo_kernels.testing.aot import TARGETS, ArgumentType, compile_ahead

KINDS = dict(zip(TARGETS, ("ampere", "hopper", "blackwell", "portable"), strict=True))
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
PRESENT = {"HAS_TABLE": True, "HAS_BIAS": True, "HIDDEN_SPLITS": 1}
MASKED = {"HAS_MASK": True}


def types(
    dtype: torch.dtype, *, nested: bool = True, hidden: str = "", rank: str = "i32"
) -> dict[str, ArgumentType]:
    """A type for every run-time argument of every kernel; ``hidden`` where it is not dtype's."""
    half = TYPES[dtype]
    hidden = hidden or half
    # Adapters that are wider than x are cast as they are loaded, which takes registers.
    factors, ranks = ("*fp32", "*fp32"), (rank, rank)
    absmax = "*u8" if nested else "*fp32"
    return {
        **dict.fromkeys(("x", "halves", "out", "grad", "upstream", "value"), half),
        **dict.fromkeys(("factors", "a"), factors),
        **dict.fromkeys(("row_index", "errors"), "*i32"),
        **dict.fromkeys(("m", "n", "k", "units", "steps", "splits", "columns"), "i32"),
        **dict.fromkeys(("place", "width", "rows", "stretch", "stretches", "count"), "i32"),
        "hidden": hidden,
        "mask": "*u8",
        **dict.fromkeys(("shares", "parts"), "*fp32"),
        "ranks": ranks,
        "scaling": ("fp32", "fp32"),
        "weight": Weight("*u8", absmax, "*fp32", "*fp32", "*fp32", half),
        "epilogue": Epilogue(hidden, factors, half, "*i32", half, "*i32", *ranks, "i32"),
    }


def compiles(
    kernel: Any,
    signature: dict[str, ArgumentType],
    target: str,
    values: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Compile for a target; fail where registers spill or shared memory does not suffice."""
    signature = {name: signature[name] for name in kernel.arg_names if name not in values}
    found = compile_ahead(kernel, signature, values, target, **options)
    facts = f"{kernel.__name__} {values} {options} {found}"
    assert found.spill_bytes == 0, facts
    assert found.shared_bytes <= found.shared_limit, facts
    # A kernel that wants more tensor memory than there is compiles to a trap and little else.
    assert found.registers > 24, facts


def known(*parts: dict[str, Any]) -> dict[str, Any]:
    """A kernel's constants as its argument."""
    return {"CONST": constants(**{name: value for part in parts for name, value in part.items()})}


def facts_of(dtype: torch.dtype, target: str, nested: bool, aligned: bool) -> dict[str, Any]:
    permute = KINDS[target] != "portable" and dtype != torch.float32
    return {"BLOCK_SIZE": 64, "NESTED": nested, "ALIGNED": aligned, "PERMUTE": permute}


def forward_choices(kind: str) -> list[tuple[torch.dtype, bool, tiles.Tiles]]:
    """Dtype, whether rows are whole chunks, and tiles of every forward on a kind of GPU."""
    half = torch.bfloat16
    return [
        *((half, True, each) for each in tiles.TILES[kind]),
        (half, False, tiles.UNALIGNED_TILES),
        (torch.float32, True, tiles.FLOAT32_TILES),
        (torch.float32, False, tiles.FLOAT32_TILES),
    ]


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("target", TARGETS)
def test_forward(target: str, nested: bool) -> None:
    for dtype, aligned, chosen in forward_choices(KINDS[target]):
        if not nested and (dtype == torch.float32 or not aligned):
            continue  # plain scales take fewer registers; the fast path is compiled all the same
        splits = {True} if tiles.must_split(chosen) else {False}
        splits |= {True} if tiles.may_split(chosen) else set()
        for split in splits:
            # The widest tile is chosen where the epilogue takes few registers.
            wide = chosen.tokens > 128
            signature = types(dtype, nested=nested, rank="i32:16" if wide else "i32")
            if split:
                signature["out"] = "*fp32"
            facts = facts_of(dtype, target, nested, aligned)
            added = PRESENT | {"HAS_TABLE": not wide, "SPLIT": split}
            values = known(facts, added, launch.LINEAR, chosen.blocks)
            compiles(launch.linear_kernel, signature, target, values, chosen.options)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_hidden_values_and_the_sum_of_shares(target: str, dtype: torch.dtype) -> None:
    # Shares of hidden values are float32.
    wide = types(dtype, hidden="*fp32")
    for tokens, signature in ((1, wide), (2048, types(dtype))):
        sizes = dict(zip("MRK", tiles.hidden_tiles(tokens, dtype), strict=True))
        blocks = {f"BLOCK_{name}": size for name, size in sizes.items()}
        signature["strides"] = (("i32", "i32"), ("i32", "i32"))
        values = known(blocks, launch.PREPARE, MASKED)
        compiles(launch.prepare_kernel, signature, target, values, launch.PREPARE_OPTIONS)
    values = known(PRESENT, launch.SUM, launch.sum_ranks(dtype), {"HIDDEN_SPLITS": 8, "SPLITS": 16})
    compiles(launch.sum_kernel, wide, target, values, launch.SUM_OPTIONS)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_of_x(target: str, nested: bool) -> None:
    half, wide = torch.bfloat16, torch.float32
    full = tiles.FLOAT32_GRADIENT_TILES
    for dtype, aligned, chosen in (
        (half, True, tiles.FEW_GRADIENT_TILES),
        (half, True, tiles.GRADIENT_TILES[KINDS[target]]),
        (half, False, tiles.UNALIGNED_GRADIENT_TILES),
        (wide, True, full),
        (wide, False, full),
    ):
        if not nested and (dtype == wide or not aligned):
            continue
        values = known(facts_of(dtype, target, nested, aligned), launch.LINEAR, chosen.blocks)
        signature = types(dtype, nested=nested)
        compiles(launch.grad_x_kernel, signature, target, values, chosen.options)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_of_factors_and_rows(target: str, dtype: torch.dtype) -> None:
    signature: dict[str, ArgumentType] = types(dtype) | {"ranks": "i32", "strides": ("i32", "i32")}
    values = known({"BIT": 1}, MASKED, launch.FACTOR)
    compiles(launch.factor_kernel, signature, target, values, launch.FACTOR_OPTIONS)
    tile, options = _rows_triton.TILE, _rows_triton.options_of(dtype)
    for stored in ("fp32", str(signature["grad"])[1:]):
        signature["out"] = f"*{stored}"
        compiles(_rows_triton.sum_rows_kernel, signature, target, tile, options)
        adding = _rows_triton.add_stretches_kernel
        some = {name: signature[name] for name in ("parts", "out", "count", "stretches")}
        block = {"BLOCK": _rows_triton.ADD_BLOCK}
        assert compile_ahead(adding, some, block, target, num_warps=4).spill_bytes == 0


@pytest.mark.parametrize("kind", tiles.TILES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, 65, 200, 1024, 4096])
def test_chosen_tiles_fill_the_gpu(tokens: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "kind_of", lambda device: kind)
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    weight = quantize_nf4(torch.zeros(4096, 64))
    x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    packed = (x, weight.packed, weight.scales, 4096, 64, True)
    inputs = QLoRAInputs(*packed, [], [], [], None, None, None, None)
    chosen = tiles.tiles_for(inputs)
    assert chosen in tiles.TILES[kind]
    if tokens <= 64:
        # One tile of tokens: the weight is read once.
        assert tokens <= chosen.tokens
    if not tiles.may_split(chosen):
        assert tiles.grid_of(chosen, tokens, 4096) >= 132
    narrow = tiles.tiles_for(inputs._replace(block_size=32))
    assert narrow == tiles.UNALIGNED_TILES


@pytest.mark.parametrize(
    ("tokens", "rank", "table", "wide"),
    [
        (1023, 64, False, 128),  # a tile of 256 would be a quarter empty at worst
        (1024, 64, False, 128),  # 128 programs of 256 tokens do not fill 132 multiprocessors
        (2048, 64, False, 256),
        (2048, 40, False, 128),  # what follows would spill its registers
        (2048, 64, True, 128),
    ],
)
def test_the_widest_tile_has_tokens_and_registers(
    tokens: int, rank: int, table: bool, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "kind_of", lambda device: "hopper")
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    b = [torch.zeros(4096, rank, dtype=x.dtype)]
    rows = torch.zeros(2, 4096, dtype=x.dtype) if table else None
    inputs = QLoRAInputs(x, x, x, 4096, 64, True, [], b, [0.5], None, rows, None, None)
    assert tiles.tiles_for(inputs).tokens == wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_the_look_up_gives_every_code(dtype: torch.dtype) -> None:
    program = permutations(dtype)
    codes = torch.tensor(NF4_CODE).to(dtype).view(torch.int16).tolist()
    bits = [code & 0xFFFF for code in codes]
    # Every byte once, neighbours that differ.
    for first in range(0, 256, 2):
        four = [first, 255 - first, first ^ 0x5A, first + 1]
        word = sum(byte << (8 * i) for i, byte in enumerate(four))
        high_01, high_23, low_01, low_23 = executed(program, word)
        high = [high_01 & 0xFFFF, high_01 >> 16, high_23 & 0xFFFF, high_23 >> 16]
        low = [low_01 & 0xFFFF, low_01 >> 16, low_23 & 0xFFFF, low_23 >> 16]
        assert high == [bits[byte >> 4] for byte in four]
        assert low == [bits[byte & 15] for byte in four]


def executed(program: str, word: int) -> list[int]:
    """Carry out a look-up's PTX on one 32-bit word and return its four outputs."""
    registers = {"$4": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in program.splitlines():
        found = re.fullmatch(r"(\w+)\.b32 (.*);|(shr)\.u32 (.*);", line)
        if found is None:
            assert line in "{}" or line.startswith(".reg"), line
            continue
        name, operands = (each for each in found.groups() if each is not None)
        target, *sources = operands.split(", ")
        values = [value(each) for each in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(4)]


def permuted(low: int, high: int, selector: int) -> int:
    """``prmt.b32``: byte i is the one that half byte i of the selector names; bit 3 is its sign."""
    source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    result = 0
    for i in range(4):
        choice = (selector >> (4 * i)) & 15
        byte = source[choice & 7]
        if choice & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * i)
    return result


def combined(a: int, b: int, c: int, table: int) -> int:
    """``lop3.b32``: bit i of the result is the table's entry for the three operands' bits i."""
    result = 0
    for i, (x, y, z) in itertools.product(range(32), itertools.product((0, 1), repeat=3)):
        here = (a >> i) & 1 == x and (b >> i) & 1 == y and (c >> i) & 1 == z
        result |= (here and (table >> (4 * x + 2 * y + z)) & 1) << i
    return result


INSTRUCTIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shr": lambda a, b: a >> b,
    "prmt": permuted,
    "lop3": combined,
}
