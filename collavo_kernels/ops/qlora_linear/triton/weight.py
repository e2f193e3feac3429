"""The NF4 weight inside a Triton kernel: codes looked up, scales read from either kind.

The look-up. An H200 reads about 35 codes per clock and SM, so what one code costs decides the speed
of decoding. A table in memory costs an extraction, an address and a load per code, and one load of
a warp per clock is all that an SM answers; a tree of selects costs 15 instructions per code. A byte
permutation (``prmt``) looks up four codes in half of a 16-byte table: with the table as two planes
of bytes, eight codes take 16 permutations and 5 other instructions, and no load. As ``nvdisasm``
lists the loop of the decoding kernel (sm_90, 8 tokens, everything counted) a code then costs 5.3
instructions in place of 8.8, of which 2.0 permutations and 0.05 loads in place of 1.1. So NVIDIA
takes permutations for 16-bit types. AMD's permutation wants its table in vector registers, which
inline assembly would fill again for every word, so there, for float32, and in the interpreter, the
table in memory serves: its 16 entries are one cache line.

Both give the code rounded to x's dtype, which float32 holds exactly.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from collavo_kernels.ops.qlora_linear.nf4.format import NESTED_BLOCK, NF4_CODE

_NESTED_BLOCK = tl.constexpr(NESTED_BLOCK)


def permutations(dtype: torch.dtype) -> str:
    """Return PTX from four bytes ``$4`` to the codes of their high halves ``$0 $1``, low ``$2 $3``.

    A permutation's selector is four neighbouring half bytes, whose top bit means something else:
    it is masked, and a third permutation picks between the two halves of the table with it.
    """
    bits = [int(v) & 0xFFFF for v in torch.tensor(NF4_CODE).to(dtype).view(torch.int16).tolist()]
    lines = [
        "{",
        ".reg .b32 code, pick, a, b, low, high;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 pick, $4, 1;",
        "lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA;",  # (a & b) | c
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 pick, pick, 16;"]
        for plane, shift in (("low", 0), ("high", 8)):
            words = [_word(bits[i : i + 4], shift) for i in range(0, 16, 4)]
            lines += [
                f"mov.b32 a, {words[0]:#x};",
                f"prmt.b32 a, a, {words[1]:#x}, code;",
                f"mov.b32 b, {words[2]:#x};",
                f"prmt.b32 b, b, {words[3]:#x}, code;",
                f"prmt.b32 {plane}, a, b, pick;",
            ]
        lines += [f"prmt.b32 ${half}, low, high, 0x7351;"]
        lines += [f"prmt.b32 ${2 + half}, low, high, 0x6240;"]
    return "\n".join([*lines, "}"])


def _word(bits: list[int], shift: int) -> int:
    return sum(((value >> shift) & 0xFF) << (8 * i) for i, value in enumerate(bits))


_BFLOAT16 = tl.constexpr(permutations(torch.bfloat16))
_FLOAT16 = tl.constexpr(permutations(torch.float16))
# Outputs are written before the input was read for the last time.
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")


class Weight(NamedTuple):
    """The addresses of a weight's parts, as ``nf4.format`` lays them out.

    Attributes:
        packed: ``[N, K / 2]`` bytes.
        absmax: The blocks' scales, 8-bit codes where they are nested.
        nested_absmax: The scales of these.
        nested_code: What the codes stand for.
        offset: What is added to them, one number.
        code: The table of codes, ``[16]`` in x's dtype.
    """

    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_code: Any
    offset: Any
    code: Any


@triton.jit
def codes_of(bytes_, weight, CONST: tl.constexpr):
    """Return the codes of the bytes' high and low halves, in the table's dtype. CONST: PERMUTE."""
    code = weight.code
    if CONST.PERMUTE and code.dtype.element_ty == tl.bfloat16:
        first, second = tl.inline_asm_elementwise(
            _BFLOAT16, _REGISTERS, [bytes_], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif CONST.PERMUTE:
        first, second = tl.inline_asm_elementwise(
            _FLOAT16, _REGISTERS, [bytes_], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        index = bytes_.to(tl.int32)
        first = tl.load(code + (index >> 4))
        second = tl.load(code + (index & 15))
    return first, second


@triton.jit
def scales_of(weight, code_index, live, CONST: tl.constexpr):
    """Return the float32 scales of the blocks that codes lie in, 0 where not live.

    CONST: BLOCK_SIZE, NESTED.
    """
    block = code_index // CONST.BLOCK_SIZE
    if CONST.NESTED:
        code = tl.load(weight.absmax + block, mask=live, other=0).to(tl.int32)
        outer = tl.load(weight.nested_absmax + block // _NESTED_BLOCK, mask=live, other=0.0)
        scale = tl.load(weight.nested_code + code) * outer + tl.load(weight.offset)
        scale = tl.where(live, scale, 0.0)
    else:
        scale = tl.load(weight.absmax + block, mask=live, other=0.0)
    return scale
