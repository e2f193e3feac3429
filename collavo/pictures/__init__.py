"""Pictures of what the model is told about an image: segments, boxes, crayon rows, a legend."""

from collavo.pictures.drawing import draw_scene, save_scene

__all__ = ["draw_scene", "save_scene"]
