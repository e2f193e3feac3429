"""The former place of ``collavo.model.llava``; kept for those who import it."""

from collavo.model.llava import CollavoForConditionalGeneration, CollavoModel

__all__ = ["CollavoForConditionalGeneration", "CollavoModel"]
