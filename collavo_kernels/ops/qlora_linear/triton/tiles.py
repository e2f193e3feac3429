"""What the Triton backend's launches share: tiles for each kind of GPU, shares, common arguments.

Tiles are few and fixed, so the order of every sum depends on shapes and the GPU alone. No choice
spills registers or overfills shared memory, with Triton 3.6 and 3.7; tests compile all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from collavo_kernels._gpu import kind_of as kind_of
from collavo_kernels._gpu import processors as processors
from collavo_kernels.ops.qlora_linear.inputs import QLoRAInputs
from collavo_kernels.ops.qlora_linear.nf4.format import block_count, nf4_code, split_scales
from collavo_kernels.ops.qlora_linear.triton.weight import Weight

CHUNK_BYTES = 32  # of a chunk: 64 codes of a weight row, which have one scale
READ_IN_PLACE = 2  # adapters; more of them, which no model here has, are joined by PyTorch
_LEAST_STEPS = 4  # a share that is shorter does not fill its pipeline
_codes: dict[tuple[torch.device, torch.dtype], Tensor] = {}
Each = TypeVar("Each")


class Tiles(NamedTuple):
    """Tiles of ``linear_kernel``.

    Attributes:
        tokens: Of an output tile.
        weight_rows: Of an output tile.
        warps: Of a program.
        stages: Of its pipeline.
        resident: Programs that a multiprocessor should have.
        chunks: Of 64 columns in one turn of the loop. Two read longer pieces of the weight's rows;
            wide sums leave no registers for the partial sums of two.
    """

    tokens: int
    weight_rows: int
    warps: int
    stages: int
    resident: int
    chunks: int = 2

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK_M": self.tokens, "BLOCK_N": self.weight_rows, "CHUNKS": self.chunks}

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class GradientTiles(NamedTuple):
    """Tiles of ``grad_x_kernel``: tokens, and pairs of columns, in steps of the weight's rows."""

    tokens: int
    weight_rows: int
    pairs: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK_M": self.tokens, "BLOCK_N": self.weight_rows, "BLOCK_P": self.pairs}

    @property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# For few tokens two warps: four would take Hopper's wgmma, which wants the bytes in an order that
# costs more instructions to look up than its speed gains there. Hopper's were timed on an H200.
TILES = {
    "ampere": (
        Tiles(8, 64, 2, 5, 4),
        Tiles(16, 64, 2, 4, 4),
        Tiles(64, 128, 8, 3, 1),
        Tiles(128, 128, 8, 4, 1, 1),
    ),
    "hopper": (
        Tiles(8, 64, 2, 3, 6),
        Tiles(16, 64, 2, 3, 6),
        Tiles(32, 64, 2, 3, 4),
        Tiles(64, 64, 4, 3, 2),
        Tiles(128, 128, 8, 4, 1, 1),
        Tiles(256, 128, 8, 4, 1, 1),
    ),
    # Products accumulate in tensor memory, which wider tiles would overfill.
    "blackwell": (Tiles(16, 64, 2, 4, 4), Tiles(64, 128, 8, 3, 1)),
    "portable": (Tiles(16, 64, 4, 2, 4), Tiles(64, 64, 4, 2, 2), Tiles(128, 128, 8, 2, 1, 1)),
}
FLOAT32_TILES = Tiles(32, 32, 8, 2, 2)
# Every byte has a scale of its own here.
UNALIGNED_TILES = Tiles(32, 64, 8, 2, 2)
_FEW_TOKENS, _SOME_TOKENS, _MANY_TOKENS = 16, 64, 128
_WIDEST_FROM = 1024  # tokens; with fewer the last tile's empty part costs what its width gains

FEW_GRADIENT_TILES = GradientTiles(16, 32, 32, 4, 2)
_NARROW, _WIDE = GradientTiles(128, 32, 64, 8, 2), GradientTiles(128, 64, 64, 8, 3)
GRADIENT_TILES = {"ampere": _NARROW, "hopper": _WIDE, "blackwell": _WIDE, "portable": _NARROW}
UNALIGNED_GRADIENT_TILES = GradientTiles(64, 32, 32, 8, 2)
FLOAT32_GRADIENT_TILES = GradientTiles(32, 16, 32, 4, 2)


def tiles_for(inputs: QLoRAInputs) -> Tiles:
    """Return the tiles of a forward."""
    (m, _), n, device = inputs.x.shape, inputs.out_features, inputs.x.device
    if inputs.x.dtype == torch.float32:
        return FLOAT32_TILES
    if not is_aligned(inputs):
        return UNALIGNED_TILES
    choices = TILES[kind_of(device)]
    place = next((i for i, each in enumerate(choices) if m <= each.tokens), len(choices) - 1)
    if choices[place].tokens > _MANY_TOKENS and (m < _WIDEST_FROM or not _spares_registers(inputs)):
        place -= 1
    while not may_split(choices[place]) and grid_of(choices[place], m, n) < processors(device):
        place -= 1
    return choices[place]


