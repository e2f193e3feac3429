"""What ``collavo info`` says: the words users choose a backend by."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collavo.cli import main
from collavo_kernels import _backends
from collavo_kernels._backends import Backend, Table
from collavo_kernels.info import (
    collect,
    format_report,
    operator_report,
    operators,
    processor_name,
)


def _nothing(*_: Any) -> None:
    return None


def toy(**cpu: Any) -> Table[Any, Any, Any, Any, Any, Any]:
    return Table(
        "toy",
        (
            Backend("cuda", _nothing, _nothing, devices=("cuda",)),
            Backend("cpu", _nothing, devices=("cpu",), **cpu),
            Backend("reference", _nothing, _nothing),
        ),
    )


def test_a_backend_without_backward_leaves_it_to_the_reference() -> None:
    report = operator_report(toy(), "cpu")
    assert (report.forward, report.backward, report.note) == ("cpu", "reference", None)
    assert report.backends[0].declines == "runs on cuda, not on cpu"


def test_an_unavailable_backend_gives_its_reason() -> None:
    report = operator_report(toy(unavailable=lambda: "was not built"), "cpu")
    assert report.forward == "reference"
    assert report.backends[1].declines == "was not built"


def test_a_backend_that_waits_to_be_asked_says_how_to_ask() -> None:
    report = operator_report(toy(opt_in=True), "cpu")
    assert report.forward == "reference"
    assert "backend='cpu'" in str(report.backends[1].declines)


@pytest.mark.parametrize(
    ("choice", "forward", "note"),
    [
        ("reference", "reference", "asks for 'reference'"),
        ("toy=reference", "reference", "asks for 'reference'"),
        ("qlora_linear=reference", "cpu", None),
        ("cuda", "cpu", "calls fail: runs on cuda, not on cpu"),
        ("cupy", "cpu", "does not exist: calls fail"),
        ("to=cpu", "cpu", "calls fail: COLLAVO_BACKEND: expected a backend, or"),
    ],
)
def test_the_environment_variable_shows(
    choice: str, forward: str, note: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLAVO_BACKEND", choice)
    report = operator_report(toy(), "cpu")
    assert report.forward == forward
    assert (report.note is None) if note is None else (note in str(report.note))


def test_report_names_every_operator_and_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLLAVO_BACKEND", raising=False)
    sections = re.split(r"^  (\w+) on cpu$", format_report(collect()), flags=re.MULTILINE)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert set(found) == set(operators())
    for operator in operators().values():
        for backend in operator.backends:
            assert backend.name in found[operator.name], (operator.name, backend.name)


def test_command_line_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["versions"]) >= {"torch", "triton", "transformers"}
    assert {row["operator"] for row in report["operators"]} == set(operators())


def test_python_m_prints_the_same() -> None:
    command = [sys.executable, "-m", "collavo_kernels"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "operators:" in result.stdout


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        # Two generations under one name: family and model tell them apart.
        (
            "cpu family : 25\nmodel : 17\nmodel name : AMD EPYC\nstepping : 1\n",
            "AMD EPYC family 25 model 17",
        ),
        ("cpu family : 6\nmodel : 85\nmodel name : Intel(R) Xeon(R) 8259CL\n", None),
        ("model name : Virtual\n", "Virtual"),
    ],
)
def test_a_processor_is_named_with_a_number(tmp_path: Path, lines: str, name: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(2 * f"processor : 0\n{lines}\n")
    found = processor_name(tmp_path / "cpuinfo")
    assert found == (name or "Intel(R) Xeon(R) 8259CL")


def test_a_backend_that_yields_serves_where_it_is_asked_for_or_alone() -> None:
    """Which of two that take a call is faster depends on its sizes; the table says who yields."""

    def backend(name: str, **options: Any) -> Backend[Any, Any, Any, Any, Any, Any]:
        return Backend(name, lambda inputs: name, **options)

    def few(tokens: int) -> str | None:
        return "few tokens" if tokens < 8 else None

    first, second, reference = backend("one", yields=few), backend("two"), backend("reference")
    both = Table("toy_yields", (first, second, reference))
    assert [both.select(n, "cpu").name for n in (4, 8)] == ["two", "one"]
    assert both.select(4, "cpu", "one").name == "one"
    declining = replace(second, declines=lambda inputs: "takes nothing")
    alone = Table("toy_yields_alone", (first, declining, reference))
    assert alone.select(4, "cpu").name == "one"


def test_a_missing_backend_is_complained_of_only_where_it_would_have_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dense weight is the reference's everywhere: a build would change nothing."""
    said: list[str] = []
    monkeypatch.setattr(_backends, "_say_slow_once", lambda *words: said.append(words[-1]))

    def one(name: str, declines: str | None) -> Backend[Any, Any, Any, Any, Any, Any]:
        options: Any = {"devices": ("cpu",), "declines": lambda inputs: declines}
        return Backend(name, _nothing, unavailable=lambda: f"{name} was not built", **options)

    for i, declines in enumerate(("takes no dense weight", None)):
        table = Table(f"toy_missing_{i}", (one("cpu", declines), Backend("reference", _nothing)))
        assert table.select(None, "cpu").name == "reference"
    assert said == ["cpu was not built"]
