"""Training: crayon instructions, the two stages, and a trainer on top of transformers' own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collavo.train.arguments import CollavoTrainingArguments as CollavoTrainingArguments
    from collavo.train.collator import CrayonCollator as CrayonCollator
    from collavo.train.dataset import ConversationDataset as ConversationDataset
    from collavo.train.dataset import CrayonInstructionDataset as CrayonInstructionDataset
    from collavo.train.exports import export as export
    from collavo.train.picture_maps import PictureMaps as PictureMaps
    from collavo.train.schedule import StepSchedule as StepSchedule
    from collavo.train.trained_only import load_trained as load_trained
    from collavo.train.trainer import CollavoTrainer as CollavoTrainer

# transformers.Trainer takes seconds to import: only those who ask for a name pay for it.
_MODULES = {
    "CollavoTrainer": "trainer",
    "CollavoTrainingArguments": "arguments",
    "ConversationDataset": "dataset",
    "CrayonCollator": "collator",
    "CrayonInstructionDataset": "dataset",
    "PictureMaps": "picture_maps",
    "StepSchedule": "schedule",
    "export": "exports",
    "load_trained": "trained_only",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
