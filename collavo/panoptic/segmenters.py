"""Segmenters from transformers, with the settings that CoLLaVO was published with."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from collavo.panoptic.categories import NUM_CLASSES, class_index
from collavo.panoptic.images import ImageInput, read_image
from collavo.panoptic.maps import PanopticMap

MASK2FORMER = "facebook/mask2former-swin-large-coco-panoptic"
THRESHOLD = 0.5
MASK_THRESHOLD = 0.95
# transformers' own, which the published settings leave as it is.
OVERLAP_THRESHOLD = 0.8

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What a config says about itself rather than about the model.
_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "architectures"}


@dataclass(frozen=True)
class _Kind:
    """How one family of models is loaded, and how its masks become those of the map.

    Args:
        name: What its classes' names begin with.
        model: The model's class.
        logits_size: Height and width that mask logits are brought to before anything else.
        antialias: Whether masks are averaged when they shrink to the map, not only sampled.
        task: What is to be segmented, for models that are told so.
    """

    name: str
    model: str
    logits_size: tuple[int, int] | None = None
    antialias: bool = False
    task: str | None = None


# As transformers' post-processing does it for each of them. OneFormer's own needs torchvision,
# whose resizing of a tensor is torch's with antialiasing.
_KINDS = {
    "mask2former": _Kind("Mask2Former", "Mask2FormerForUniversalSegmentation", (384, 384)),
    "maskformer": _Kind("MaskFormer", "MaskFormerForInstanceSegmentation"),
    "oneformer": _Kind(
        "OneFormer", "OneFormerForUniversalSegmentation", antialias=True, task="panoptic"
    ),
}


class TransformersSegmenter:
    """Mask2Former, MaskFormer or OneFormer: no fusing, masks resized to the grid before the argmax.

    Every query with a class and a score above ``threshold`` has a mask, of probability times score.
    A cell goes to the highest of them. A query becomes a segment if it has cells, some cell of its
    mask reaches ``mask_threshold``, and it has got more than ``overlap_threshold`` times as many
    cells as reach that. Two segments of a class stay two, whether thing or stuff.

    Args:
        model: A panoptic model of one of the three families; it is put into evaluation mode.
        processor: Its image processor; for OneFormer its processor, which has a tokenizer too.
        grid: Height and width of the maps, usually the crayon grid. None gives each image's own
            height and width.
        threshold: Scores of kept queries are above this.
        mask_threshold: See above.
        overlap_threshold: See above.
        classes: The class index of every label of the model, -1 for a label that COCO panoptic
            does not have. None finds them by the labels' names.

    Raises:
        ValueError: if the model is of another family, its labels are not COCO panoptic's, or the
            grid is not positive.

    Source: paper section 4; released code (Mask2Former, 35x35, thresholds 0.5 and 0.95,
        ``label_ids_to_fuse=()``).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        grid: tuple[int, int] | None = (35, 35),
        threshold: float = THRESHOLD,
        mask_threshold: float = MASK_THRESHOLD,
        overlap_threshold: float = OVERLAP_THRESHOLD,
        classes: Sequence[int] | None = None,
    ) -> None:
        self._kind = _kind(model.config)
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid: expected a positive height and width or None, got {grid}")
        self.model = _evaluating(model)
        self.processor = processor
        self.grid = grid
        self.threshold = threshold
        self.mask_threshold = mask_threshold
        self.overlap_threshold = overlap_threshold
        self.classes = _classes(model.config) if classes is None else list(classes)
        if len(self.classes) != model.config.num_labels:
            raise ValueError(
                f"classes: expected one for each of the model's {model.config.num_labels} labels, "
                f"got {len(self.classes)}"
            )
        if not all(-1 <= one < NUM_CLASSES for one in self.classes):
            raise ValueError(f"classes: expected -1..{NUM_CLASSES - 1}, got {self.classes}")
        self._hashed: list[tuple[Tensor, int, int]] = []
        self._fingerprint = ""

    @classmethod
    def from_pretrained(
        cls,
        name: str = MASK2FORMER,
        *,
        grid: tuple[int, int] | None = (35, 35),
        threshold: float = THRESHOLD,
        mask_threshold: float = MASK_THRESHOLD,
        overlap_threshold: float = OVERLAP_THRESHOLD,
        classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> TransformersSegmenter:
        """Load a model and its processor from a folder or from the hub.

        The family is that of the config's ``model_type``.

        Args:
            name: Folder or hub name.
            grid: As in the class.
            threshold: As in the class.
            mask_threshold: As in the class.
            overlap_threshold: As in the class.
            classes: As in the class.
            **kwargs: For the model's ``from_pretrained``, such as ``dtype``; ``revision`` and the
                other options of the hub hold for the processor too.

        Raises:
            ImportError: if scipy is missing, which transformers asks for.
            OSError: if there is no such model.
            ValueError: as the class.
        """
        import transformers

        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        kind = _kind(transformers.AutoConfig.from_pretrained(name, **hub))
        model = getattr(transformers, kind.model).from_pretrained(name, **kwargs)
        return cls(
            model,
            _load_processor(kind, name, model.config, hub),
            grid=grid,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_threshold=overlap_threshold,
            classes=classes,
        )

    def __call__(self, image: ImageInput) -> PanopticMap:
        """Segment one image.

        Args:
            image: As :func:`~collavo.panoptic.read_image` takes it; the model sees what that
                returns.

        Returns:
            A map of ``grid`` cells, or of the image's pixels, whose ids 1, 2, ... follow the order
            of the surviving queries.
        """
        return self.batch([image])[0]

    @torch.no_grad()
    def batch(self, images: Sequence[ImageInput]) -> list[PanopticMap]:
        """Segment several images of any sizes.

        Images that the processor gives the same size go through the model together. None is
        padded: a map is what the image alone would give, up to rounding.

        Args:
            images: As in a call.

        Returns:
            One map per image, as a call gives it.

        Raises:
            ValueError: if the processor itself pads images, which would shift the map.
        """
        pictures = [read_image(image) for image in images]
        inputs = [self._inputs(picture) for picture in pictures]
        groups: dict[torch.Size, list[int]] = {}
        for position, one in enumerate(inputs):
            groups.setdefault(one["pixel_values"].shape, []).append(position)
        maps: dict[int, PanopticMap] = {}
        for group in groups.values():
            together = {key: torch.cat([inputs[i][key] for i in group]) for key in inputs[group[0]]}
            outputs = self.model(**together)
            sizes = [self.grid or (pictures[i].height, pictures[i].width) for i in group]
            maps |= zip(group, self.post_process(outputs, sizes), strict=True)
        return [maps[i] for i in range(len(images))]

    def post_process(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[PanopticMap]:
        """Turn the model's outputs into maps.

        Args:
            outputs: With ``class_queries_logits`` ``[B, Q, labels + 1]`` and
                ``masks_queries_logits`` ``[B, Q, h, w]``.
            sizes: Height and width of each map.
        """
        found = []
        for classes, masks, size in zip(
            outputs.class_queries_logits, outputs.masks_queries_logits, sizes, strict=True
        ):
            segmentation, labels = self._segments(classes.float(), masks.float(), size)
            ids = range(1, len(labels) + 1)
            segment_classes = [self.classes[label] for label in labels]
            found.append(PanopticMap.from_segments(segmentation, ids, segment_classes))
        return found

    def _segments(
        self, classes: Tensor, masks: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, list[int]]:
        scores, labels = classes.softmax(-1).max(-1)
        kept = (labels < classes.shape[-1] - 1) & (scores > self.threshold)
        if not kept.any():
            return torch.zeros(size, dtype=torch.int32), []
        weighted = self._probabilities(masks[kept], size) * scores[kept, None, None]
        winner = weighted.argmax(0)
        cells = torch.bincount(winner.flatten(), minlength=len(weighted))
        sure = (weighted >= self.mask_threshold).sum((1, 2))
        # The ratio is rounded to float32 and compared in float64, as transformers does it.
        enough = (cells / sure).double() > self.overlap_threshold
        exists = (cells > 0) & (sure > 0) & enough
        ids = torch.where(exists, exists.cumsum(0), 0)
        return ids[winner].to(torch.int32), labels[kept][exists].tolist()

    def _probabilities(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        masks = masks[None]
        if self._kind.logits_size is not None:
            masks = interpolate(masks, size=self._kind.logits_size, mode="bilinear")
        return interpolate(
            masks.sigmoid(), size=size, mode="bilinear", antialias=self._kind.antialias
        )[0]

    def _inputs(self, image: Image.Image) -> dict[str, Tensor]:
        task = {} if self._kind.task is None else {"task_inputs": [self._kind.task]}
        made = self.processor(images=[image], return_tensors="pt", **task)
        if not made["pixel_mask"].all():
            raise ValueError(
                "processor: expected one that resizes without padding, but it padded an image; "
                "set its pad_size to None"
            )
        inputs = {key: value.to(self.model.device) for key, value in made.items()}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what an image's map will be, for a cache's key.

        The weights are hashed when this is first asked for, and again when they have been exchanged
        or written to (writing through ``.data`` is not noticed).
        """
        image_processor = getattr(self.processor, "image_processor", self.processor)
        settings = {
            "kind": self._kind.name,
            "grid": self.grid,
            "threshold": self.threshold,
            "mask_threshold": self.mask_threshold,
            "overlap_threshold": self.overlap_threshold,
            "classes": self.classes,
            "processor": _plain(image_processor.to_dict()),
            "config": _plain(self.model.config.to_dict()),
            "weights": self.fingerprint(),
        }
        if self._kind.task is not None:
            words = f"the task is {self._kind.task}"
            settings["task"] = self.processor.tokenizer(words)["input_ids"]
        return settings

    def fingerprint(self) -> str:
        """Return the SHA-256 of the model's state dict: names, types, shapes and values."""
        state = self.model.state_dict(keep_vars=True)
        now = [
            (value, value.data_ptr(), 0 if value.is_inference() else value._version)
            for value in state.values()
        ]
        same = len(now) == len(self._hashed) and all(
            new[0] is old[0] and new[1:] == old[1:]
            for new, old in zip(now, self._hashed, strict=True)
        )
        if not same or not self._fingerprint:
            self._fingerprint = _hash_tensors(state.items())
            self._hashed = now
        return self._fingerprint


def _kind(config: Any) -> _Kind:
    kind = _KINDS.get(config.model_type)
    if kind is None:
        names = ", ".join(_KINDS)
        raise ValueError(f"model: expected one of the types {names}, got {config.model_type!r}")
    return kind


def _evaluating(model: Any) -> Any:
    # OneFormer goes by a flag of its config: with it, dropout stays on in evaluation.
    for module in model.modules():
        if hasattr(module, "is_training"):
            module.is_training = False
    return model.eval()


def _load_processor(kind: _Kind, name: str, config: Any, hub: Mapping[str, Any]) -> Any:
    # The processors that need no torchvision, whether it is there or not: maps must not depend on
    # what else is installed.
    family = config.model_type
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    image_processor_class = getattr(module, f"{kind.name}ImageProcessorPil")
    if kind.task is None:
        return image_processor_class.from_pretrained(name, **hub)
    from transformers import AutoTokenizer, OneFormerProcessor

    # Class names are for training; without this they are fetched from the hub.
    image_processor = image_processor_class.from_pretrained(name, class_info_file=None, **hub)
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    return OneFormerProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        task_seq_length=config.task_seq_len,
    )


def _classes(config: Any) -> list[int]:
    names = [str(config.id2label.get(i, "")) for i in range(config.num_labels)]
    found = [_class_or_none(name) for name in names]
    in_order = all(index in (None, position) for position, index in enumerate(found))
    # A name may be spelled otherwise or be missing where all the others stand in COCO's order.
    if len(names) == NUM_CLASSES and in_order:
        return list(range(NUM_CLASSES))
    known = [index for index in found if index is not None]
    if len(known) < len(names):
        first = names[found.index(None)]
        raise ValueError(
            f"model: expected the {NUM_CLASSES} labels of COCO panoptic, got {len(names)} labels "
            f"with {first!r}; say with classes= which class each label is"
        )
    return known


def _class_or_none(name: str) -> int | None:
    try:
        return class_index(name)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """Return a config without what does not belong to the model, as JSON can store it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _NOT_OF_THE_MODEL}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, value in named:
        header = json.dumps([name, str(value.dtype), list(value.shape)])
        sha.update(f"{len(header)} {header}".encode())
        bytes_ = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(bytes_.numpy().data)
    return sha.hexdigest()
