"""The processor: images, panoptic maps and conversations become the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from os import PathLike
from typing import Any, TypeAlias

import collavo._requirements  # noqa: F401  (before what it checks)

from PIL import Image
from transformers import AutoProcessor, BatchFeature

from collavo._arguments import expect_like
from collavo.configuration import CollavoConfig, refuse_relative
from collavo.panoptic.images import ImageInput, read_image
from collavo.panoptic.maps import MapInput, PanopticMap
from collavo.processing.batch import (
    Pictures,
    as_arrays,
    as_kind,
    batch_crayon,
    check_upright,
    flatten_images,
    images_per_prompt,
    maps_by_image,
    switch_by_prompt,
)
from collavo.processing.blocks import Layout
from collavo.processing.box_frames import check_box_frame
from collavo.processing.box_frames import object_text as text_of_objects
from collavo.processing.chat_templates import CHAT_TEMPLATES, IMAGE_TOKEN
from collavo.processing.crayons import crayons_of
from collavo.processing.labels import IGNORE_INDEX, check_left_images, check_not_cut, padded_batch
from collavo.processing.pixels import from_pillow
from collavo.processing.prompts import count_images
from collavo.processing.region import even_grid, frame, make_image_processor
from collavo.processing.stretches import Conversation, Piece
from collavo.processing.text_processor import TextProcessor
from collavo.processing.tokens import check_options, pad
from collavo_kernels import CrayonMap

__all__ = ["IGNORE_INDEX", "CollavoProcessor", "make_image_processor"]

Samples: TypeAlias = list[list[Piece]]


class CollavoProcessor(TextProcessor):
    """Make the model's inputs from text, images and panoptic maps.

    Args:
        image_processor: A transformers image processor that squashes images to a square
            (``size`` with ``height`` and ``width``), crops their centre (``shortest_edge`` and
            ``do_center_crop``) or pads them to a square (LLaVA's ``do_pad``); panoptic maps follow,
            and padding has no segment. See ``make_image_processor``.
        tokenizer: Has ``image_token`` as one token, and a pad token where batches are padded.
        grid: Height and width of the vision tower's patch grid.
        chat_template: A Jinja template; None takes the released demo's.
        image_token: The placeholder of one image in a prompt.
        object_text: Whether prompts name the image's objects where the call does not say; None
            takes the chat template's way: LLaVA's do not.
        num_classes: Classes of the crayon.
        max_number: Largest instance number of the crayon.
        reduce: How a grid cell gets its segment: ``"majority"`` or ``"nearest"``.
        box_frame: What boxes of the object text are fractions of: ``"image"``, or ``"padded"``, the
            square that the image is padded to, as in LLaVA-1.5's data. ``to_padded`` and
            ``from_padded`` of ``collavo.processing`` convert other boxes.

    Raises:
        ValueError: if the tokenizer lacks the image token, the grid is not two positive sizes, the
            image processor resizes in another way, or boxes of padded images are asked for where
            images are cropped.

    A ``CrayonMap`` given in a map's place must have been looked up with this processor's grid,
    reduction and padding: it tells the number of its cells and which are of padding, which is all
    that can be checked here (7x5 passes for 5x7). ``PreparedDataset.check_processor`` checks the
    rest.

    Source: released code (35x35 grid, squashed images, prompt protocol).
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        grid: Sequence[int] = (35, 35),
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        object_text: bool | None = None,
        num_classes: int = 133,
        max_number: int = 20,
        reduce: str = "majority",
        box_frame: str = "image",
    ) -> None:
        expect_like(
            "tokenizer",
            tokenizer,
            "a tokenizer",
            has=("get_vocab",),
            hint="the order is CollavoProcessor(image_processor, tokenizer)",
        )
        if not isinstance(grid, (list, tuple)) or len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid: expected a positive height and width, got {grid!r}")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"tokenizer: expected {image_token!r} in its vocabulary; add it with "
                f"tokenizer.add_tokens([{image_token!r}], special_tokens=True)"
            )
        self.grid = (int(grid[0]), int(grid[1]))
        self.image_token = image_token
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.num_classes = num_classes
        self.max_number = max_number
        self.reduce = reduce
        self.box_frame = box_frame
        self.behind_image = ""
        template = CHAT_TEMPLATES["demo"] if chat_template is None else chat_template
        self.object_text = object_text
        super().__init__(image_processor, tokenizer, chat_template=template)  # type: ignore[no-untyped-call]
        check_box_frame(box_frame, self._layout(1, 2))  # it refuses what it cannot follow

    @classmethod
    def from_llava(cls, processor: Any, **settings: Any) -> CollavoProcessor:
        """Make a processor for a model that is there already, around its own processor.

        Pixels, prompt and image tokens are what the given processor makes; beside them come
        ``crayon_index`` (a row, or -1, for each image token, whatever the resolution),
        ``crayon_class`` and ``crayon_number``.

        Args:
            processor: Of LLaVA, LLaVA-NeXT (and Video), LLaVA-OneVision, VipLLaVA, Video-LLaVA,
                Pixtral, Mistral3, InternVL, GOT-OCR2, Ovis2, Janus, Idefics3 or SmolVLM.
            **settings: ``object_text`` (default False: the prompt stays the model's own),
                ``num_classes``, ``max_number``, ``reduce`` and ``box_frame`` as of
                ``CollavoProcessor``.

        Raises:
            TypeError: if the processor is of no such family.
            ValueError: naming the setting whose tokens could not be followed back to the picture.
        """
        from collavo.processing.llava import CollavoLlavaProcessor

        return CollavoLlavaProcessor(processor, **settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> CollavoProcessor:
        """Load a processor that ``save_pretrained`` saved.

        Args:
            pretrained_model_name_or_path: A folder, or a name of the hub.
            *args: As of transformers.
            **kwargs: As of transformers.

        Raises:
            ValueError: if it is another model's processor, which ``from_llava`` takes.
        """
        from collavo.processing.layouts import FAMILIES
        from collavo.processing.llava import CollavoLlavaProcessor

        values, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "collavo" in values:
            return CollavoLlavaProcessor.from_saved(
                pretrained_model_name_or_path, values["collavo"], **kwargs
            )
        if values.get("processor_class") in FAMILIES:
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected a processor of CoLLaVO, got "
                f"{values['processor_class']}; CollavoProcessor.from_llava(AutoProcessor."
                "from_pretrained(...)) keeps its pixels, prompt and grid"
            )
        loaded: CollavoProcessor = super().from_pretrained(
            pretrained_model_name_or_path, *args, **kwargs
        )
        loaded.image_processor = from_pillow(loaded.image_processor)
        return loaded

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a processor's settings; another model's folder is refused, not read in part.

        Args:
            pretrained_model_name_or_path: As in transformers.
            **kwargs: As in transformers.

        Raises:
            ValueError: if it is the folder of a LLaVA or of the official CoLLaVO.
        """
        read: Any = super().get_processor_dict
        values, rest = read(pretrained_model_name_or_path, **kwargs)
        if not str(values.get("processor_class")).startswith("Collavo"):
            refuse_relative(pretrained_model_name_or_path, "CollavoProcessor", kwargs)
        return values, rest

    def __call__(
        self,
        images: ImageInput | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        panoptic: MapInput | Sequence[MapInput | None] | None = None,
        *,
        object_text: bool | Sequence[bool] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Make a batch of prompts.

        Args:
            images: Paths, PIL images or arrays as :func:`~collavo.panoptic.read_image` takes
                them, in the order of the placeholders in ``text``; flat, or one list per prompt.
            text: Prompts with one ``<image>`` per image. ``<objects>`` is where the object text
                of an image goes; without that marker it follows the image's placeholder.
            panoptic: One map, or None, per image. An image without a map has one unknown segment.
                A ``CrayonMap`` of one image takes a map's place where the image processor keeps
                the whole image; it has been looked up for this grid.
            object_text: Whether to name objects in the prompt, for all or per prompt; None takes
                the processor's own setting.
            return_tensors: ``"pt"``, ``"np"`` or None for lists.
            **kwargs: Of a tokenizer's options those about lengths: ``padding``, ``padding_side``,
                ``pad_to_multiple_of``, ``truncation`` and ``max_length``; and
                ``add_special_tokens`` and ``return_attention_mask``.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``[B, L]`` with every placeholder repeated
            ``P`` times, and, unless the batch has no image at all, ``pixel_values`` float32
            ``[images, 3, H, W]``, ``crayon_index`` int32 ``[B, P]`` (row local to the sample, -1
            = none), ``crayon_class`` and ``crayon_number`` int32 ``[B, R]`` (class -1 = padding).

        What stands between two images is tokenized by itself, so that a tokenizer which puts a
        blank before a text puts one behind an image too, as LLaVA's code has it.

        Raises:
            ValueError: if the numbers of prompts, placeholders, images and maps disagree, a map
                is that of a photo before EXIF turned it, a ``CrayonMap`` does not fit the
                processor, or prompts are padded without a pad token.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError("text: expected a prompt or a list of prompts, got none")
        names = [f"text[{number}]" for number in range(len(texts))]

        def encode(samples: Samples, pictures: Pictures) -> tuple[dict[str, Any], list[int]]:
            joined = ["".join(piece.text for piece in one) for one in samples]
            return self._encode(joined, pictures, return_tensors, kwargs), pictures.counts

        pieces = [[Piece(one, False)] for one in texts]
        return self._batch(pieces, names, images, panoptic, object_text, return_tensors, encode)

    def training_batch(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Any] | None = None,
        panoptic: Sequence[MapInput | None] | None = None,
        *,
        object_text: bool | Sequence[bool] | None = None,
        max_length: int | None = None,
        overlong: str = "cut",
        pad_to_multiple_of: int | None = None,
        names: Sequence[str] | None = None,
        pixels: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Make a batch of conversations with labels on the answers and their stop tokens.

        The words of a conversation are words: where they spell a control token, ``<image>`` or
        ``<objects>``, they are tokenized as text. No token holds characters of an answer and of
        what is none, and the tokens before an answer are those of the prompt that generation would
        be given.

        Args:
            conversations: Chat messages with ``role`` and ``content``; a content is a string or a
                list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
            images: As in a call.
            panoptic: As in a call.
            object_text: As in a call.
            max_length: Longest sequence in tokens, those of images included; None sets no limit.
            overlong: What becomes of a longer one. ``"cut"`` cuts it behind its last whole answer
                that fits; images behind the cut are left out, and none is cut. ``"raise"``
                refuses it.
            pad_to_multiple_of: Pad lengths to a multiple of this.
            names: What to call the conversations in messages.
            pixels: Whether to make ``pixel_values``; without them text and crayons are checked in a
                part of the time.
            return_tensors: As in a call.

        Returns:
            What a call returns, padded, and ``labels`` int64 ``[B, L]``, -100 outside the answers.

        Raises:
            OverlongError: naming the conversation, if it is too long and no whole answer of it
                fits, or it is not to be cut.
            ValueError: as a call, and naming the conversation, if it has no answer, or the chat
                template refuses it.
        """
        if names is None:
            names = [f"conversations[{number}]" for number in range(len(conversations))]
        tags = self._tags
        pieces = [self._render(*pair, tags) for pair in zip(conversations, names, strict=True)]

        def encode(samples: Samples, pictures: Pictures) -> tuple[dict[str, Any], list[int]]:
            made, image_tokens = self._image_tokens(pictures, return_tensors, pixels)
            found = self._answers.sequences(
                samples, image_tokens, names, max_length=max_length, overlong=overlong
            )
            if found.images != pictures.counts:
                left = pictures.first(found.images)
                made, kept = self._image_tokens(left, return_tensors, pixels)
                for own, whole, name in zip(kept, image_tokens, names, strict=True):
                    check_left_images(own, whole, name)
            padded = padded_batch(found, self.tokenizer, pad_to_multiple_of=pad_to_multiple_of)
            return {**padded, **made}, found.images

        return self._batch(pieces, names, images, panoptic, object_text, return_tensors, encode)

    @property
    def one_grid(self) -> bool:
        """Whether every image has image tokens on ``grid``, whatever its size."""
        return True

    @property
    def image_mode(self) -> str:
        """What becomes of an image: ``"squash"``, ``"pad"`` (to a square), ``"crop"``, ``"tiles"``.

        The first two show all of it.
        """
        (block, *others) = self._layout(1, 2)
        if others or not self.one_grid:
            return "tiles"
        return "squash" if block.whole else "pad" if block.padded else "crop"

    def _batch(
        self,
        samples: Samples,
        names: Sequence[str],
        images: ImageInput | Sequence[Any] | None,
        panoptic: MapInput | Sequence[MapInput | None] | None,
        object_text: bool | Sequence[bool] | None,
        return_tensors: str | None,
        encode: Callable[[Samples, Pictures], tuple[dict[str, Any], list[int]]],
    ) -> BatchFeature:
        pictures = [read_image(image) for image in flatten_images(images)]
        maps = maps_by_image(panoptic, len(pictures))
        for position, (picture, known) in enumerate(zip(pictures, maps, strict=True)):
            if isinstance(known, PanopticMap):
                check_upright(known.size, picture, f"panoptic[{position}]")
        nested = images_per_prompt(images)
        counts = count_images(samples, names, self.image_token, len(pictures), nested)
        bounds = [0, *accumulate(counts)]
        wanted = switch_by_prompt(object_text, self.names_objects, len(samples))
        together = [1] * len(pictures) if nested is None else [n for n in nested for _ in range(n)]
        crayons = self._crayons(pictures, maps, together)
        by_prompt = [crayons[first:last] for first, last in pairwise(bounds)]
        expanded = []
        for pieces, name, (first, last), wants in zip(
            samples, names, pairwise(bounds), wanted, strict=True
        ):
            prefixes = [
                text_of_objects(one, picture.height, picture.width, self.box_frame) if wants else ""
                for one, picture in zip(crayons[first:last], pictures[first:last], strict=True)
            ]
            expanded.append(self._with_objects(pieces, prefixes, name))
        own_pictures = [pictures[first:last] for first, last in pairwise(bounds)]
        data, counts = encode(expanded, Pictures(own_pictures, nested is not None))
        by_prompt = [own[:left] for own, left in zip(by_prompt, counts, strict=True)]
        for name, ids, own in zip(names, data["input_ids"], by_prompt, strict=True):
            check_not_cut(sum(one.num_cells for one in own), self.image_token_id, ids, name)
        crayons = [one for own in by_prompt for one in own]
        if crayons:
            crayon_inputs = batch_crayon(crayons, counts)
            data |= {key: as_kind(value, return_tensors) for key, value in crayon_inputs.items()}
        return BatchFeature(as_arrays(data, return_tensors), tensor_type=return_tensors)

    def _layout(self, height: int, width: int, together: int = 1) -> Layout:
        """Return where the image tokens of a picture look.

        Args:
            height: Of the picture, in pixels.
            width: Of the picture.
            together: How many pictures its prompt has, where they were given as one list.
        """
        return (even_grid(frame(self.image_processor, height, width), self.grid),)

    def _crayons(
        self,
        pictures: Sequence[Image.Image],
        maps: Sequence[MapInput | None],
        together: Sequence[int],
    ) -> list[CrayonMap]:
        sizes = [(picture.height, picture.width) for picture in pictures]
        return crayons_of(
            maps,
            sizes,
            [self._layout(*size, n) for size, n in zip(sizes, together, strict=True)],
            num_classes=self.num_classes,
            max_number=self.max_number,
            reduce=self.reduce,
        )

    def _encode(
        self,
        texts: list[str],
        pictures: Pictures,
        return_tensors: str | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Return token ids and pixels of prompts with their objects' text."""
        options = check_options(kwargs)
        made, image_tokens = self._image_tokens(pictures, return_tensors, pixels=True)
        rows = self._answers.prompts(texts, image_tokens, options)
        return {**pad(rows, self.tokenizer, options), **made}

    def _image_tokens(
        self, pictures: Pictures, return_tensors: str | None, pixels: bool
    ) -> tuple[dict[str, Any], list[list[list[int]]]]:
        """Return the pixels, and the tokens that stand in the place of each prompt's images."""
        made = {}
        if pixels and pictures.flat:
            processed = self.image_processor(images=pictures.flat, return_tensors=return_tensors)
            made["pixel_values"] = processed["pixel_values"]
        sizes = [[(one.height, one.width) for one in own] for own in pictures.by_prompt]
        return made, [self._tokens_of_sizes(own) for own in sizes]


AutoProcessor.register(CollavoConfig, CollavoProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
