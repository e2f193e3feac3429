"""A fuzzer that could not fail would be worthless: deliberate mistakes must stop the process."""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fuzz_attention import AttentionCall, run_attention
from fuzz_functions import (
    DequantizeCase,
    ProductCase,
    RowsCase,
    run_dequantize,
    run_product,
    run_rows,
)
from fuzz_linear import LinearCase, run_linear
from fuzz_lookup import LookupCase, run_lookup
from fuzz_support import SANITIZED, guarded, needs_native
from torch import Tensor

from collavo_kernels._native import native

AGAIN = os.environ.get("COLLAVO_FUZZ_AGAIN", "")
needs_sanitizers = pytest.mark.skipif(
    not SANITIZED, reason="scripts/fuzz_native.sh builds with sanitizers"
)
RUNNERS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "LinearCase": (LinearCase, run_linear),
    "DequantizeCase": (DequantizeCase, run_dequantize),
    "ProductCase": (ProductCase, run_product),
    "RowsCase": (RowsCase, run_rows),
    "LookupCase": (LookupCase, run_lookup),
    "AttentionCall": (AttentionCall, run_attention),
}
SURVIVED, RAISED = 7, 8


def survives(act: Callable[[], None], report: Path) -> bool:
    """Do something in a process of its own, its errors in a file; say whether it came to its end.

    Raises:
        RuntimeError: if it raised, which is neither.
    """
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # pytest's; it would print a trace
        os.dup2(os.open(report, os.O_CREAT | os.O_WRONLY), 2)
        try:
            act()
            os._exit(SURVIVED)
        finally:
            os._exit(RAISED)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended == RAISED:
        raise RuntimeError("raised instead of reaching the wrong access")
    return ended == SURVIVED


def sum_rows(isa: int, short: str, kind: Callable[[Tensor], Tensor]) -> None:
    """Sum grad [3, 16] into a row of 16, where one of them has a value less than it should."""
    grad, table = (
        kind(torch.ones(48 - (short == "grad"))),
        kind(torch.ones(16 - (short == "table"))),
    )
    index = torch.zeros(3, dtype=torch.int32)
    native().qlora_linear_sum_rows(
        isa=isa,
        dtype=0,
        grad_out=grad,
        row_index=index,
        grad_row_table=table,
        tokens=3,
        columns=16,
        table_rows=1,
    )


@needs_native
@pytest.mark.parametrize("short", ["nothing", "grad", "table"])
def test_guarded_memory_stops_an_access_of_one_value_too_many(short: str, tmp_path: Path) -> None:
    ended_well = survives(lambda: sum_rows(-1, short, guarded), tmp_path / "report")
    assert ended_well == (short == "nothing")


@needs_native
@needs_sanitizers
@pytest.mark.parametrize("isa", [0, -1])
@pytest.mark.parametrize(("short", "access"), [("grad", "READ"), ("table", "WRITE")])
def test_sanitizers_see_one_value_too_many_in_torch_memory(
    isa: int, short: str, access: str, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    assert not survives(lambda: sum_rows(isa, short, torch.clone), report)
    # The report's kind differs: a vector's first byte is where it should be, its last one is not.
    assert "ERROR: AddressSanitizer: " in report.read_text()
    assert f"{access} of size" in report.read_text()


@needs_native
@needs_sanitizers
def test_sanitizers_see_undefined_behaviour(tmp_path: Path) -> None:
    """Row 2 of a would start 2 ** 63 values behind row 0, which no index holds."""
    x = torch.ones(4, 1)
    a = SimpleNamespace(data_ptr=x.data_ptr, stride=lambda: (2**62, 1))

    def act() -> None:
        native().qlora_linear_product(isa=0, a=a, b=x[:1], out=x, m=4, n=1, k=1)

    assert not survives(act, tmp_path / "report")
    assert "runtime error: signed integer overflow" in (tmp_path / "report").read_text()


@pytest.mark.skipif(not AGAIN, reason="for scripts/fuzz_native.sh --again FILE")
def test_again() -> None:
    noted = json.loads(Path(AGAIN).read_text())
    kind, runner = RUNNERS[noted.pop("kind")]
    runner(kind(**noted))
