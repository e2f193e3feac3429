"""The processor: images, panoptic maps and conversations become the model's inputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import collavo._requirements  # noqa: F401  (before what it checks)

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from collavo._arguments import expect_like
from collavo.configuration import CollavoConfig
from collavo.panoptic.images import ImageInput, read_image
from collavo.panoptic.maps import MapInput, PanopticMap
from collavo.panoptic.text import detections_by_image, object_prefix
from collavo.processing.batch import (
    batch_crayon,
    check_crayon,
    check_upright,
    flatten_images,
    images_per_prompt,
)
from collavo.processing.chat_templates import CHAT_TEMPLATES, IMAGE_TOKEN, OBJECTS_MARKER
from collavo.processing.labels import (
    IGNORE_INDEX,
    check_not_cut,
    special_texts,
    tokenize_answers,
)
from collavo.processing.region import crop_map, make_image_processor, visible_region
from collavo.processing.stretches import Conversation, Piece, cut_tags, split_answers
from collavo_kernels import CrayonMap, panoptic_lookup

__all__ = ["IGNORE_INDEX", "CollavoProcessor", "make_image_processor"]

Samples: TypeAlias = list[list[Piece]]


class CollavoProcessor(ProcessorMixin):
    """Make the model's inputs from text, images and panoptic maps.

    Args:
        image_processor: A transformers image processor that squashes images to a square
            (``size`` with ``height`` and ``width``) or crops their centre (``shortest_edge`` and
            ``do_center_crop``); panoptic maps are cropped alike. See ``make_image_processor``.
        tokenizer: Has ``image_token`` as one token, and a pad token where batches are padded.
        grid: Height and width of the vision tower's patch grid.
        chat_template: A Jinja template; None takes the released demo's.
        image_token: The placeholder of one image in a prompt.
        object_text: Whether prompts name the image's objects where the call does not say.
        num_classes: Classes of the crayon.
        max_number: Largest instance number of the crayon.
        reduce: How a grid cell gets its segment: ``"majority"`` or ``"nearest"``.

    Raises:
        ValueError: if the tokenizer lacks the image token, the grid is not two positive sizes, or
            the image processor resizes in another way.

    A ``CrayonMap`` given in a map's place must have been looked up with this processor's grid and
    reduction: it tells the number of its cells alone, which is all that can be checked here (7x5
    passes for 5x7). ``PreparedDataset.check_crayon`` checks the rest.

    Source: released code (35x35 grid, squashed images, prompt protocol).
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        grid: Sequence[int] = (35, 35),
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        object_text: bool = True,
        num_classes: int = 133,
        max_number: int = 20,
        reduce: str = "majority",
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
        self.object_text = object_text
        self.num_classes = num_classes
        self.max_number = max_number
        self.reduce = reduce
        template = CHAT_TEMPLATES["demo"] if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)  # type: ignore[no-untyped-call]
        visible_region(image_processor, 1, 1)

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
            **kwargs: For the tokenizer, such as ``padding=True``.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``[B, L]`` with every placeholder repeated
            ``P`` times, and, unless the batch has no image at all, ``pixel_values`` float32
            ``[images, 3, H, W]``, ``crayon_index`` int32 ``[B, P]`` (row local to the sample, -1
            = none), ``crayon_class`` and ``crayon_number`` int32 ``[B, R]`` (class -1 = padding).

        Raises:
            ValueError: if the numbers of prompts, placeholders, images and maps disagree, a map
                is that of a photo before EXIF turned it, or a ``CrayonMap`` does not fit the
                processor.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError("text: expected a prompt or a list of prompts, got none")
        names = [f"text[{number}]" for number in range(len(texts))]

        def tokenize(samples: Samples) -> dict[str, Any]:
            return self._tokenize(["".join(p.text for p in one) for one in samples], kwargs, names)

        pieces = [[Piece(one, False)] for one in texts]
        cells = self.grid[0] * self.grid[1]
        return self._batch(
            pieces, names, images, panoptic, object_text, return_tensors, tokenize, cells
        )

    def training_batch(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Any] | None = None,
        panoptic: Sequence[MapInput | None] | None = None,
        *,
        object_text: bool | Sequence[bool] | None = None,
        max_length: int | None = None,
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
            max_length: Longest sequence in tokens; longer ones are cut on the tokenizer's
                truncation side. None cuts nothing.
            pad_to_multiple_of: Pad lengths to a multiple of this.
            names: What to call the conversations in messages.
            pixels: Whether to make ``pixel_values``; without them text and crayons are checked in a
                part of the time.
            return_tensors: As in a call.

        Returns:
            What a call returns, padded, and ``labels`` int64 ``[B, L]``, -100 outside the answers.

        Raises:
            ValueError: as a call, and naming the conversation, if it has no answer, the chat
                template refuses it, or an image is cut.
        """
        if names is None:
            names = [f"conversations[{number}]" for number in range(len(conversations))]
        tags = {self.image_token, OBJECTS_MARKER, *special_texts(self.tokenizer)}
        pairs = zip(conversations, names, strict=True)
        pieces = [self._render(one, name, tags) for one, name in pairs]

        def tokenize(samples: Samples) -> dict[str, Any]:
            return tokenize_answers(
                self.tokenizer,
                samples,
                names,
                image_token=self.image_token,
                cells=self.grid[0] * self.grid[1],
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
            )

        return self._batch(
            pieces, names, images, panoptic, object_text, return_tensors, tokenize, 1, pixels
        )

    def prompt(self, question: str | Conversation, *, num_images: int = 1) -> str:
        """Return the prompt of a question, up to where the model's answer starts.

        Args:
            question: The user's words, or a whole conversation that ends with the user's turn.
            num_images: How many images a question given as a string is about.
        """
        if isinstance(question, str):
            parts = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
            question = [{"role": "user", "content": parts}]
        return self._fill_template(question, "question", add_generation_prompt=True)[0]

    def _fill_template(
        self, conversation: Conversation, where: str, **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt, and where in it the assistant's words stand."""
        render: Any = render_jinja_template  # its annotations are narrower than what it does
        try:
            prompts, spans = render(
                conversations=[list(conversation)],
                chat_template=self.chat_template,
                **options,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template does not take it ({error})") from error
        return prompts[0], spans[0] if spans else []

    def _render(self, conversation: Conversation, name: str, tags: set[str]) -> list[Piece]:
        words, mark = cut_tags(conversation, tags)
        text, spans = self._fill_template(words, name, return_assistant_tokens_mask=True)
        if not spans:
            raise ValueError(
                f"{name}: expected an assistant's turn inside the chat template's "
                "{% generation %} block, got none"
            )
        return split_answers(text, spans, mark)

    def _batch(
        self,
        samples: Samples,
        names: Sequence[str],
        images: ImageInput | Sequence[Any] | None,
        panoptic: MapInput | Sequence[MapInput | None] | None,
        object_text: bool | Sequence[bool] | None,
        return_tensors: str | None,
        tokenize: Callable[[Samples], dict[str, Any]],
        tokens_per_image: int,
        pixels: bool = True,
    ) -> BatchFeature:
        pictures = [read_image(image) for image in flatten_images(images)]
        maps = self._maps(panoptic, len(pictures))
        for position, (picture, known) in enumerate(zip(pictures, maps, strict=True)):
            if isinstance(known, PanopticMap):
                check_upright(known.size, picture, f"panoptic[{position}]")
        counts = self._count_images(samples, names, len(pictures), images_per_prompt(images))
        wanted = self._object_switch(object_text, len(samples))
        crayon = self._crayon(pictures, maps) if pictures else None
        objects = detections_by_image(crayon) if crayon is not None and any(wanted) else []
        expanded, first = [], 0
        for pieces, name, count, wants in zip(samples, names, counts, wanted, strict=True):
            prefixes = [""] * count
            if objects and wants:
                prefixes = [object_prefix(own) for own in objects[first : first + count]]
            expanded.append(self._expand(pieces, prefixes, tokens_per_image, name))
            first += count
        data = tokenize(expanded)
        if crayon is not None:
            if pixels:
                processed = self.image_processor(images=pictures, return_tensors=return_tensors)
                data["pixel_values"] = processed["pixel_values"]
            crayon_inputs = batch_crayon(crayon, counts)
            data |= {key: _as(value, return_tensors) for key, value in crayon_inputs.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def _maps(
        self, panoptic: MapInput | Sequence[MapInput | None] | None, images: int
    ) -> list[MapInput | None]:
        if panoptic is None:
            return [None] * images
        if isinstance(panoptic, MapInput):
            panoptic = [panoptic]
        maps = list(panoptic)
        for position, one in enumerate(maps):
            if one is not None and not isinstance(one, MapInput):
                raise TypeError(
                    f"panoptic[{position}]: expected a PanopticMap, a CrayonMap or None, "
                    f"got {type(one).__name__}"
                )
        if len(maps) != images:
            raise ValueError(
                f"panoptic: expected one map, or None, for each of {images} images, got {len(maps)}"
            )
        return maps

    def _count_images(
        self, samples: Samples, names: Sequence[str], images: int, nested: list[int] | None
    ) -> list[int]:
        for name, pieces in zip(names, samples, strict=True):
            if any(piece.is_answer and self.image_token in piece.text for piece in pieces):
                raise ValueError(f"{name}: the chat template put {self.image_token!r} in an answer")
        counts = [sum(p.text.count(self.image_token) for p in pieces) for pieces in samples]
        if sum(counts) != images:
            raise ValueError(
                f"text: expected one {self.image_token!r} for each of {images} images, "
                f"got {sum(counts)} ({counts} per prompt)"
            )
        if nested is not None and nested != counts:
            raise ValueError(
                f"text: expected as many {self.image_token!r} per prompt as the lists in images "
                f"have images, {nested}, got {counts}"
            )
        return counts

    def _object_switch(self, wanted: bool | Sequence[bool] | None, samples: int) -> list[bool]:
        if wanted is None or isinstance(wanted, bool):
            return [self.object_text if wanted is None else wanted] * samples
        if len(wanted) != samples:
            raise ValueError(
                f"object_text: expected one value, or one for each of {samples} prompts, "
                f"got {len(wanted)}"
            )
        return list(wanted)

    def _crayon(
        self, pictures: Sequence[Image.Image], maps: Sequence[MapInput | None]
    ) -> CrayonMap:
        """Look up all maps that are no crayon yet, neighbours in one call."""
        parts: list[CrayonMap] = []
        pairs = enumerate(zip(pictures, maps, strict=True))
        for ready, run in groupby(pairs, lambda pair: isinstance(pair[1][1], CrayonMap)):
            if ready:
                parts += [self._checked(i, picture, crayon) for i, (picture, crayon) in run]
            else:
                parts.append(self._look_up([pair for _, pair in run]))
        return CrayonMap.cat(parts)

    def _checked(self, position: int, picture: Image.Image, crayon: Any) -> CrayonMap:
        where = f"panoptic[{position}]"
        whole = (0, 0, picture.height, picture.width)
        if visible_region(self.image_processor, picture.height, picture.width) != whole:
            raise ValueError(
                f"{where}: expected a PanopticMap, since the image processor crops this image of "
                f"{picture.width}x{picture.height} and its map has to be cropped alike, got a "
                "CrayonMap; use a processor that squashes (make_image_processor)"
            )
        check_crayon(
            crayon,
            where,
            cells=self.grid[0] * self.grid[1],
            num_classes=self.num_classes,
            max_number=self.max_number,
        )
        checked: CrayonMap = crayon
        return checked

    def _look_up(self, pairs: Sequence[tuple[Image.Image, Any]]) -> CrayonMap:
        visible = []
        for picture, panoptic in pairs:
            # A map without segments is all unknown, whatever its size.
            known = PanopticMap.empty(*self.grid) if panoptic is None else panoptic
            size = (picture.height, picture.width) if panoptic is None else known.size
            region = visible_region(self.image_processor, *size)
            visible.append(known if panoptic is None else crop_map(known, region))
        return panoptic_lookup(
            [one.segmentation for one in visible],
            [one.segment_ids for one in visible],
            [one.segment_classes for one in visible],
            grid=self.grid,
            num_classes=self.num_classes,
            max_number=self.max_number,
            reduce=self.reduce,
        )

    def _expand(
        self, pieces: Sequence[Piece], prefixes: Sequence[str], tokens_per_image: int, name: str
    ) -> list[Piece]:
        """Repeat the image token and put the object text where it belongs."""
        markers = sum(p.text.count(OBJECTS_MARKER) for p in pieces if not p.is_answer)
        if markers not in (0, len(prefixes)):
            raise ValueError(
                f"{name}: expected no {OBJECTS_MARKER!r}, or one for each of {len(prefixes)} "
                f"images, got {markers}"
            )
        remaining = iter(prefixes)
        tokens = self.image_token * tokens_per_image
        # Blanks after the placeholder stay in front of the object text.
        pattern = rf"{re.escape(self.image_token)}(\s*)|{re.escape(OBJECTS_MARKER)}"

        def replace(match: re.Match[str]) -> str:
            blanks = match.group(1)
            if blanks is None:
                return next(remaining)
            return tokens + blanks + ("" if markers else next(remaining))

        return [
            piece
            if piece.is_answer
            else dataclasses.replace(piece, text=re.sub(pattern, replace, piece.text))
            for piece in pieces
        ]

    def _tokenize(
        self, texts: list[str], kwargs: dict[str, Any], names: Sequence[str]
    ) -> dict[str, Any]:
        encoded = self.tokenizer(texts, return_token_type_ids=False, **kwargs)
        data = {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}
        for text, ids, name in zip(texts, data["input_ids"], names, strict=True):
            check_not_cut(text.count(self.image_token), self.image_token_id, ids, name)
        return data


def _as(value: Tensor, kind: str | None) -> Any:
    if kind is None:
        return value.tolist()
    return value.numpy() if kind == "np" else value


AutoProcessor.register(CollavoConfig, CollavoProcessor, exist_ok=True)  # type: ignore[no-untyped-call]
