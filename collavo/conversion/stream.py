"""A plan carried out: tensors read, made and written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from collavo.conversion.plan import Entry, Header, Plan

_LARGEST_SHARD = 5_000_000_000
_SMALLEST_LIMIT = 50_000_000


class Weights(Protocol):
    """A source's tensors: their headers, and each read when it is asked for.

    Attributes:
        headers: The tensors by name.
        largest: Bytes of the largest file.
    """

    headers: Mapping[str, Header]
    largest: int

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


def shard_limit(source: Weights) -> int:
    """Return how many bytes a written shard may have, but for one with a single entry.

    The pages of a torch file that were read stay in memory beside the shard that is made, so this
    is less than the largest source file has: both and what is being made stay below twice that.

    Args:
        source: What is converted.
    """
    return min(_LARGEST_SHARD, max(_SMALLEST_LIMIT, source.largest * 3 // 4))


def shards_of(plan: Plan, limit: int) -> list[list[Entry]]:
    """Cut a plan into the shards that it is written in, in its order.

    Args:
        plan: What to write.
        limit: Bytes of a shard; an entry that has more is a shard by itself.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in plan.entries:
        own = entry.size
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += own
    return shards


def write(
    plan: Plan, source: Weights, target: Path, *, told: Callable[[int], object] | None = None
) -> None:
    """Write a plan's tensors as safetensors, in one file or in shards with their index.

    Args:
        plan: What to write.
        source: What it is made of.
        target: The folder to write to, which is there.
        told: Called with the planned bytes of each entry that was made.

    Raises:
        ValueError: naming a source file that cannot be read any more.
        OSError: naming the file that cannot be written.
    """
    shards = shards_of(plan, shard_limit(source))
    placed: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards, 1):
        name = SAFE_WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _made(entries, source, told)
        _save(tensors, target / name)
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard is made
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _made(
    entries: Iterable[Entry], source: Weights, told: Callable[[int], object] | None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for entry in entries:
        given = [source.read(name) for name in entry.sources]
        # A torch file's mapping, with all its pages that were read, lives as long as a view of it.
        mapped = {tensor.untyped_storage().data_ptr() for tensor in given}
        for output, tensor in zip(entry.outputs, entry.make(*given), strict=True):
            if not output.allows(tensor):
                raise RuntimeError(
                    f"{output.name}: planned as {output.dtype} {list(output.shape)}, made as "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            tensors[output.name] = _alone(tensor, seen | mapped)
            seen.add(tensors[output.name].untyped_storage().data_ptr())
        if told is not None:
            told(entry.size)
    return tensors


def _alone(tensor: Tensor, others: Collection[int]) -> Tensor:
    """Return a tensor that has its storage for itself: safetensors writes no other."""
    storage = tensor.untyped_storage()
    whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
    if whole and storage.data_ptr() not in others:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
