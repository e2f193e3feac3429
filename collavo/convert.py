"""The former place of ``collavo.model.convert``; kept for those who import it."""

from collavo.model.convert import convert_state_dict

__all__ = ["convert_state_dict"]
