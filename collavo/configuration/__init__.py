"""Configurations of the CoLLaVO model: LLaVA's, the crayon's and the adapters'."""

from collavo.configuration.kinds import HUB_OPTIONS, check_model_type, refuse_relative
from collavo.configuration.patched import CollavoLlavaConfig, decoder_settings
from collavo.configuration.text import CRAYON_MODES, TEXT_FIELDS, CollavoTextConfig
from collavo.configuration.whole import PROJECTOR_TYPES, CollavoConfig

__all__ = [
    "CRAYON_MODES",
    "HUB_OPTIONS",
    "PROJECTOR_TYPES",
    "TEXT_FIELDS",
    "CollavoConfig",
    "CollavoLlavaConfig",
    "CollavoTextConfig",
    "check_model_type",
    "decoder_settings",
    "refuse_relative",
]
