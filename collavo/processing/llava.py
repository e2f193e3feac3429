"""The processor of a model that is there already: its own pixels, prompt and grid, and a crayon."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import transformers
from PIL import Image
from transformers import AutoProcessor
from transformers.processing_utils import TextKwargs
from transformers.utils import PROCESSOR_NAME

from collavo import writing
from collavo.configuration import CollavoLlavaConfig
from collavo.processing.batch import Pictures
from collavo.processing.blocks import Layout
from collavo.processing.layouts import family_of, squashed
from collavo.processing.processor import CollavoProcessor
from collavo.processing.rendering import FilledTemplate

# What a saved processor's file has beside what the model's own has.
_KEY = "collavo"
# Of so many sizes of pictures it is remembered which tokens they have.
_MOST_SIZES = 4096
_SETTINGS = ("object_text", "num_classes", "max_number", "reduce", "box_frame")


class CollavoLlavaProcessor(CollavoProcessor):
    """Make a LLaVA's own inputs, with a crayon for its image tokens.

    ``CollavoProcessor.from_llava`` makes one.

    Args:
        processor: One of ``collavo.processing.layouts.FAMILIES``. It keeps whatever it does with
            pixels and prompts.
        object_text: As of ``CollavoProcessor``.
        num_classes: As of ``CollavoProcessor``.
        max_number: As of ``CollavoProcessor``.
        reduce: As of ``CollavoProcessor``.
        box_frame: As of ``CollavoProcessor``.

    Raises:
        TypeError: if the processor is of no such family.
        ValueError: naming the setting whose tokens could not be followed back to the picture.
    """

    _apart = False  # the model's own processor tokenizes the whole text

    def __init__(
        self,
        processor: Any,
        object_text: bool = False,
        num_classes: int = 133,
        max_number: int = 20,
        reduce: str = "majority",
        box_frame: str = "image",
    ) -> None:
        self.processor = processor
        self._known_sizes: dict[tuple[tuple[int, int], ...], list[list[int]]] = {}
        self.family = family_of(processor)
        side = max(_sides(processor.image_processor), default=1)
        super().__init__(
            processor.image_processor,
            processor.tokenizer,
            grid=self._layout(side, side)[0].grid,
            chat_template=_template_of(processor),
            image_token=processor.image_token,
            object_text=object_text,
            num_classes=num_classes,
            max_number=max_number,
            reduce=reduce,
            box_frame=box_frame,
        )
        place = self.family.place or processor.image_token
        self.image_token_id = int(processor.tokenizer.convert_tokens_to_ids(place))
        self.behind_image = self.family.behind_image

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return what transformers takes for the parts of a processor."""
        return ["image_processor", "tokenizer"]

    def _layout(self, height: int, width: int, together: int = 1) -> Layout:
        return self.family.layout(self.processor, height, width, together)

    @property
    def one_grid(self) -> bool:
        """Whether every image has image tokens on ``grid``, whatever its size."""
        return self.family.layout is squashed

    @property
    def _filled(self) -> FilledTemplate:
        if not self.chat_template:
            raise ValueError(
                f"chat_template: expected one, got none; set {type(self.processor).__name__}'s, or "
                "call the processor with finished prompts"
            )
        return super()._filled

    def _encode(
        self,
        texts: list[str],
        pictures: Pictures,
        return_tensors: str | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        others = sorted(set(kwargs) - set(TextKwargs.__annotations__))
        if others:
            raise ValueError(
                f"{', '.join(others)}: expected options of the tokenizer; images are made as "
                f"{type(self.processor).__name__}'s image processor is set up, since the crayon "
                "follows it"
            )
        return self._own_inputs(texts, pictures, return_tensors=return_tensors, **kwargs)

    def _own_inputs(self, texts: list[str], pictures: Pictures, **kwargs: Any) -> dict[str, Any]:
        begin = self.tokenizer.bos_token
        if begin and all(text.startswith(begin) for text in texts):
            kwargs = {"add_special_tokens": False, **kwargs}  # the chat template has written it
        if not any(pictures.by_prompt):
            return dict(self.tokenizer(texts, return_token_type_ids=False, **kwargs))
        kind = self.family.images
        nested = kind == "nested" or (kind == "given" and pictures.nested)
        images = pictures.by_prompt if nested else pictures.flat
        return dict(self.processor(images=images, text=texts, **kwargs))

    def _image_tokens(
        self, pictures: Pictures, return_tensors: str | None, pixels: bool
    ) -> tuple[dict[str, Any], list[list[list[int]]]]:
        if not any(pictures.by_prompt):
            return {}, [[] for _ in pictures.by_prompt]
        # Images alone, a token between two of them that no image has.
        if getattr(self.processor, "use_default_system_prompt", False):
            raise ValueError(
                "use_default_system_prompt: expected False where labels are made; have the chat "
                "template or the conversations say it"
            )
        border = self.tokenizer.eos_token or self.tokenizer.pad_token
        texts = [border.join([self.image_token] * len(own)) for own in pictures.by_prompt]
        options = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
        made = self._own_inputs(texts, pictures, **options)
        ids, mask = made.pop("input_ids"), made.pop("attention_mask")
        border_id = self.tokenizer.convert_tokens_to_ids(border)
        tokens = [
            _split(line[kept.bool()].tolist(), border_id) if own else []
            for line, kept, own in zip(ids, mask, pictures.by_prompt, strict=True)
        ]
        return (made if pixels else {}), tokens

    def _image_facts(self) -> Any:
        settings = self.processor.to_dict()
        return [type(self.processor).__name__, settings, self.image_processor.to_dict()]

    def _tokens_of_sizes(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        # Only the model's own processor knows; pictures of one colour are as good as any.
        wanted = tuple(sizes)
        if wanted not in self._known_sizes:
            blank = [Image.new("RGB", (width, height)) for height, width in wanted]
            _, (tokens,) = self._image_tokens(Pictures([blank], True), None, pixels=False)
            if len(self._known_sizes) >= _MOST_SIZES:
                self._known_sizes.clear()
            self._known_sizes[wanted] = tokens
        return self._known_sizes[wanted]

    def save_pretrained(
        self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save the model's own processor with the crayon's settings beside its own.

        The folder is one of that processor's class, too.

        Args:
            save_directory: The folder.
            push_to_hub: Not served.
            **kwargs: For the model's own processor.

        Raises:
            ValueError: if it is to be pushed.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: expected False; push the folder that was saved")
        if self.chat_template != _template_of(self.processor):
            self.processor.chat_template = self.chat_template
        self.processor.save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / PROCESSOR_NAME
        values = json.loads(file.read_text(encoding="utf-8"))
        own = values.get("processor_class", type(self.processor).__name__)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        values |= {
            "processor_class": type(self).__name__,
            _KEY: {"processor_class": own, **settings},
        }
        with writing.written_file(file, sync=False) as temporary:
            text = json.dumps(values, indent=2, sort_keys=True) + "\n"
            Path(temporary).write_text(text, encoding="utf-8")
        return [str(file)]

    @classmethod
    def from_saved(
        cls, folder: str | PathLike[str], settings: Mapping[str, Any], **kwargs: Any
    ) -> CollavoLlavaProcessor:
        """Load what ``save_pretrained`` saved.

        Args:
            folder: The folder.
            settings: What its file has under ``collavo``.
            **kwargs: For the model's own processor, or settings of this one instead of those saved.

        Raises:
            ValueError: if the model's own processor is of no class of transformers that is served.
        """
        name = settings.get("processor_class")
        kind = getattr(transformers, str(name), None)
        if kind is None or not str(name).endswith("Processor"):
            raise ValueError(
                f"{folder}: expected a processor of transformers {transformers.__version__}, got "
                f"{name!r}"
            )
        names = [name for name in _SETTINGS if name in settings or name in kwargs]
        given = {name: kwargs.pop(name, settings.get(name)) for name in names}
        return cls(kind.from_pretrained(folder, **kwargs), **given)


def _split(ids: list[int], border: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == border:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _sides(image_processor: Any) -> list[int]:
    return [side for side in dict(image_processor.size or {}).values() if side]


def _template_of(processor: Any) -> str:
    own = processor.chat_template or getattr(processor.tokenizer, "chat_template", None) or ""
    if isinstance(own, Mapping):  # several by name
        own = own.get("default", "")
    return str(own)


AutoProcessor.register(CollavoLlavaConfig, CollavoLlavaProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
