"""A verifier of loss masks: what of a conversation is trained on, and whether it is the answers."""

from collavo.loss_masks.inspection import LabelInspector, LabelReport, inspect_labels
from collavo.loss_masks.processors import load_processor

__all__ = ["LabelInspector", "LabelReport", "inspect_labels", "load_processor"]
