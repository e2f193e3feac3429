"""Random damage of model folders: the model that was saved, or one error that says what is wrong.

``python -m tests.fuzz.fuzz_model_folders --seconds 120 --seed 0`` runs until the time is over or a
case fails, and prints the case. A case is a saved model, what happened to its folder, and a way to
load it.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "collavo"), str(TESTS / "collavo" / "model")]
from tiny_crayon_model import make_batch, make_model, make_patched  # noqa: E402

from collavo import load_pretrained  # noqa: E402
from collavo.model.llava import CollavoForConditionalGeneration  # noqa: E402
from tests.fuzz.command_line import seconds_and_seed  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"adapters": ("image",)},
    "projection": {"crayon_mode": "projection"},
    "nf4": {"quantize": "nf4", "adapters": ("image", "vl")},
    "nf4 single": {"quantize": "nf4", "double_quant": False},
    "patched": {"quantize": "nf4", "adapters": ("image", "vl"), "lora_rank": 4},
}
FORMS: dict[str, dict[str, str]] = {"one file": {}, "shards": {"max_shard_size": "40KB"}}
CLEAR = (ValueError, FileNotFoundError, OSError)


LOADERS: dict[str, Callable[[Path, Any], Any]] = {
    "load_pretrained": lambda folder, _: load_pretrained(folder),
    "from_pretrained": lambda f, _: CollavoForConditionalGeneration.from_pretrained(f),
    "config": lambda f, c: CollavoForConditionalGeneration.from_pretrained(f, config=c),
    "auto": lambda f, _: AutoModelForImageTextToText.from_pretrained(f),
}


@dataclass(frozen=True)
class FolderCase:
    """One folder; plain values only, so that it can be written down and run again.

    Attributes:
        seed: Of what is drawn on the way.
        kind: One of KINDS.
        form: One of FORMS.
        damage: One of DAMAGES.
        loader: One of LOADERS.
    """

    seed: int
    kind: str
    form: str
    damage: str
    loader: str


@cache
def saved(kind: str, trained: int) -> tuple[Any, Tensor]:
    """Return a model, by how often it was trained, and its logits."""
    model: Any = make_patched(**KINDS[kind]) if kind == "patched" else make_model(**KINDS[kind])
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1 + 0.1 * trained)
    with torch.no_grad():
        return model, model(**make_batch()).logits


def _weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("model*.safetensors")))


def _truncate(folder: Path, rng: random.Random, case: FolderCase) -> None:
    file = rng.choice(sorted(path for path in folder.iterdir()))
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _remove(folder: Path, rng: random.Random, case: FolderCase) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def _add_file(folder: Path, rng: random.Random, case: FolderCase) -> None:
    other = folder / "other"
    saved(case.kind, 1)[0].save_pretrained(other, **rng.choice(list(FORMS.values())))
    file = rng.choice(sorted(other.iterdir()))
    names = (
        file.name,
        "model.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00009.safetensors",
    )
    target = folder / rng.choice(names)
    if not target.exists():
        shutil.copy(file, target)
    shutil.rmtree(other)


def _exchange(folder: Path, rng: random.Random, case: FolderCase) -> None:
    """Copy a weight file over another, or exchange two."""
    first, second = _weights(folder, rng), _weights(folder, rng)
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    if rng.random() < 0.5:
        first.write_bytes(kept)


def _change_tensor(folder: Path, rng: random.Random, case: FolderCase) -> None:
    file = _weights(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    changes: list[dict[str, Tensor]] = [
        {},
        {name + "s": value},
        {name.replace("language_model.", "language_model.model."): value},
        {name: value.to(torch.int32)},
        {name: value.to(torch.float8_e4m3fn)} if value.is_floating_point() else {},
        {name: value.flatten()[:-1].clone()},
        {name: value[None].clone()},
        {name: value, "surplus.weight": value.clone()},
        {name: value.bool()},
    ]
    save_file(tensors | rng.choice(changes), file, {"format": "pt"})


def _change_facts(folder: Path, rng: random.Random, case: FolderCase) -> None:
    """Change what a 4-bit weight says of itself."""
    file = _weights(folder, rng)
    tensors = load_file(file)
    names = sorted(name for name in tensors if ".quant_state." in name)
    if not names:
        return _change_tensor(folder, rng, case)
    name = rng.choice(names)
    facts = json.loads(bytes(tensors.pop(name).tolist()))
    change: tuple[str, Any] = rng.choice(
        [
            ("quant_type", "fp4"),
            ("blocksize", 128),
            ("blocksize", 63),
            ("dtype", "int8"),
            ("shape", [1, 2]),
            ("nested_blocksize", 64),
            ("nested_offset", None),
        ]
    )
    text = rng.choice([json.dumps(facts | dict([change])), "no JSON", "[]"]).encode()
    renamed = name.replace("nf4", "fp4") if rng.random() < 0.3 else name
    tensors[renamed] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    return None


def _change_index(folder: Path, rng: random.Random, case: FolderCase) -> None:
    path = folder / "model.safetensors.index.json"
    files = sorted(file.name for file in folder.glob("model*.safetensors"))
    index: Any = {"metadata": {}, "weight_map": {"lm_head.weight": files[0]}}
    if path.is_file():
        index = json.loads(path.read_text())
    name = rng.choice(sorted(index["weight_map"]))
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / files[-1], outside)
    for target in rng.sample(
        ["../outside.safetensors", str(outside), files[0], files[-1], "none.safetensors", 3, ""], 2
    ):
        index["weight_map"][name] = target
    if rng.random() < 0.3:
        del index["weight_map"][name]
    if rng.random() < 0.1:
        index = rng.choice([[], {}, {"weight_map": {}}, {"metadata": {}, "weight_map": []}])
    path.write_text(json.dumps(index))


def _change_settings(folder: Path, rng: random.Random, case: FolderCase) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    name, value = rng.choice(
        [
            ("quantize", "fp4"),
            ("quantize", None if "nf4" in case.kind else "nf4"),
            ("double_quant", case.kind == "nf4 single"),
            ("quant_block_size", 128),
            ("quantization_config", {"load_in_4bit": True, "quant_method": "bitsandbytes"}),
            ("quantization_config", {"quant_method": "invented"}),
            ("adapters", ["image", "vl", "third"]),
            ("adapters", []),
            ("lora_rank", 5),
            ("crayon_mode", "none"),
            ("crayon_mode", "attention" if case.kind == "projection" else "projection"),
            # Automatically that is transformers' own class, which reads what it knows.
            ("model_type", "collavo_text" if case.loader == "auto" else "llava"),
            ("model_type", "invented"),
            ("num_hidden_layers", 1),
            ("num_hidden_layers", 3),
            ("hidden_size", 64),
            ("vocab_size", 33),
            ("extra_embeddings", 1),
            ("transformers_weights", "other.safetensors"),
            ("crayon", {}),
            ("crayon", {"decoder": {"adapters": ["image"]}}),
        ]
    )
    # A patched model's folder has its own configuration in one of its fields.
    text = (config.get("base_config") or config)["text_config"]
    if name in text and name != "model_type":
        text[name] = value
    else:
        config[name] = value
    path.write_text(json.dumps(config))


def _save_again(folder: Path, rng: random.Random, case: FolderCase) -> None:
    """Save another model into the folder, by this package or as transformers alone would."""
    model = saved(case.kind, 1)[0]
    options: dict[str, Any] = dict(rng.choice([*FORMS.values(), {"max_shard_size": "70KB"}]))
    if rng.random() < 0.5:
        model.save_pretrained(folder, **options)
    else:
        save = LlavaForConditionalGeneration.save_pretrained
        save(model, folder, save_original_format=False, **options)


def _break_off(folder: Path, rng: random.Random, case: FolderCase) -> None:
    """Save another model, and fail at one of its files."""
    left = rng.randrange(3)

    def failing(*arguments: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        save_file(*arguments, **options)

    with mock.patch("transformers.modeling_utils.safe_save_file", failing):
        try:
            _save_again(folder, rng, case)
        except OSError:
            return


DAMAGES: dict[str, Callable[[Path, random.Random, FolderCase], None]] = {
    "truncated": _truncate,
    "missing": _remove,
    "extra": _add_file,
    "exchanged": _exchange,
    "tensor": _change_tensor,
    "facts": _change_facts,
    "index": _change_index,
    "settings": _change_settings,
    "twice": _save_again,
    "broken off": _break_off,
}


def draw(rng: random.Random) -> FolderCase:
    """Draw a case."""
    kind, form, damage, loader = (
        rng.choice(list(table)) for table in (KINDS, FORMS, DAMAGES, LOADERS)
    )
    # Where a patched model's folder says it is a LLaVA, others are transformers' own classes.
    loader = "load_pretrained" if kind == "patched" else loader
    return FolderCase(rng.randrange(2**32), kind, form, damage, loader)


def run(case: FolderCase, folder: Path) -> str:
    """Run a case and return how it ended.

    Raises:
        AssertionError: if the folder gave another model than the one that was saved, or an error
            that does not say what is wrong.
    """
    rng = random.Random(case.seed)
    model, logits = saved(case.kind, 0)
    later = saved(case.kind, 1)[1]
    target = folder / "model"
    model.save_pretrained(target, **FORMS[case.form])
    DAMAGES[case.damage](target, rng, case)
    try:
        loaded = LOADERS[case.loader](target, model.config)
    except CLEAR as error:
        assert 20 < len(str(error)) < 2000, f"{type(error).__name__}: {error}"
        return f"{case.damage}: refused"
    with torch.no_grad():
        found = loaded(**make_batch()).logits
    # A save that was broken off leaves the one or the other; a whole one is the last.
    allowed = {"twice": [later], "broken off": [logits, later]}.get(case.damage, [logits])
    assert any(torch.equal(found, one) for one in allowed), "another model, silently"
    return f"{case.damage}: the model"


def run_cases(seed: int, *, cases: int = 0, seconds: float = 0.0) -> Counter[str]:
    """Run a number of cases, or as many as fit into a time; return how they ended.

    Raises:
        AssertionError: with the case in its message.
    """
    rng, ends, start = random.Random(seed), Counter[str](), time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    while sum(ends.values()) < cases or time.monotonic() - start < seconds:
        case = draw(rng)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ends[run(case, Path(folder))] += 1
            except Exception as error:
                number = sum(ends.values())
                raise AssertionError(
                    f"seed {seed}, case {number}, {case}: {type(error).__name__}: {error}"
                ) from error
    return ends


def main() -> None:
    """Run from the command line."""
    seconds, seed = seconds_and_seed(__doc__)
    torch.set_num_threads(1)  # the cases are tiny
    for end, count in sorted(run_cases(seed, seconds=seconds).items()):
        print(f"{count:6d} {end}")


if __name__ == "__main__":
    main()
