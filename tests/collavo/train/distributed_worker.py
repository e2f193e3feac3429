"""One of two processes: trains the tiny model by DDP (Trainer) or FSDP2 (a loop of its own).

Usage: ``distributed_worker.py {ddp,fsdp2,mixed_ddp,mixed_fsdp2,refuse} FOLDER`` with RANK,
WORLD_SIZE and the address in the environment. Writes ``FOLDER/rank<R>.json``; rank 0 saves the
model in ``FOLDER/model``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_collavo import CollavoRecords, MixedRecords, make_collavo
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate
from transformers import TrainerCallback

from collavo import writing
from collavo.train import safe_saves, saving
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.grouping import GroupedSampler
from collavo.train.sampler import StepSampler, join
from collavo.train.schedule import StepSchedule
from collavo.train.sharding import full_state_dict, replicated_parameters
from collavo.train.stages import drop_idle_gradients, drop_unreached_gradients, prepare_stage
from collavo.train.streams import GroupedStreams, StepCollator
from collavo.train.trainer import CollavoTrainer

STEPS, STEP_SIZE, SEED, RATE = 6, 4, 3, 1e-2
# With the usual epsilon Adam turns the rounding of a near-zero gradient into a whole step.
EPSILON = 1e-2


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash this rank's own bytes of some tensors."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total.update(local.detach().numpy().tobytes())
    return total.hexdigest()


def digests(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, str]:
    """Hash crayon and adapters, each with its optimizer state."""
    groups = {name: list(model.adapter_parameters(name)) for name in ("image", "vl")}
    groups["crayon"] = list(model.crayon_parameters())
    result = {}
    for name, parameters in groups.items():
        held = {} if optimizer is None else optimizer.state
        moments = [v for p in parameters for v in held.get(p, {}).values()]
        result[name] = digest([*parameters, *(torch.as_tensor(v) for v in moments)])
    return result


def datasets() -> tuple[CollavoRecords, CollavoRecords]:
    """Every second VL record has no image: in some steps one rank has an image, the other none."""
    return CollavoRecords("image"), CollavoRecords("vl", text_every=2)


class Watch(TrainerCallback):
    def __init__(self, log: list[dict[str, str]]) -> None:
        self.log = log

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(digests(kwargs["model"], kwargs["optimizer"].optimizer))


def ddp_trainer(folder: Path, **changes: Any) -> CollavoTrainer:
    options = {
        "output_dir": str(folder / "model"),
        "stage": "cit",
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": STEP_SIZE // int(os.environ.get("WORLD_SIZE", "1")),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_epsilon": EPSILON,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "disable_tqdm": True,
        "seed": SEED,
    }
    args = CollavoTrainingArguments(**{**options, **changes})
    return CollavoTrainer(make_collavo(), args, *datasets())


def train_ddp(folder: Path, log: list[dict[str, str]]) -> Any:
    trainer = ddp_trainer(folder)
    trainer.add_callback(Watch(log))
    trainer.train()
    trainer.save_model()
    return trainer.model


def refuse_ddp(folder: Path) -> list[str]:
    """Let the check fail on each process in turn, then on none, and say how each run ended.

    In the last run the first process clears up late, and the other is slow to try its file.
    """
    rank, ends = int(os.environ["RANK"]), []
    real = writing.check_file, saving.check_saving

    def fail(*_: Any) -> None:
        raise PermissionError(f"process {rank} may not write")

    def after(seconds: float, work: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (time.sleep(seconds), work(*args))[1]

    for failing in (1, 0, None):
        trainer = ddp_trainer(folder, save_strategy="steps", save_steps=1, max_steps=1)
        writing.check_file, safe_saves.check_saving = (  # type: ignore[assignment]
            (fail, fail) if failing == rank else real
        )
        if failing is None and rank == 0:
            writing.settle = after(0.5, writing.settle)
        elif failing is None:
            writing._put = after(1.0, writing._put)
        try:
            trainer.train()
            ends.append(f"{trainer.state.global_step} steps")
        except saving.SaveError as error:
            ends.append(f"{trainer.state.global_step} steps: {error}")
    return ends


def optimizer_of(model: Any) -> torch.optim.AdamW:
    """As Trainer makes it: matrices alone decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, eps=EPSILON)


