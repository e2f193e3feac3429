"""The Triton kernels compiled for GPUs that are not here: they fit and keep to their registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from collavo_kernels._triton import constants
from collavo_kernels.ops.crayon_attention.triton import launch, tiles
from collavo_kernels.ops.crayon_attention.triton.parts import Angles, Heads
from collavo_kernels.testing.aot import TARGETS, ArgumentType, compile_ahead
from collavo_kernels.testing.cases.crayon_attention import AttentionCase

KINDS = dict(zip(TARGETS, ("ampere", "hopper", "blackwell", "portable"), strict=True))
KERNELS = {
    "attend": launch.attend_kernel,
    "key_gradients": launch.key_gradients_kernel,
    "query_gradients": launch.query_gradients_kernel,
}
# Shared memory of the GPUs that take Ampere's tiles without Ampere's memory: 8.6, 8.9 and 12.
SMALLEST = 101376


def signature(element: str) -> dict[str, ArgumentType]:
    """A type for every run-time argument of every kernel; strides as those of whole rows are."""
    value, statistics = f"*{element}", ("*fp32", "*fp32")
    heads = Heads(value, "i32:16", "i32:16", "i32:16")
    return {
        **dict.fromkeys(("q", "k", "v", "key", "value"), heads),
        **dict.fromkeys(("table_q", "query", "grad_out", "out", "dq"), value),
        **dict.fromkeys(("tables", "prepared"), (value, value, value)),
        **dict.fromkeys(("extra", "gradients"), (value, value)),
        # Angles may be wider than q, which takes registers.
        "angles": Angles("*fp32", "*fp32", "i32:16"),
        **dict.fromkeys(("statistics", "parts"), statistics),
        "lse": "*fp32",
        **dict.fromkeys(("row_index", "key_range", "flags"), "*i32"),
        **dict.fromkeys(("length", "heads", "kv_heads", "rows", "window", "shares"), "i32"),
        **dict.fromkeys(("scale", "scale_log2"), "fp32"),
    }


def compiles(
    kernel: Any, element: str, target: str, values: dict[str, Any], options: dict[str, int]
) -> None:
    """Compile for a target; fail where memory lacks, matrix products wait or registers spill.

    Of Hopper's key gradients, whose tile was timed, a few bytes may: 275 us in place of 295 for the
    fastest tile that spills none. In the loop that is four instructions where every mask is on.
    """
    types = {n: t for n, t in signature(element).items() if n in kernel.arg_names}
    if values.get("SHARED"):
        types["gradients"] = ("*fp32", "*fp32")
    const = constants(**values)
    built = compile_ahead(kernel, types, {"CONST": const}, target, **options)
    facts = f"{kernel.__name__} {const} {options} {built}"
    timed = (kernel.__name__, target) == ("key_gradients_kernel", "cuda:90") and element == "bf16"
    assert built.spill_bytes <= (48 if timed else 0), facts
    assert built.spills_in_loops <= (4 if timed and values["WINDOW"] else 0), facts
    limit = SMALLEST if target == "cuda:80" else built.shared_limit
    assert built.shared_bytes <= limit, facts
    # A kernel that wants more tensor memory than there is compiles to a trap and little else.
    assert built.registers > 24, facts
    # Hopper's products are asynchronous unless the assembler must wait for each of them.
    assert built.warnings == (), facts


def attends(head_dim: int, element: str, target: str, switches: bool) -> None:
    """Compile the three kernels that attend, with every switch on or as a LLaMA trains."""
    plan = tiles.plan_for(head_dim, 4 if element == "fp32" else 2, KINDS[target])
    names = ("ADD_Q", "ADD_KEY", "ADD_VALUE", "HAS_RANGE", "WINDOW")
    values = dict.fromkeys(names, switches) | {"ROTATE": True, "CAUSAL": True}
    values["SHARED"] = not switches
    values |= {"PRECISION": "ieee" if element == "fp32" else "tf32"}
    for name, kernel in KERNELS.items():
        chosen = getattr(plan, name)
        known = values | tiles.padded(head_dim) | chosen.blocks
        compiles(kernel, element, target, known, chosen.options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "switches"), [(64, True), (80, True), (96, False), (128, False), (256, False)]
)
def test_attention_fits(head_dim: int, switches: bool, target: str) -> None:
    """80 and 96 take 128's tiles and more registers for their masks, so 80 has 128's switches;
    float16 is as wide as bfloat16. Without a switch other registers are free, not more of them."""
    attends(head_dim, "bf16", target, switches)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_fits_in_float32(head_dim: int, target: str) -> None:
    attends(head_dim, "fp32", target, True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("head_dim", "element"), [(128, "bf16"), (256, "fp32")])
def test_passes_over_tokens_fit(head_dim: int, element: str, target: str) -> None:
    """With everything on at once, which no launch of the preparation asks for."""
    names = ("Q", "K", "V", "STATISTICS", "ROTATE", "ADD_Q", "ADD_K", "ADD_V", "HAS_RANGE")
    values = dict.fromkeys(names, True) | tiles.preparation(head_dim) | tiles.padded(head_dim)
    compiles(launch.prepare_kernel, element, target, values, {})
    values |= {"ADD_KEY": True, "ADD_VALUE": True}
    compiles(launch.sum_shares_kernel, element, target, values, {})


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 130, 256])
def test_every_head_dim_has_tiles(head_dim: int, kind: str) -> None:
    half = tiles.half_of(head_dim)
    assert head_dim // 2 <= half <= 128 and half & (half - 1) == 0
    for bytes_ in (2, 4):
        for each in tiles.plan_for(head_dim, bytes_, kind):
            assert max(each.queries, each.keys) <= tiles.LARGEST_BLOCK
            assert min(each.queries, each.keys) >= tiles.SMALLEST_BLOCK


def test_heads_are_shared_out_where_programs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share is a whole number of query heads, and no more of them than fill the GPU twice."""
    device = torch.device("cuda")
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    for members, programs, shares in (
        (4, 88, 4),
        (4, 132, 2),
        (4, 264, 1),
        (6, 90, 3),
        (6, 1, 6),
        (1, 1, 1),
    ):
        assert tiles.shares_of(members, programs, device) == shares


