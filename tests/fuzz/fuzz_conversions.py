"""Random official folders: there and back bit for bit, or refused in one sentence.

``python -m tests.fuzz.fuzz_conversions --seconds 120 --seed 0`` runs until the time is over. A case
is a model of random sizes in random files of one of two formats, whole or damaged in one place;
where it is refused, nothing may have been written.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from collavo import load_pretrained
from collavo.conversion import Options, convert_folder
from tests.collavo.conversion.official_folder import (
    ENDINGS,
    Sizes,
    official_config,
    official_tensors,
    read_folder,
)
from tests.fuzz.command_line import run_for_a_time

DEAD = ".feed_forward.w2.Plora_seg_"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ConversionCase:
    """A folder and what is wrong with it."""

    seed: int
    sizes: Sizes
    dtype: torch.dtype
    kind: str
    files: int
    damage: str | None
    quantize: bool


def draw(rng: random.Random) -> ConversionCase:
    """Draw a case; one in three is whole."""
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.randint(1, 3)
    words = rng.randint(3, 40)
    sizes = Sizes(
        hidden=heads * rng.choice((2, 4, 6)) * 2,
        inner=rng.randint(1, 40) * 2,
        layers=rng.randint(1, 3),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=words,
        rows=words + rng.randint(0, 1),
        rank=rng.randint(1, 5),
        bias=rng.random() < 0.4,
        width=rng.choice((8, 16, 64)),
        vision_layers=rng.randint(1, 2),
        grid=rng.randint(1, 4),
        patch=rng.choice((2, 3, 14)),
        classes=rng.randint(1, 9),
        numbers=rng.randint(1, 4),
    )
    damage = rng.choice((*TENSOR_DAMAGES, *FILE_DAMAGES)) if rng.random() < 0.67 else None
    files = rng.randint(2 if damage in FILE_DAMAGES else 1, 6)
    kind, dtype = rng.choice(tuple(ENDINGS)), rng.choice(DTYPES)
    return ConversionCase(
        rng.randrange(1 << 30), sizes, dtype, kind, files, damage, rng.random() < 0.2
    )


def check(case: ConversionCase) -> str:
    """Run a case and say how it ended; what is neither equal nor refused is an AssertionError."""
    root = Path(tempfile.mkdtemp())
    try:
        return _check(case, root)
    finally:
        shutil.rmtree(root)


def _check(case: ConversionCase, root: Path) -> str:
    rng = random.Random(case.seed)
    tensors = official_tensors(case.sizes, case.seed, case.dtype)
    given = dict(tensors)
    if case.damage in TENSOR_DAMAGES:
        TENSOR_DAMAGES[case.damage](given, rng)
    _write(root / "official", given, official_config(case.sizes), case, rng)
    if case.damage in FILE_DAMAGES:
        FILE_DAMAGES[case.damage](sorted((root / "official").glob("*-of-*")), rng)
    options = Options(quantize="nf4" if case.quantize else None)
    try:
        convert_folder(root / "official", root / "own", options)
    except (ValueError, FileNotFoundError) as error:
        assert case.damage is not None, f"a whole folder was refused: {error}"
        assert "\n" not in str(error), f"more than a line: {error}"
        assert not (root / "own").exists(), "something was written"
        return "refused"
    assert case.damage is None, "a damaged folder was converted"
    load_pretrained(root / "own")
    if case.quantize:
        return "in 4 bits"
    convert_folder(root / "own", root / "back", to_official=True)
    found = read_folder(root / "back")
    assert set(found) == set(tensors), set(found) ^ set(tensors)
    for name, value in tensors.items():
        wanted = torch.zeros_like(value) if DEAD in name else value
        assert found[name].dtype == value.dtype and torch.equal(found[name], wanted), name
    return "there and back"


def _write(
    folder: Path, tensors: Tensors, values: Any, case: ConversionCase, rng: random.Random
) -> None:
    """Write tensors in random files, each with one at least."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save: Callable[[Tensors, Path], object] = (
        save_file if case.kind == "safetensors" else torch.save
    )
    single = ENDINGS[case.kind]
    if case.files == 1:
        save(tensors, folder / single)
        return
    stem, ending = single.rsplit(".", 1)
    files = [f"{stem}-{n:05d}-of-{case.files:05d}.{ending}" for n in range(1, case.files + 1)]
    names = rng.sample(sorted(tensors), len(tensors))
    placed = dict(zip(names, files, strict=False))
    placed |= {name: rng.choice(files) for name in names[len(files) :]}
    for file in files:
        save({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{single}.index.json").write_text(json.dumps(index))


def _lose(tensors: Tensors, rng: random.Random) -> None:
    del tensors[rng.choice(sorted(tensors))]


def _add(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((f"{name}.more", f"extra.{name}", name[1:]))] = tensors[name].clone()


def _rename(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name.replace(".", "_", 1)] = tensors.pop(name)


def _reshape(tensors: Tensors, rng: random.Random) -> None:
    # A row of the embeddings or a cell of the tables more is another model's, and a whole one.
    names = sorted(n for n in tensors if "layers." in n or n.startswith(("vision_proj", "model.n")))
    name = rng.choice(names)
    value = tensors[name]
    ways = [value[:-1].clone(), torch.cat([value, value[:1]]), value[None].clone()]
    tensors[name] = rng.choice(ways)


def _count(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(rng.choice((torch.int8, torch.int64, torch.bool)))


def _cut(files: list[Path], rng: random.Random) -> None:
    file = rng.choice(files)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _remove(files: list[Path], rng: random.Random) -> None:
    rng.choice(files).unlink()


def _swap(files: list[Path], rng: random.Random) -> None:
    first, second = rng.sample(files, 2)
    first.write_bytes(second.read_bytes())


def _put_beside(files: list[Path], rng: random.Random) -> None:
    shutil.copyfile(rng.choice(files), files[0].with_name(files[0].name.replace("00001", "00009")))


TENSOR_DAMAGES: dict[str, Callable[[Tensors, random.Random], None]] = {
    "missing": _lose,
    "surplus": _add,
    "renamed": _rename,
    "shape": _reshape,
    "integers": _count,
}
FILE_DAMAGES: dict[str, Callable[[list[Path], random.Random], None]] = {
    "truncated": _cut,
    "missing shard": _remove,
    "swapped shard": _swap,
    "surplus shard": _put_beside,
}


def main() -> int:
    """Run from the command line."""
    torch.set_num_threads(1)  # the cases are tiny
    logging.disable(logging.WARNING)
    return run_for_a_time(__doc__, draw, check)


if __name__ == "__main__":
    sys.exit(main())
