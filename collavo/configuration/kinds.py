"""Which kind of model a ``config.json`` is of, and the way for those that are no model of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import PretrainedConfig

from collavo._relatives import way_of

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# ``model_type`` of the three configurations.
TEXT = "collavo_text"
WHOLE = "collavo"
PATCHED = "collavo_llava"


def check_model_type(values: Mapping[str, Any], where: str, expected: str) -> None:
    """Raise unless a configuration is of a kind of model, and name the way for its relatives.

    Args:
        values: ``config.json`` as a dictionary.
        where: What to call it.
        expected: The ``model_type`` that it has to have.

    Raises:
        FileNotFoundError: if it is empty: transformers reads a file that is not there as that.
        ValueError: naming the ``model_type``.
    """
    if not values:
        raise FileNotFoundError(f"{where}: has no config.json")
    kind = values.get("model_type")
    if kind == expected:
        return
    way = way_of(values) or "give a folder that save_pretrained of this package wrote"
    if kind == PATCHED:
        way = "this is a LLaVA that apply_to_llava changed: load it with collavo.load_pretrained"
    raise ValueError(f"{where}: expected model_type {expected!r}, got {kind!r}; {way}")


def refuse_relative(name: Any, expected: str, options: Mapping[str, Any]) -> None:
    """Raise if a folder or hub id holds a LLaVA or the official CoLLaVO, and name the way.

    Args:
        name: The folder or hub id; one without ``config.json`` passes.
        expected: What is to be read from it.
        options: transformers' download options, by name; others are not read.

    Raises:
        ValueError: naming the ``model_type``.
    """
    known = {key: options[key] for key in HUB_OPTIONS if key in options}
    try:
        values, _ = PretrainedConfig.get_config_dict(name, **known)
    except OSError:
        return
    if (way := way_of(values)) is not None:
        raise ValueError(
            f"{name}: expected the folder of a {expected}, got model_type "
            f"{values.get('model_type')!r}; {way}"
        )
