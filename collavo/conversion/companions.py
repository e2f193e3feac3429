"""What lies beside the weights of a converted folder: processor, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from collavo.configuration import CollavoConfig, CollavoLlavaConfig
from collavo.conversion.pieces import check_ids
from collavo.conversion.tokenizer import SENTENCEPIECE_FILE
from collavo.model.files import check_generation
from collavo.panoptic.json_files import read_object
from collavo.processing.chat_templates import CHAT_TEMPLATES, IMAGE_TOKEN
from collavo.processing.processor import CollavoProcessor
from collavo.processing.region import make_image_processor

# InternLM2's words for the beginning and end of a turn, which the released evaluation prompts with.
_TURN_START, _TURN_STOP = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
_CLIP = "clip_vision_model"
_TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json")
_OF_A_TOKENIZER = (
    "tokenizer.json",
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def write_official_companions(
    source: Path, target: Path, config: CollavoConfig, tokenizer: Any
) -> None:
    """Write what the released model has in its scripts: see ``SourceKind.write_companions``.

    The processor squashes images as the released one does. Its chat template is the released
    evaluation's where the tokenizer has the turn tokens of InternLM2, else the demo's.

    Args:
        source: The official folder.
        target: Where to write.
        config: The converted model's.
        tokenizer: The source's fast tokenizer with the image token; None writes no processor.

    Raises:
        ValueError: if the tokenizer, read back, does not give sentencepiece's ids, or the prompt
            has the image token's word.
    """
    turns = tokenizer is not None and {_TURN_START, _TURN_STOP} <= set(tokenizer.get_vocab())
    if (source / GENERATION_CONFIG_NAME).is_file():
        _copy_generation(source, target)
    elif tokenizer is not None:
        stops = [tokenizer.eos_token_id]
        if turns:
            stops.append(tokenizer.convert_tokens_to_ids(_TURN_STOP))
        settings: Any = GenerationConfig  # its constructor is untyped
        settings(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stops if len(stops) > 1 else stops[0],
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(target)
    if tokenizer is None:
        return
    word = str(tokenizer.convert_ids_to_tokens(config.image_token_index))
    template = CHAT_TEMPLATES["eval" if turns else "demo"]
    if word != IMAGE_TOKEN and word in template:
        raise ValueError(f"--image-token: expected a word that no prompt has, got {word!r}")
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    CollavoProcessor(
        make_image_processor(size),
        tokenizer,
        grid=(side, side),
        chat_template=template.replace(IMAGE_TOKEN, word),
        image_token=word,
        num_classes=config.num_crayon_classes,
        max_number=config.max_crayon_number,
    ).save_pretrained(target)
    # For the way back; what reads the folder takes tokenizer.json.
    shutil.copyfile(source / SENTENCEPIECE_FILE, target / SENTENCEPIECE_FILE)
    written: Any = CollavoProcessor.from_pretrained(target)
    check_ids(written.tokenizer, source / SENTENCEPIECE_FILE)


def read_own_tokenizer(folder: Path) -> Any:
    """Read a folder's own tokenizer; see ``SourceKind.read_tokenizer``.

    Args:
        folder: A LLaVA's, or a CoLLaVO folder.

    Returns:
        A fast tokenizer, or None where the folder has none.

    Raises:
        ValueError: if it cannot be read without running code of the folder's, or is no fast one.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}"
        )
    return tokenizer


def write_llava_companions(source: Path, target: Path, config: Any, tokenizer: Any) -> None:
    """Write a LLaVA's own processor with a crayon; see ``SourceKind.write_companions``.

    Pixels, prompt and image tokens stay its own.

    Args:
        source: The LLaVA's folder.
        target: Where to write.
        config: The converted model's.
        tokenizer: The source's, with the image token; None writes no processor.

    Raises:
        ValueError: if the source's processor cannot be read, or its image tokens could not be
            followed back to the picture.
    """
    if (source / GENERATION_CONFIG_NAME).is_file():
        _copy_generation(source, target)
    if tokenizer is None:
        return
    if not any((source / name).is_file() for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)):
        tokenizer.save_pretrained(target)
        return
    try:
        load: Any = AutoProcessor.from_pretrained
        processor = load(source, trust_remote_code=False)
        processor.tokenizer = tokenizer
        _complete(processor, config, source)
        made = CollavoProcessor.from_llava(processor)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: its processor cannot be given a crayon ({reason})") from error
    made.save_pretrained(target)


def copy_tokenizer(source: Path, target: Path, config: Any, tokenizer: Any) -> None:
    """Write what an official folder has beside its weights; see ``SourceKind.write_companions``.

    Args:
        source: A CoLLaVO folder.
        target: Where to write.
        config: Not read.
        tokenizer: Not read.
    """
    for name in (*_OF_A_TOKENIZER, GENERATION_CONFIG_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    settings = target / TOKENIZER_CONFIG_FILE
    if not settings.is_file() or not (target / "tokenizer.json").is_file():
        return
    # tokenizer.json puts what begins and ends a text, the official class what its settings say.
    tokenizer = read_own_tokenizer(source)
    whole = tokenizer("a")["input_ids"]
    ends = {
        "add_bos_token": whole[0] == tokenizer.bos_token_id,
        "add_eos_token": whole[-1] == tokenizer.eos_token_id,
    }
    text = json.dumps(read_object(settings, utf8=True) | ends, indent=2, sort_keys=True) + "\n"
    settings.write_text(text, encoding="utf-8")


def _complete(processor: Any, config: Any, source: Path) -> None:
    """Tell a processor how many tokens an image has, as folders before transformers 4.47 do not."""
    base = config.base() if isinstance(config, CollavoLlavaConfig) else config
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = base.vision_config.patch_size
        processor.vision_feature_select_strategy = base.vision_feature_select_strategy
    file, name = source / PROCESSOR_NAME, "num_additional_image_tokens"
    said = read_object(file, utf8=True) if file.is_file() else {}
    if hasattr(processor, name) and name not in said:
        # CLIP's class token, which the strategy "default" leaves out.
        setattr(processor, name, int(base.vision_config.model_type == _CLIP))


def _copy_generation(source: Path, target: Path) -> None:
    check_generation(source)
    shutil.copyfile(source / GENERATION_CONFIG_NAME, target / GENERATION_CONFIG_NAME)
