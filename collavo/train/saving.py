"""Saving is tried before the first step; where it fails at the end, trained tensors are rescued."""

from __future__ import annotations

import math
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from collavo import writing
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.checkpoint import checkpoints
from collavo.train.exports import parts_size
from collavo.train.trained_only import trained_parameters


class SaveError(OSError):
    """A model could not be saved; the message says where its trained tensors are instead."""


class SaveCheck(TrainerCallback):
    """Calls a check when all is known and nothing is trained.

    Args:
        check: Raises if the run could not save.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Check before the first step."""
        self.check()


def check_saving(
    model: nn.Module,
    args: CollavoTrainingArguments,
    state: TrainerState,
    save: Callable[[str, dict[str, Tensor]], None],
) -> None:
    """Save a small model into the output folder the same way, and compare sizes with the disk.

    Nothing of it stays.

    Args:
        model: It and what the optimizer will hold for it, taken as two float32 numbers for each
            that is trained, give the size of a save.
        args: The output folder, and when checkpoints are written.
        state: How many steps are ahead.
        save: Writes everything of a save into a folder, with the tensors that it is handed.

    Raises:
        OSError: naming what cannot be written, or the space that is wanted and found.
        Exception: whatever else makes ``save`` fail.
    """
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    # A name that ``settle`` removes if this one is killed.
    probe = folder / f".collavo-{secrets.token_hex(8)}.partial"
    try:
        with writing.written_folder(probe, ()) as partial, _without_bars():
            save(str(partial), {"probe": torch.zeros(1)})
        names = [path.relative_to(probe) for path in probe.rglob("*") if path.is_file()]
        rest = sum((probe / name).stat().st_size for name in names)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name}: expected no folder, a file is saved there")
    weights, trained = _bytes(model.parameters(), model.buffers()), trained_parameters(model)
    optimizer = 0 if args.save_only_model else 8 * sum(p.numel() for p in trained.values())
    count = _checkpoints_ahead(args, state, folder)
    each = weights
    if args.save_trained_only:  # the last one and the model itself have the parts for others too
        each = _bytes(trained.values())
        rest += parts_size(model)
    total = 2 * (rest + weights) if args.save_trained_only and count else rest + weights
    total += count * (rest + each + optimizer)
    try:
        writing.check_size(folder, total, max(weights, optimizer if count else 0))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}, for a model and {count} checkpoints; use another output_dir, or "
            "keep fewer checkpoints with save_total_limit",
            error.filename,
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    # A bar of "Writing model shards" before the first step would puzzle.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def rescue(
    model: nn.Module,
    folder: Path,
    error: BaseException,
    tensors: Mapping[str, Tensor] | None = None,
) -> SaveError:
    """Write what was trained where it can be written, and return the error that says where.

    The first of the folder, its parent and the system's temporary folder that takes them gets the
    tensors. ``model.load_state_dict(load_file(path), strict=False)`` brings them back, for a model
    with the same adapters.

    Args:
        model: Its parameters that require gradients are taken.
        folder: Into which the model could not be saved.
        error: Why.
        tensors: Values by name that stand for the model's own; needed where those are shards.
    """
    held = dict(tensors or {})
    places = (folder, folder.resolve().parent, Path(tempfile.gettempdir()))
    begin, faults = f"{folder}: could not be saved ({in_a_line(error)})", []
    for place in places:
        path = place / f"trained_tensors-{secrets.token_hex(4)}.safetensors"
        try:
            place.mkdir(parents=True, exist_ok=True)
            trained = {
                name: held.get(name, parameter).detach().cpu().contiguous()
                for name, parameter in trained_parameters(model).items()
            }
            with writing.written_file(path) as temporary:
                save_file(trained, temporary, metadata={"format": "pt"})
        except Exception as fault:  # whatever it is, the next place is tried
            faults.append(f"{place}: {in_a_line(fault)}")
        else:
            return SaveError(
                f"{begin}; the trained tensors are in {path}: "
                "model.load_state_dict(safetensors.torch.load_file(path), strict=False) brings "
                "them into the model that training began with, once it has the same adapters "
                "(add_dual_qlora with the run's ranks); see that nothing is unexpected"
            )
    return SaveError(
        f"{begin}, and the trained tensors could be written nowhere ({'; '.join(faults)})"
    )


def in_a_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, or else its name.

    Args:
        error: Any.
    """
    return " ".join((str(error) or type(error).__name__).split())


def _bytes(*tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in chain(*tensors))


def _checkpoints_ahead(args: CollavoTrainingArguments, state: TrainerState, folder: Path) -> int:
    """Count the checkpoints that will be there at once beside those that are there."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    count = 1
    if strategy == "steps" and state.save_steps:
        count = math.ceil((state.max_steps - state.global_step) / state.save_steps)
    elif strategy == "epoch":
        count = math.ceil(state.num_train_epochs - (state.epoch or 0.0))
    if args.save_total_limit:
        # One goes when its successor is whole.
        count = min(count, args.save_total_limit + 1 - len(checkpoints(folder)))
    return max(count, 1)