def train_fsdp2(folder: Path, log: list[dict[str, str]]) -> Any:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = make_collavo()
    prepare_stage(model, "cit")
    mesh = init_device_mesh("cpu", (world,))
    whole = replicated_parameters(model)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    optimizer = optimizer_of(model)
    data, schedule = join(*datasets()), StepSchedule(SEED, 0.5)
    sizes = {"image": 8, "vl": 8}
    indices = [
        i for step in (0, 4) for i in StepSampler(schedule, sizes, 4, SEED, lambda s=step: s)
    ]
    accumulation = STEP_SIZE // world
    model.train()
    for step in range(STEPS):
        for micro in range(accumulation):
            model.set_requires_gradient_sync(micro == accumulation - 1)
            position = STEP_SIZE * step + micro * world + rank
            loss = model(**default_collate([data[indices[position]]])).loss / accumulation
            loss.backward()
        drop_idle_gradients(model, schedule.kind(step))
        optimizer.step()
        optimizer.zero_grad()
        log.append(digests(model, optimizer))
    full = full_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=full)
    dist.barrier()
    return model


# Nine records with images and six without: of the last step with images one process has nothing.
MIXED = {"size": 15, "texts_of_five": 2}
MIXED_STEPS, PARTS = 10, ("projector", "adapters", "crayon")


def train_mixed_ddp(folder: Path, log: list[dict[str, str]]) -> Any:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = CollavoTrainingArguments(
        output_dir=str(folder / "model"),
        stage="instruct",
        parts=list(PARTS),
        adapters=["image"],
        global_batch=STEP_SIZE,
        per_device_train_batch_size=1,
        num_train_epochs=2,
        learning_rate=RATE,
        projector_learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0.0,
        weight_decay=0.1,
        adam_epsilon=EPSILON,
        max_grad_norm=0.0,
        bf16=False,
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        disable_tqdm=True,
        report_to="none",
        seed=SEED,
    )
    trainer = CollavoTrainer(make_collavo(), args, MixedRecords(**MIXED))
    trainer.add_callback(Watch(log))
    trainer.train()
    trainer.save_model()
    return trainer.model


def train_mixed_fsdp2(folder: Path, log: list[dict[str, str]]) -> Any:
    """A loop of its own, as one by hand would be, over the same steps."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = make_collavo()
    prepare_stage(model, "instruct", PARTS, ["image"])
    mesh = init_device_mesh("cpu", (world,))
    whole = replicated_parameters(model)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    optimizer = optimizer_of(model)
    streams = GroupedStreams.open(MixedRecords(**MIXED), STEP_SIZE, SEED)
    schedule, data, collate = streams.schedule, streams.dataset, StepCollator(default_collate)
    assert data is not None
    model.train()
    micros = STEP_SIZE // world
    for step in range(MIXED_STEPS):
        places = list(GroupedSampler(schedule, world, micros, 1, lambda s=step: s))  # type: ignore[misc]
        first = step % schedule.steps_per_epoch * STEP_SIZE
        batches = [collate([data[place]]) for place in places[first : first + STEP_SIZE]]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for micro in range(micros):
            model.set_requires_gradient_sync(micro == micros - 1)
            batch = batches[micro * world + rank]
            loss = model(**batch, num_items_in_batch=tokens).loss * world
            loss.backward()
        drop_unreached_gradients(model, schedule.kind(step))
        optimizer.step()
        optimizer.zero_grad()
        log.append(digests(model, optimizer))
    full = full_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=full)
    dist.barrier()
    return model


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    log: list[dict[str, str]] = []
    if kind == "refuse":
        (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(refuse_ddp(folder)))
        dist.barrier()
        os._exit(0)
    work = {
        "ddp": train_ddp,
        "fsdp2": train_fsdp2,
        "mixed_ddp": train_mixed_ddp,
        "mixed_fsdp2": train_mixed_fsdp2,
    }
    model = work[kind](folder, log)
    schedule = StepSchedule(SEED, 0.5)
    report = {
        "kinds": [schedule.kind(step) for step in range(STEPS)],
        "before": digests(make_collavo(), None),
        "steps": log,
        "all": digest(model.state_dict().values()) if "ddp" in kind else "",
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    # Threads of gloo can outlive the group, and the interpreter's end then sometimes aborts.
    os._exit(0)


if __name__ == "__main__":
    main()
