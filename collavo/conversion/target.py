"""The target of a conversion: claimed, checked, and written as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from tqdm.auto import tqdm
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from collavo import writing
from collavo.configuration import CollavoLlavaConfig
from collavo.conversion.changes import in_4_bits, in_dtype, say_dtypes, usual_dtype
from collavo.conversion.kinds import Options
from collavo.conversion.plan import Plan
from collavo.conversion.stream import Weights, shard_limit, shards_of, write
from collavo.model.files import sign_index

# What a file system puts into a folder that it is mounted at.
_MOUNTED = ("lost+found",)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Args:
        title: What the source is.
        target: The folder that was written.
        size: Bytes of its tensors.
        dtype: Of most of them, before ``--quantize``.
        notes: What was dropped, added or left out.
    """

    title: str
    target: Path
    size: int
    dtype: str
    notes: tuple[str, ...]

    def with_note(self, sentence: str) -> Conversion:
        """Return it with one note more.

        Args:
            sentence: Without a full stop.
        """
        return replace(self, notes=(*self.notes, sentence))

    def summary(self) -> str:
        """Return it in words, a line for each note."""
        lines = [f"{self.target}: {self.title}, {self.size / 1e6:.1f} MB, {self.dtype}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def write_target(
    title: str,
    target: Path,
    planned: tuple[Any, Plan],
    weights: Weights,
    options: Options,
    write_companions: Callable[[Path, Any], None],
    *,
    progress: bool = False,
) -> Conversion:
    """Write a model folder of a plan; all that can be refused is, before the first byte.

    Args:
        title: What the source is.
        target: A new or empty folder.
        planned: ``config.json`` and the plan, as ``SourceKind.plan`` gives them.
        weights: The source's tensors.
        options: Of which ``dtype`` and ``quantize`` are done here.
        write_companions: ``write_companions(folder, config)`` writes what lies beside weights and
            configuration, to a folder that becomes the target.
        progress: Whether to show a bar.

    Raises:
        OSError: naming the file that cannot be written.
        ValueError: naming what does not fit, or the target if it is not empty.
    """
    config, plan = planned
    if options.dtype is not None:
        plan = in_dtype(plan, options.dtype)
    dtype = usual_dtype(plan)
    config = say_dtypes(config, plan)
    if options.quantize is not None:
        plan = in_4_bits(plan, plan.decoder, **_block_of(config))
    for check in plan.checks:
        check.look(*(weights.read(name) for name in check.sources))
    size = sum(entry.size for entry in plan.entries)
    with _claimed(target), writing.written_folder(target, ()) as partial:
        # First, since a processor that does not fit shows here.
        write_companions(partial, config)
        shards = shards_of(plan, shard_limit(weights))
        writing.check_size(partial, size, max(sum(e.size for e in shard) for shard in shards))
        with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
            write(plan, weights, partial, told=bar.update)
        sign_index(partial)
        _write_config(config, partial)
    return Conversion(title, target, size, str(dtype).removeprefix("torch."), plan.notes)


def expect_empty(target: Path) -> None:
    """Raise unless a folder is new or empty, but for what a killed conversion left.

    Args:
        target: The folder.

    Raises:
        ValueError: naming it and what it holds.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: expected a new or empty folder, got a file")
    writing.check_settled(target)
    found = sorted(name for name in os.listdir(target) if name not in _MOUNTED)
    for name in found:
        if not writing.is_unfinished(name):
            raise ValueError(
                f"{target}: expected a new or empty folder, it holds {name}; name another one"
            )


@contextmanager
def _claimed(target: Path) -> Iterator[None]:
    """Keep the target for this conversion, and empty it of what a killed one left."""
    with writing.claimed_folder(target):
        expect_empty(target)  # another one may have ended in between
        writing.settle(target)
        yield


def _block_of(config: Any) -> dict[str, Any]:
    if isinstance(config, CollavoLlavaConfig):
        block, double = cast(dict[str, Any], config.crayon)["base"]
        return {"block_size": block, "double_quant": double}
    return {"block_size": config.quant_block_size, "double_quant": config.double_quant}


def _write_config(config: PretrainedConfig | Mapping[str, Any], folder: Path) -> None:
    if isinstance(config, Mapping):
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    else:
        config.save_pretrained(folder)