def test_what_a_launch_cannot_hold_is_declined_or_copied() -> None:
    """Heads of all samples, or blocks of tokens, are a launch's second dimension, which ends at
    65535; offsets of a block are int32."""
    case = AttentionCase("big", "", 2, 1, heads=32, kv_heads=32, head_dim=2, images=())
    inputs = case.make(torch.float32)
    many = inputs.q.to("meta").expand(2, 1, 32, 2).repeat(1024, 1, 1, 1)
    assert launch.declines(inputs) is None
    assert "65535" in (launch.declines(inputs._replace(q=many)) or "")
    long = inputs.q.to("meta").expand(2, 1, 32, 2)[:, :, :1].expand(2, 2**20, 1, 2)
    assert "1048560 tokens" in (launch.declines(inputs._replace(q=long)) or "")
    assert "float64" in (launch.declines(case.make(torch.float64)) or "")
    wide = AttentionCase("wide", "", 1, 1, heads=1, kv_heads=1, head_dim=258, images=())
    assert "256" in (launch.declines(wide.make(torch.float32)) or "")
    far_heads = torch.empty_strided((1, 2, 4, 8), (2**33, 8, 2**30, 1), device="meta")
    far_tokens = torch.empty_strided((1, 2, 4, 8), (2**33, 2**25, 8, 1), device="meta")
    assert launch._dense(far_heads).is_contiguous()
    assert launch._dense(far_tokens).is_contiguous()
    assert launch._dense(many) is many


def test_a_window_that_hides_nothing_is_none() -> None:
    case = AttentionCase("window", "", length=8, head_dim=2, images=(), window=7)
    inputs = case.make(torch.float32)
    assert launch.readable(inputs).window == 7
    for window in (8, 2**40):
        assert launch.readable(inputs._replace(window=window)).window is None
