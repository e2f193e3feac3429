"""A LLaVA as its own repository writes it, as a source: the decoder's folder with ``mm_`` settings.

Its tensors are the decoder's, ``model.mm_projector``, and now and then the vision tower's.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from collavo.conversion.build import write_parts
from collavo.conversion.joined import RenamedWeights
from collavo.conversion.kinds import Options
from collavo.conversion.official_layout import square_side
from collavo.conversion.parts import Parts, TowerFolder, check_tower, language_of, read_tower
from collavo.conversion.plan import Tensors
from collavo.conversion.projector import ProjectorSource, check_type, read_projector, type_of
from collavo.conversion.target import Conversion
from collavo.conversion.weights import FolderWeights
from collavo.model.projector import LLAVA_PROJECTOR, LLAVA_TOWER
from collavo.processing.chat_templates import chat_template

TITLE = "a LLaVA in its own repository's format"
# ``model_type`` of the decoder, and the chat template that LLaVA's scripts take for such models.
_KINDS = {
    "llava": ("llama", "vicuna_v1"),
    "llava_llama": ("llama", "vicuna_v1"),
    "llama": ("llama", "vicuna_v1"),
    "llava_mistral": ("mistral", "mistral_instruct"),
    "mistral": ("mistral", "mistral_instruct"),
    "llava_qwen": ("qwen2", None),
    "qwen2": ("qwen2", None),
}
_OF_LLAVA = ("mm_", "tune_mm", "freeze_mm", "use_mm", "unfreeze_mm", "image_", "tokenizer_")
_MODES = {None: "crop", "square": "crop", "pad": "pad"}
# OpenAI's towers have heads of 64; others say theirs in a configuration only.
_OPENAI = ("openai/clip-vit-", "clip-vit-")
_HEAD_DIM = 64


def convert_original(
    source: Path, target: Path, values: Mapping[str, Any], options: Options, *, progress: bool
) -> Conversion:
    """Convert a LLaVA of the original repository's format; see ``convert_folder``.

    Args:
        source: The checkpoint.
        target: A new or empty folder.
        values: Its ``config.json``.
        options: All but ``image_token``, which these checkpoints do not have.
        progress: Whether to show a bar.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the tensors, file, field or option that does not fit.
    """
    if options.image_token is not None:
        raise ValueError(f"--image-token: expected none for {TITLE}, which has no such token")
    _refuse_adapter(source)
    text_type, usual = _kind_of(source, values)
    name = options.chat_template or usual
    if name is None:
        raise ValueError(
            f"--template: expected the name of the chat template that {source} was trained with: "
            f"its model_type {values.get('model_type')!r} does not tell"
        )
    template = chat_template(name)
    weights = FolderWeights(source)
    tower_names = {
        n.removeprefix(LLAVA_TOWER): n for n in weights.headers if n.startswith(LLAVA_TOWER)
    }
    projector = _projector(source, values, weights, options.projector)
    own = {n: n for n in weights.headers if not n.startswith((LLAVA_PROJECTOR, LLAVA_TOWER))}
    text = {n: v for n, v in values.items() if not n.startswith(_OF_LLAVA)}
    text = {**text, "model_type": text_type, "architectures": None}
    text.pop("vision_config", None)
    language = language_of(source, text, RenamedWeights(weights, own))
    tower = _tower(source, values, RenamedWeights(weights, tower_names), options.vision_folder)
    layer = _select_layer(source, values, tower)
    mode = _MODES[values.get("image_aspect_ratio")]
    parts = Parts(language, tower, projector, layer, mode, template)
    _check_width(source, values, tower)
    done = write_parts(TITLE + ", now a {}", parts, target, options, progress=progress)
    said = f"the chat template is {name!r} (--template takes another)"
    return done if options.chat_template else done.with_note(said)


def _refuse_adapter(source: Path) -> None:
    if (source / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{source}: holds LLaVA's adapters and not the model they belong to: convert or build "
            "that one, with `--projector non_lora_trainables.bin` of this folder, and load the "
            "adapter into it: add_dual_qlora makes a slot, load_peft_adapter of "
            "collavo_kernels.nn fills it"
        )


def _kind_of(source: Path, values: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the decoder's ``model_type`` and its usual chat template, after a look at the rest."""
    kind = values.get("model_type")
    if kind not in _KINDS:
        raise ValueError(
            f"{source}: model_type: expected one of {', '.join(_KINDS)}, got {kind!r}, whose "
            "decoder cannot have the crayon"
        )
    found: tuple[tuple[str, object, tuple[object, ...], str], ...] = (
        ("mm_projector_type", values.get("mm_projector_type", "linear"),
         ("linear", "mlp2x_gelu"), "this package has no other projector"),
        ("mm_use_im_start_end", values.get("mm_use_im_start_end", False), (False, None),
         "its words around an image are in no chat template"),
        ("mm_vision_select_feature", values.get("mm_vision_select_feature", "patch"),
         ("patch",), "the crayon has no row for the class token"),
        ("image_aspect_ratio", values.get("image_aspect_ratio"), tuple(_MODES),
         "take LLaVA-NeXT's folder in transformers' format"),
        ("mm_patch_merge_type", values.get("mm_patch_merge_type", "flat"), ("flat", None),
         "take LLaVA-NeXT's folder in transformers' format"),
        ("mm_resampler_type", values.get("mm_resampler_type"), (None,),
         "this package has no resampler"),
    )  # fmt: skip
    for name, said, known, why in found:
        if said not in known:
            raise ValueError(
                f"{source}: {name}: expected {' or '.join(map(repr, known))}, got {said!r}; {why}"
            )
    return _KINDS[str(kind)]


