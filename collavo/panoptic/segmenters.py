"""Segmenters from transformers, with the settings that CoLLaVO was published with."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from collavo.panoptic.categories import NUM_CLASSES
from collavo.panoptic.maps import PanopticMap

MASK2FORMER = "facebook/mask2former-swin-large-coco-panoptic"
THRESHOLD = 0.5
MASK_THRESHOLD = 0.95


class Mask2FormerSegmenter:
    """Mask2Former as the paper uses it: no fusing, masks resized to the grid before the argmax.

    Args:
        model: A ``Mask2FormerForUniversalSegmentation`` with COCO panoptic's 133 labels.
        image_processor: Its image processor.
        grid: Height and width of the resulting map, usually the crayon grid.
        threshold: Smallest class score of a kept query.
        mask_threshold: A segment is kept if at least one cell's score times mask probability
            reaches this.

    Raises:
        ValueError: if the model does not have 133 labels or the grid is not positive.

    Source: paper section 4; released code (thresholds 0.5 and 0.95, ``label_ids_to_fuse=()``).
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        *,
        grid: tuple[int, int] = (35, 35),
        threshold: float = THRESHOLD,
        mask_threshold: float = MASK_THRESHOLD,
    ) -> None:
        if model.config.num_labels != NUM_CLASSES:
            raise ValueError(
                f"model: expected the {NUM_CLASSES} labels of COCO panoptic, "
                f"got {model.config.num_labels}"
            )
        if min(grid) < 1:
            raise ValueError(f"grid: expected a positive height and width, got {grid}")
        self.model = model
        self.image_processor = image_processor
        self.grid = grid
        self.threshold = threshold
        self.mask_threshold = mask_threshold

    @classmethod
    def from_pretrained(
        cls, name: str = MASK2FORMER, *, grid: tuple[int, int] = (35, 35), **kwargs: Any
    ) -> Mask2FormerSegmenter:
        """Load the model and its image processor from a folder or from the hub.

        Args:
            name: Folder or hub name.
            grid: Height and width of the resulting map.
            **kwargs: Passed on to the model's ``from_pretrained``.

        Raises:
            ImportError: if scipy is missing, which transformers' Mask2Former needs.
            OSError: if there is no such model.
        """
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.models.mask2former import image_processing_pil_mask2former as processing

        model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(name, **kwargs)
        processor = processing.Mask2FormerImageProcessorPil.from_pretrained(name)
        return cls(model.eval(), processor, grid=grid)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> PanopticMap:
        """Segment one image.

        Args:
            image: An RGB image.

        Returns:
            A map of ``grid`` cells whose ids follow the order of the surviving queries.
        """
        inputs = self.image_processor(images=image, return_tensors="pt").to(self.model.device)
        return self.post_process(self.model(**inputs))

    def post_process(self, outputs: Any) -> PanopticMap:
        """Turn the model's outputs for one image into a map.

        Args:
            outputs: With ``class_queries_logits`` ``[1, Q, 134]`` and ``masks_queries_logits``
                ``[1, Q, h, w]``.
        """
        result = self.image_processor.post_process_panoptic_segmentation(
            outputs,
            threshold=self.threshold,
            mask_threshold=self.mask_threshold,
            label_ids_to_fuse=set(),
            target_sizes=[self.grid],
        )[0]
        return PanopticMap.from_result(result)
