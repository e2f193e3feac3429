"""From images, maps and conversations to the model's inputs."""

from collavo.processing.processor import IGNORE_INDEX, CollavoProcessor
from collavo.processing.region import make_image_processor

__all__ = ["IGNORE_INDEX", "CollavoProcessor", "make_image_processor"]