def _spares_registers(inputs: QLoRAInputs) -> bool:
    """Say whether the epilogue leaves the widest tile its registers: no table, even ranks."""
    return inputs.row_table is None and all(b.shape[1] % 16 == 0 for b in inputs.b)


def grid_of(tiles: Tiles, m: int, n: int) -> int:
    """Return how many tiles cover the output."""
    return int(triton.cdiv(m, tiles.tokens) * triton.cdiv(n, tiles.weight_rows))


def may_split(tiles: Tiles) -> bool:
    """Say whether the columns may be shared out; where sums are wide, registers do not suffice."""
    return tiles.tokens < _MANY_TOKENS


def must_split(tiles: Tiles) -> bool:
    """Say whether sums always go to ``sum_kernel``, be it one share: a variant less to compile."""
    return tiles.tokens < _SOME_TOKENS


def gradient_tiles_for(inputs: QLoRAInputs) -> GradientTiles:
    """Return the tiles of the gradient of x."""
    if inputs.x.dtype == torch.float32:
        return FLOAT32_GRADIENT_TILES
    if not is_aligned(inputs):
        return UNALIGNED_GRADIENT_TILES
    few = inputs.x.shape[0] <= _FEW_TOKENS
    return FEW_GRADIENT_TILES if few else GRADIENT_TILES[kind_of(inputs.x.device)]


def hidden_tiles(tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return tokens, ranks and columns of ``prepare_kernel``'s tiles."""
    if dtype == torch.float32:
        return 16 if tokens <= _FEW_TOKENS else 32, 16, 64
    return (16, 16, 128) if tokens <= _FEW_TOKENS else (32, 64, 64)


def shares_of(steps: int, wanted: int) -> tuple[int, int]:
    """Share steps out: return how many shares, none of them empty, and steps in each."""
    shares = max(1, min(wanted, steps // _LEAST_STEPS))
    each = int(triton.cdiv(steps, shares))
    return int(triton.cdiv(steps, each)), each


def two(values: Sequence[Each], missing: Each) -> tuple[Each, Each]:
    """Return what the adapters that are read in place have, or stand-ins for them."""
    first, second, *_ = *values, missing, missing
    return first, second


def beside(
    factors: Sequence[Tensor], dim: int, x: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Return two factors and their ranks along ``dim``; x stands in for what is not there."""
    if len(factors) > READ_IN_PLACE:
        factors = [torch.cat([each.to(x.dtype) for each in factors], dim)]
    factors = [each.contiguous() for each in factors]
    ranks = [each.shape[dim] for each in factors]
    return two(factors, x), two(ranks, 0)


def is_aligned(inputs: QLoRAInputs) -> bool:
    """Say whether every 64 codes of a row lie in one block."""
    return inputs.x.shape[1] % 64 == 0 and inputs.block_size >= 64


def units_of(inputs: QLoRAInputs) -> int:
    """Return a row's bytes, counted in whole chunks where rows are made of them."""
    half = inputs.x.shape[1] // 2
    return half // CHUNK_BYTES if is_aligned(inputs) else half


def facts_of(inputs: QLoRAInputs) -> dict[str, int | bool]:
    """Return what kernels that decode the weight know when they are compiled."""
    wide = inputs.x.dtype == torch.float32
    return {
        "BLOCK_SIZE": inputs.block_size,
        "NESTED": inputs.double_quant,
        "ALIGNED": is_aligned(inputs),
        "PERMUTE": kind_of(inputs.x.device) != "portable" and not wide,
    }


def weight_of(inputs: QLoRAInputs) -> Weight:
    """Return the weight as kernels take it."""
    if inputs.scales is None:
        raise RuntimeError("qlora_linear: the Triton backend has no dense weight")
    blocks = block_count(inputs.shape, inputs.block_size)
    absmax, *nested = split_scales(inputs.scales, blocks, inputs.double_quant)
    offset, nested_absmax, nested_code = (absmax if each is None else each for each in nested)
    return Weight(inputs.weight, absmax, nested_absmax, nested_code, offset, _code(inputs.x))


def _code(x: Tensor) -> Tensor:
    # A GPU keeps it, since making it would be a launch.
    if not x.is_cuda:
        return nf4_code(x).to(x.dtype)
    key = x.device, x.dtype
    if key not in _codes:
        with torch.inference_mode(False):
            _codes[key] = nf4_code(x).to(x.dtype)
    return _codes[key]
