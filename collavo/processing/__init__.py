"""From images, maps and conversations to the model's inputs."""

from collavo.processing.box_frames import from_padded, to_padded
from collavo.processing.chat_templates import ALIASES, CHAT_TEMPLATES, chat_template
from collavo.processing.labels import IGNORE_INDEX, Measured, OverlongError
from collavo.processing.processor import CollavoProcessor
from collavo.processing.region import make_image_processor

__all__ = [
    "ALIASES",
    "CHAT_TEMPLATES",
    "IGNORE_INDEX",
    "CollavoProcessor",
    "Measured",
    "OverlongError",
    "chat_template",
    "from_padded",
    "make_image_processor",
    "to_padded",
]
