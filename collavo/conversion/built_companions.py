"""What lies beside a built LLaVA's weights: processor, tokenizer, generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME

from collavo.configuration import CollavoConfig
from collavo.conversion.parts import LanguageFolder, Parts
from collavo.panoptic.json_files import read_object
from collavo.processing.chat_templates import OBJECTS_MARKER
from collavo.processing.processor import CollavoProcessor
from collavo.processing.region import make_image_processor


def check_image_mode(mode: str) -> None:
    """Raise unless ``make_image_processor`` knows a mode.

    Args:
        mode: Its name.

    Raises:
        ValueError: naming those that there are.
    """
    try:
        make_image_processor(14, mode=mode)
    except ValueError as error:
        raise ValueError(f"image_{error}") from error


def write_built_companions(parts: Parts, target: Path, config: Any) -> None:
    """Write the processor and the generation settings.

    Args:
        parts: What the model is made of.
        target: Where to write.
        config: The built model's.

    Raises:
        ValueError: if tokenizer and template do not fit together.
    """
    own = isinstance(config, CollavoConfig)
    base = config if own else config.base()
    sizes = {} if own else dict(config.crayon or {})
    side = base.vision_config.image_size // base.vision_config.patch_size
    processor = CollavoProcessor(
        _image_processor(parts, base.vision_config.image_size),
        parts.language.tokenizer,
        grid=(side, side),
        chat_template=parts.template,
        object_text=None if OBJECTS_MARKER in parts.template else False,
        num_classes=config.num_crayon_classes if own else sizes.get("num_crayon_classes", 133),
        max_number=config.max_crayon_number if own else sizes.get("max_crayon_number", 20),
    )
    # One that it came with would answer in its own way where a tokenizer is loaded alone.
    processor.tokenizer.chat_template = parts.template
    generation = _generation(parts.language, processor.stop_token())
    processor.save_pretrained(target)
    text = json.dumps(generation, indent=2, sort_keys=True) + "\n"
    (target / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")


def _image_processor(parts: Parts, size: int) -> Any:
    """Return an image processor with the tower's own mean and deviation."""
    made = make_image_processor(size, mode=parts.image_mode)
    file = parts.tower.folder / IMAGE_PROCESSOR_NAME
    said = read_object(file, utf8=True) if file.is_file() else {}
    for name in ("image_mean", "image_std"):
        if name not in said:
            continue
        values = said[name]
        three = isinstance(values, list) and len(values) == 3
        if not three or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{file}: {name}: expected three numbers, got {values!r}")
        setattr(made, name, values)
    return made


def _generation(language: LanguageFolder, stop: int | None) -> dict[str, Any]:
    """Return the language model's generation settings, which pad and stop as the processor does."""
    file, tokenizer = language.folder / GENERATION_CONFIG_NAME, language.tokenizer
    found: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if file.is_file():
        found |= read_object(file, utf8=True)
    stops = found["eos_token_id"]
    stops = list(stops) if isinstance(stops, list) else [stops] if stops is not None else []
    if stop is not None and stop not in stops:
        stops.append(stop)
    found["eos_token_id"] = stops if len(stops) > 1 else stops[0] if stops else None
    found.pop("_from_model_config", None)  # else transformers would make it anew
    return found | {"pad_token_id": tokenizer.pad_token_id}
