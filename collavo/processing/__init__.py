"""From images, maps and conversations to the model's inputs."""

from collavo.processing.inputs import make_image_processor
from collavo.processing.processor import CollavoProcessor

__all__ = ["CollavoProcessor", "make_image_processor"]