def _select_layer(source: Path, values: Mapping[str, Any], tower: TowerFolder) -> int:
    layer, layers = values.get("mm_vision_select_layer"), tower.values.get("num_hidden_layers", 12)
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise ValueError(
            f"{source}: mm_vision_select_layer: expected the number of one of the tower's {layers} "
            f"layers, -2 for LLaVA's own, got {layer!r}"
        )
    return layer


def _projector(
    source: Path,
    values: Mapping[str, Any],
    weights: FolderWeights,
    file: str | PathLike[str] | None,
) -> ProjectorSource:
    """Return the checkpoint's projector, or that of a file, which then takes its place."""
    if file is not None:
        return read_projector(file)
    names = {name: name for name in weights.headers if name.startswith(LLAVA_PROJECTOR)}
    if not names:
        raise ValueError(
            f"{source}: holds no projector (tensors {LLAVA_PROJECTOR}*); give its file, such as "
            "mm_projector.bin, with --projector"
        )
    kind = type_of(names, str(source))
    found = ProjectorSource(str(source), kind, RenamedWeights(weights, names))
    check_type(found, values.get("mm_projector_type", "linear"))
    return found


def _tower(
    source: Path,
    values: Mapping[str, Any],
    own: RenamedWeights,
    folder: str | PathLike[str] | None,
) -> TowerFolder:
    """Return the vision tower: the checkpoint's tensors where it has them, else the folder's."""
    name = values.get("mm_vision_tower") or values.get("vision_tower")
    if folder is None and isinstance(name, str) and Path(name).is_dir():
        folder = name
    if not own.headers:
        if folder is None:
            raise ValueError(
                f"{source}: does not hold its vision tower, and names {name!r}: give the folder of "
                "that CLIP with --vision"
            )
        return read_tower(folder)
    if folder is not None:
        return TowerFolder(source, read_tower(folder).values, own)
    written = values.get("vision_config")
    if isinstance(written, dict):
        check_tower(source, written)
        return TowerFolder(source, written, own)
    if not str(name).startswith(_OPENAI):
        raise ValueError(
            f"{source}: the settings of its vision tower {name!r} are not in it: give the folder "
            "of that CLIP with --vision; the weights are taken from the checkpoint"
        )
    return TowerFolder(source, _openai_values(source, own), own)


def _openai_values(source: Path, weights: RenamedWeights) -> dict[str, Any]:
    """Return the configuration of one of OpenAI's towers, as its tensors show it."""
    tensors = Tensors(weights.headers, str(source))
    inner = "vision_model."
    table = f"{inner}embeddings.position_embedding.weight"
    rows, hidden = tensors.shape(table, 2)
    patch = tensors.shape(f"{inner}embeddings.patch_embedding.weight", 4)[-1]
    layers = {n.split(".")[3] for n in tensors.names(f"{inner}encoder.layers.")}
    return {
        "hidden_size": hidden,
        "intermediate_size": tensors.shape(f"{inner}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, hidden // _HEAD_DIM),
        "patch_size": patch,
        "image_size": square_side(rows, table) * patch,
    }


def _check_width(source: Path, values: Mapping[str, Any], tower: TowerFolder) -> None:
    said, width = values.get("mm_hidden_size"), tower.values.get("hidden_size", 768)
    if said not in (None, width):
        raise ValueError(
            f"{source}: mm_hidden_size: expected {width}, the width of {tower.folder}, got "
            f"{said!r}; the tower is another one"
        )
