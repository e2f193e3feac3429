"""Importing this checks what models, processor, trainer and commands of ``collavo`` are built on.

A module that imports transformers imports this first, so that an older one is named instead of the
first name it lacks. Maps, drawings and prepared data (``collavo.panoptic``) need none of it.
"""

from __future__ import annotations

from collavo_kernels.info import OLDEST_TRANSFORMERS, OLDEST_WITH_SEAMS, require

_OTHERWISE = (
    f", or use collavo_kernels alone, which works beside transformers from {OLDEST_TRANSFORMERS}"
)

require("transformers", OLDEST_WITH_SEAMS, "collavo", otherwise=_OTHERWISE)
# transformers' Trainer imports PEFT where there is one, and an older one fails at it.
require("peft", "0.18.1", "collavo", otherwise=", or uninstall it", optional=True)
