"""What a run is asked for, and ``Measure``, which times a row of the registry and records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks import comparison, machine, report, roofline, timing
from benchmarks.base import Base
from benchmarks.registry import BENCHMARKS, Call, Row, Unavailable
from collavo_kernels.testing import peak_megabytes

Key = tuple[str, ...]


@dataclass
class Run:
    """What a run has found so far.

    Attributes:
        rows: The measured rows.
        seconds: Their times, from all turns.
        pairs: The times of this tree's providers and the base's, where ``--base`` asks for them.
        roof: The roof, once it is measured.
    """

    rows: dict[Key, report.Measurement] = field(default_factory=dict)
    seconds: dict[Key, list[float]] = field(default_factory=dict)
    pairs: list[comparison.Pair] = field(default_factory=list)
    roof: roofline.Roof | None = None


RUN = pytest.StashKey[Run]()


def is_dry(config: pytest.Config) -> bool:
    """Say whether a stand-in takes the GPU's place."""
    return bool(config.getoption("--dry-run"))


def chosen_device(config: pytest.Config) -> torch.device:
    """Return the device to measure: a GPU where there is one, else the CPU, or ``--device``."""
    name = "cpu" if is_dry(config) else config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def chosen_kind(config: pytest.Config) -> str:
    """Return whose benchmarks are run: ``cuda`` or ``cpu``."""
    return "cuda" if is_dry(config) or chosen_device(config).type == "cuda" else "cpu"


def turns(config: pytest.Config) -> int:
    """Return how many turns a task is measured in; one where nothing is timed, or by ``--base``."""
    once = ("benchmark_disable", "--quick-gpu", "--dry-run", "--base")
    return 1 if any(map(config.getoption, once)) else timing.TURNS


class Measure:
    """Times a row and records it.

    Args:
        benchmark: The plugin's fixture.
        config: The run's options, and what it has found.
        device: The device to measure.
        base: Another commit to take turns with, or None.
    """

    def __init__(
        self, benchmark: Any, config: pytest.Config, device: torch.device, base: Base | None
    ) -> None:
        self.benchmark, self.device, self.base = benchmark, device, base
        self.options, self.run, self.dry = config, config.stash[RUN], is_dry(config)

    def __call__(self, row: Row) -> report.Measurement | None:
        """Return what was recorded; None where timing is off. Skips what cannot be measured."""
        entry = BENCHMARKS[row.op]
        self.benchmark.group = f"{row.op} {row.mode} {row.case}"
        try:
            call = entry.prepare(row, self.device)
            with torch.set_grad_enabled(call.grad):
                if self.base is not None and not self.benchmark.disabled:
                    return self._compare(self.base, row, call)
                times = self._times(call, timing.TURNS if entry.in_turns else 1)
                return self._record(row, call, times) if times.seconds else None
        except Unavailable as reason:
            pytest.skip(f"{row.provider}: {reason}")

    @property
    def _budget(self) -> float:
        """Seconds that a row may take."""
        if self.options.getoption("--quick-gpu"):
            return 0.1
        return 2.0 if self.options.getoption("--full") else 0.4

    def _times(self, call: Call, parts: int) -> timing.GpuTimes:
        """Time a call as its device asks for; none where timing is off, zeros in a dry run."""
        if self.options.getoption("--quick-gpu"):
            parts = 1
        if self.device.type == "cuda" or self.dry:
            self.benchmark.pedantic(call.run)
            if self.benchmark.disabled:
                return timing.GpuTimes([], 0.0, "")
            if self.dry:
                return timing.GpuTimes([0.0], 0.0, "")
            return timing.gpu_times(call.run, self._budget / parts, capture=call.capture)
        least = -(-5 // parts)
        taken = timing.rounds_of(self.benchmark, call.run, self._budget / parts, least, call.before)
        return timing.GpuTimes(taken, 0.0, "")

    def _compare(self, base: Base, row: Row, call: Call) -> report.Measurement:
        """Take turns with the base, and record both."""
        self.benchmark.pedantic(call.run)
        sampler = timing.Sampler(call.run, self.device, capture=call.capture, before=call.before)
        base.prepare(row)
        here, there = timing.take_turns(sampler.stretch, base.stretch, self._budget)
        dtype = str(call.dtype).removeprefix("torch.")
        self.run.pairs.append(comparison.Pair(row, dtype, here, there))
        found = self._record(
            row, call, timing.GpuTimes(comparison.pooled(here), 0.0, sampler.method)
        )
        times = timing.GpuTimes(comparison.pooled(there), 0.0, sampler.method)
        self._record(row, call, times, base=base.commit.short)
        return found

    def _record(
        self, row: Row, call: Call, times: timing.GpuTimes, base: str = ""
    ) -> report.Measurement:
        """Put what was found among the run's rows; ``base`` is the commit of a base's times."""
        dtype = str(call.dtype).removeprefix("torch.")
        facts = machine.facts(self.device)
        facts |= {"device": report.DRY_RUN, "isa": ""} if self.dry else {}
        facts |= {"commit": base} if base else {}
        provider = comparison.BASE + row.provider if base else row.provider
        key = (row.op, *report.key(row.case, row.mode, dtype, provider, facts))
        pooled = self.run.seconds[key] = [*self.run.seconds.get(key, ()), *times.seconds]
        p20, p50, p80 = timing.percentiles(pooled)
        rates = self._rates(call, dtype, p50)
        peak = self.run.rows[key].peak_mb if key in self.run.rows else None
        if peak is None and not self.dry and not base:
            peak = peak_megabytes(call.run, self.device)
        measured = call.error is not None and not self.dry and not base
        found = report.Measurement(
            op=row.op,
            provider=provider,
            mode=row.mode,
            case=row.case,
            dtype=dtype,
            p20_ms=p20 * 1e3,
            p50_ms=p50 * 1e3,
            p80_ms=p80 * 1e3,
            peak_mb=peak,
            error=call.error() if measured and call.error else None,
            config_json=report.config_json(call.config),
            wall_ms=times.wall * 1e3 if times.wall else None,
            timed=times.method,
            **rates,  # type: ignore[arg-type]
            **facts,  # type: ignore[arg-type]
        )
        self.run.rows[key] = found
        self.benchmark.extra_info.update(provider=provider, **rates)
        path = self.options.getoption("--rows")
        if path is not None:
            report.append_jsonl(path, found)
        return found

    def _rates(self, call: Call, dtype: str, seconds: float) -> dict[str, float | None]:
        """Return GB/s, GFLOP/s and the part of the roof that a time means; None for no such."""
        roof = self.run.roof or roofline.Roof(0.0)
        least = roof.seconds(call.bytes, call.flops, dtype)
        return {
            "gb_per_s": call.bytes / seconds / 1e9 if call.bytes and seconds else None,
            "gflop_per_s": call.flops / seconds / 1e9 if call.flops and seconds else None,
            "roof": least / seconds if least and seconds else None,
        }
