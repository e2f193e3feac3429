"""Two processes (gloo), DDP through the trainer and FSDP2 through its parts, equal one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import MIXED_STEPS, train_ddp, train_mixed_ddp

from collavo.model.llava import CollavoForConditionalGeneration

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(kind: str, folder: Path, world: int = 2) -> list[Any]:
    """Run the worker in ``world`` processes and return their reports."""
    folder.mkdir()
    common = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, str(HERE / "distributed_worker.py"), kind, str(folder)]
    processes = []
    for rank in range(world):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(world))
    assert statuses == [0] * world, logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def check_idle_adapters(report: dict[str, Any]) -> None:
    """The idle adapter and its optimizer state keep every byte; the drawn one and crayon move."""
    assert {"image", "vl"} == set(report["kinds"])
    # The state appears with an adapter's first step, so the first comparison is with the weights.
    previous = report["before"]
    for kind, digests in zip(report["kinds"], report["steps"], strict=True):
        idle = {"image": "vl", "vl": "image"}[kind]
        assert digests[idle] == previous[idle]
        assert digests[kind] != previous[kind]
        previous = digests


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model that one process trains on the same samples."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train_ddp(folder, [])
    return saved(folder)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    model = CollavoForConditionalGeneration.from_pretrained(folder / "model")
    return dict(model.state_dict())


def check_same_training(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Equal up to the order of float32 sums: 1e-4 of values that six steps of 1e-2 have moved."""
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype == torch.uint8:
            assert torch.equal(one[name], two[name])
        else:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_two_processes_ddp(tmp_path: Path, single: dict[str, torch.Tensor]) -> None:
    ranks = launch("ddp", tmp_path / "run")
    assert ranks[0] == ranks[1]
    check_idle_adapters(ranks[0])
    check_same_training(saved(tmp_path / "run"), single)


def test_a_check_that_fails_on_one_process_ends_all(tmp_path: Path) -> None:
    """Else the others wait for it until their launcher gives up; the one says why.

    And one that clears up does not take the file that another tries just then.
    """
    ends = launch("refuse", tmp_path / "run")
    for rank, failing in ((1, 0), (0, 1)):
        own, other = ends[rank][failing], ends[1 - rank][failing]
        assert own.startswith("0 steps: output_dir: this run could not save")
        assert own.endswith(f"process {rank} may not write")
        assert other.startswith(f"0 steps: output_dir: process {rank} could not save in")
    assert ends[0][2] == ends[1][2] == "1 steps"
    sealed = json.loads((tmp_path / "run/model/checkpoint-1/collavo_streams.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed["files"].keys()


def test_two_processes_fsdp2(tmp_path: Path, single: dict[str, torch.Tensor]) -> None:
    ranks = launch("fsdp2", tmp_path / "run")
    assert ranks[0]["kinds"] == ranks[1]["kinds"]
    for report in ranks:
        check_idle_adapters({**report, "before": report["steps"][0], **skip_first(report)})
    check_same_training(saved(tmp_path / "run"), single)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one process makes of nine records with images and six without."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    train_mixed_ddp(folder, [])
    return saved(folder)


@pytest.mark.parametrize("kind", ["mixed_ddp", "mixed_fsdp2"])
def test_two_processes_with_and_without_images(
    tmp_path: Path, mixed: dict[str, torch.Tensor], kind: str
) -> None:
    """They finish: no process waits for another in the tower, nor has an empty batch.

    And they train what one process trains with the same global batch.
    """
    ranks = launch(kind, tmp_path / "run")
    assert all(len(report["steps"]) == MIXED_STEPS for report in ranks)
    idle = [step["vl"] for report in ranks for step in report["steps"]]
    assert len(set(idle)) == (1 if kind == "mixed_ddp" else 2)  # a shard for each process
    check_same_training(saved(tmp_path / "run"), mixed)


def skip_first(report: dict[str, Any]) -> dict[str, Any]:
    """A shard has no digest from before sharding: compare from the second step on."""
    return {"kinds": report["kinds"][1:], "steps": report["steps"][1:]}
