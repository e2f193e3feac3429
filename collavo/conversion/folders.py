"""``collavo convert``: from a folder of one layout to a folder of the other."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from tokenizers import AddedToken
from tqdm.auto import tqdm
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from collavo import writing
from collavo._arguments import expect_path
from collavo.configuration import CollavoLlavaConfig
from collavo.conversion.changes import in_4_bits, in_dtype, say_dtypes, usual_dtype
from collavo.conversion.kinds import ImageToken, Options
from collavo.conversion.sources import recognise
from collavo.conversion.stream import shard_limit, shards_of, write
from collavo.conversion.weights import FolderWeights
from collavo.model.files import sign_index
from collavo.processing.chat_templates import IMAGE_TOKEN

_log = logging.getLogger(__name__)
# What a file system puts into a folder that it is mounted at.
_MOUNTED = ("lost+found",)
# What no text has by itself. Image tokens that are added, or were ordinary pieces, are such words.
_MARKED = re.compile(r"""(?!<0x[0-9A-Fa-f]{2}>)[<\[{|][^\s'"\\]+""")


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

    def summary(self) -> str:
        """Return it in words, a line for each note."""
        lines = [f"{self.target}: {self.title}, {self.size / 1e6:.1f} MB, {self.dtype}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def convert_folder(
    source: str | PathLike[str],
    target: str | PathLike[str],
    options: Options | None = None,
    *,
    to_official: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a model folder, told by its ``config.json``, shard by shard.

    All names and shapes are compared before the first byte is written. The target is written under
    a temporary name inside its folder and its ``config.json`` comes last, so that a conversion that
    is killed leaves no folder that loads.

    Args:
        source: The official CoLLaVO or a LLaVA, in safetensors or weights-only torch files; with
            ``to_official`` a folder of this package.
        target: A new or empty folder.
        options: What to change on the way; None changes nothing.
        to_official: Whether to write the official layout.
        progress: Whether to show a bar.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: naming the file that is missing.
        OSError: naming the file that cannot be written.
        ValueError: naming the tensors, file, field or option that does not fit, or the target if it
            is not empty.

    Example:
        >>> convert_folder("no-such-folder", "converted")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such-folder: no such model folder
    """
    options = options or Options()
    expect_path("source", source, "a model folder")
    expect_path("target", target, "a folder")
    source, target = Path(source), Path(target)
    kind, values = recognise(source)
    if kind.gives_official != to_official:
        wanted = "--to-official" if kind.gives_official else "no --to-official"
        raise ValueError(f"{source}: is {kind.title}: expected {wanted}")
    _expect_empty(target)
    weights = FolderWeights(source)
    tokenizer = kind.read_tokenizer(source)
    image_token = None
    if not kind.gives_official:
        options, image_token = _find_image_token(tokenizer, options, kind.image_token_id(values))
    config, plan = kind.plan(str(source), weights.headers, values, options, image_token)
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
        kind.write_companions(source, partial, config, tokenizer)
        shards = shards_of(plan, shard_limit(weights))
        writing.check_size(partial, size, max(sum(e.size for e in shard) for shard in shards))
        with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
            write(plan, weights, partial, told=bar.update)
        sign_index(partial)
        _write_config(config, partial)
    notes = plan.notes
    if tokenizer is None and not to_official:
        notes = (*notes, "no tokenizer was found, so no processor is written")
    if (source / ADAPTER_CONFIG_NAME).is_file():
        notes = (*notes, f"{ADAPTER_CONFIG_NAME}: the adapter beside the model is not applied")
    name = str(dtype).removeprefix("torch.")
    return Conversion(kind.title, target, size, name, notes)


def _expect_empty(target: Path) -> None:
    """Raise unless a folder is new or empty, but for what a killed conversion left."""
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
        _expect_empty(target)  # another one may have ended in between
        writing.settle(target)
        yield


def _find_image_token(
    tokenizer: Any, options: Options, named: int | None
) -> tuple[Options, ImageToken | None]:
    """Return the tokenizer's image token, added where it has none; ``named`` is its known id."""
    asked = options.image_token
    if isinstance(asked, str) and asked.isdecimal():
        asked = int(asked)
    options = replace(options, image_token=asked)
    if tokenizer is None:
        if isinstance(asked, str):
            raise ValueError(
                f"--image-token: expected an id, since the source has no tokenizer, got {asked!r}"
            )
        return options, None
    where = "--image-token"
    if asked is None and named is not None:
        where, asked = "config.json: the image token", named
    word = IMAGE_TOKEN if asked is None else asked
    if isinstance(word, int):
        if not 0 <= word <= len(tokenizer):
            raise ValueError(
                f"{where}: expected an id from 0 to {len(tokenizer)}, the tokenizer's next one, "
                f"got {word}"
            )
        known = word < len(tokenizer)
        word = str(tokenizer.convert_ids_to_tokens(word)) if known else IMAGE_TOKEN
    if named is None:  # else only that one is taken
        _expect_image_word(tokenizer, word)
    if not _stands_alone(tokenizer, word):
        tokenizer.add_tokens([AddedToken(word, special=True, normalized=False)])
    token = int(tokenizer.convert_tokens_to_ids(word))
    if isinstance(asked, int) and token != asked:
        raise ValueError(f"{where}: expected {token}, the tokenizer's {word!r}, got {asked}")
    return options, ImageToken(word, token, len(tokenizer))


def _expect_image_word(tokenizer: Any, word: str) -> None:
    """Raise unless a word can stand for images: no text has it, and it has no other part."""
    own = word in tokenizer.all_special_tokens or word in tokenizer.get_added_vocab()
    parts = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    if word in parts or not (own or _MARKED.fullmatch(word)):
        raise ValueError(
            "--image-token: expected a word that stands for images alone, such as <image>, got "
            f"{word!r}"
        )


def _stands_alone(tokenizer: Any, word: str) -> bool:
    """Say whether a text has a word's id where it has the word, whatever is around it."""
    if word not in tokenizer.get_vocab():
        return False
    ids = tokenizer(f"a{word}b", add_special_tokens=False)["input_ids"]
    return bool(ids.count(tokenizer.convert_tokens_to_ids(word)) == 1)


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
