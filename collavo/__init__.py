"""CoLLaVO: the Crayon Large Language and Vision mOdel, its processor, trainer and command line.

Names are loaded when they are asked for, so that ``import collavo`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collavo.configuration import CollavoConfig as CollavoConfig
    from collavo.configuration import CollavoTextConfig as CollavoTextConfig
    from collavo.conversion import convert_state_dict as convert_state_dict
    from collavo.loading import load_pretrained as load_pretrained
    from collavo.model.llava import (
        CollavoForConditionalGeneration as CollavoForConditionalGeneration,
    )
    from collavo.model.llava import CollavoModel as CollavoModel
    from collavo.model.patch import apply_to_llava as apply_to_llava
    from collavo.model.patched import load_added as load_added
    from collavo.processing.processor import CollavoProcessor as CollavoProcessor
    from collavo.train import CollavoTrainer as CollavoTrainer
    from collavo.train import CollavoTrainingArguments as CollavoTrainingArguments
    from collavo_kernels import __version__ as __version__
    from collavo_kernels.nn import register_attention as register_attention

_HOMES = {
    "__version__": "collavo_kernels",
    "CollavoConfig": "collavo.configuration",
    "CollavoTextConfig": "collavo.configuration",
    "CollavoModel": "collavo.model.llava",
    "CollavoForConditionalGeneration": "collavo.model.llava",
    "CollavoProcessor": "collavo.processing.processor",
    "CollavoTrainer": "collavo.train",
    "CollavoTrainingArguments": "collavo.train",
    "apply_to_llava": "collavo.model.patch",
    "convert_state_dict": "collavo.conversion",
    "load_added": "collavo.model.patched",
    "load_pretrained": "collavo.loading",
    "register_attention": "collavo_kernels.nn",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'collavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
