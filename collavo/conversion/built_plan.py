"""What a built LLaVA's tensors are made of."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn

from collavo.configuration import CollavoConfig
from collavo.conversion.fresh import plan_crayon, plan_drawn
from collavo.conversion.joined import joined_plans
from collavo.conversion.kinds import Options
from collavo.conversion.llava import read_llava_config, stock_on_meta, target_on_meta
from collavo.conversion.parts import LanguageFolder, TowerFolder
from collavo.conversion.plan import Output, Plan, Tensors
from collavo.conversion.projector import ProjectorSource, plan_projector
from collavo.conversion.shapes import on_meta
from collavo.model.inventory import part_of
from collavo.model.linear import CollavoLinear
from collavo.model.projector import OWN_PROJECTOR
from collavo.processing.chat_templates import IMAGE_TOKEN

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DECODER, _TOWER = "model.language_model.", "model.vision_tower."
# CLIP's tensors beside its tower.
_BESIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_INNER = "vision_model."  # before transformers 5.17, and in a CLIPModel


def plan_built(
    language: LanguageFolder,
    tower: TowerFolder,
    projector: ProjectorSource | str,
    options: Options,
    added: Mapping[str, int],
    select_layer: int = -2,
) -> tuple[Any, Plan]:
    """Plan a LLaVA of its parts, over ``JoinedWeights`` "language", "vision" and "projector".

    Args:
        language: Its tokenizer has the image token and a pad token.
        tower: CLIP's.
        projector: The projector; the kind of one that is drawn (``CollavoConfig.projector_type``).
        options: Of which ``crayon_mode`` and ``quantize`` are read.
        added: The tokens that the tokenizer got, by their words.
        select_layer: Which of the tower's layers gives the features.

    Returns:
        What ``config.json`` says, and the plan.

    Raises:
        ValueError: naming the folder, and the tensors or fields that do not fit.
    """
    text = Tensors(language.weights.headers, str(language.folder))
    rows = _rows(language, text, added)
    base = _base_config(language, tower, rows, select_layer)
    stock = stock_on_meta(str(language.folder), base)
    config, model = target_on_meta(base, stock, options)
    kind = projector if isinstance(projector, str) else projector.projector_type
    if kind != "mlp2x_gelu":
        config, model = _with_projector(config, language, kind)
    names = [name for name in model.state_dict() if part_of(name) is None]
    between = _plan_between(projector, model, text.headers[_EMBEDDING].dtype)
    crayon = Tensors({}, "")
    plan_crayon(crayon, model)
    _plan_language(text, model, names, added)
    vision = _plan_tower(tower, model, names)
    found = [n for n, module in model.named_modules() if isinstance(module, CollavoLinear)]
    plans = {
        "projector": between,
        "language": text.plan([f"{name}.weight" for name in found]),
        "vision": vision,
        "crayon": crayon.plan(),
    }
    return config, joined_plans(plans)


def _plan_between(projector: ProjectorSource | str, model: nn.Module, dtype: torch.dtype) -> Plan:
    """Plan the projector, drawn or taken over, in the language model's dtype."""
    if isinstance(projector, str):
        tensors = Tensors({}, "")
        plan_drawn(tensors, model, lambda name: f"{name}.".startswith(OWN_PROJECTOR), dtype)
        tensors.note("the projector is drawn: train it with collavo train --stage align")
        return tensors.plan()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = Tensors(projector.weights.headers, projector.where)
    plan_projector(tensors, projector.projector_type, shapes, dtype)
    return tensors.plan()


def _rows(language: LanguageFolder, tensors: Tensors, added: Mapping[str, int]) -> int:
    """Return how many rows embedding and head will have."""
    rows, _ = tensors.shape(_EMBEDDING, 2)
    said = language.values.get("vocab_size", rows)
    if said != rows:
        raise ValueError(
            f"{language.folder}: {_EMBEDDING}: expected {said} rows, as vocab_size of config.json "
            f"says, got {rows}"
        )
    vocabulary = language.tokenizer.get_vocab()
    last = max(token for word, token in vocabulary.items() if word not in added)
    if last >= rows:
        raise ValueError(
            f"{language.folder}: its tokenizer has ids up to {last} and {_EMBEDDING} {rows} rows; "
            "take the model's own tokenizer, or bring the model to it (resize_token_embeddings), "
            "and save it"
        )
    return max(rows, 1 + int(max(vocabulary.values())))


def _base_config(language: LanguageFolder, tower: TowerFolder, rows: int, select_layer: int) -> Any:
    """Return the configuration of the stock LLaVA."""
    tokenizer = language.tokenizer
    left_out = ("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map")
    text = {name: value for name, value in language.values.items() if name not in left_out}
    text |= {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}
    vision = {name: value for name, value in tower.values.items() if name not in left_out}
    vision["model_type"] = "clip_vision_model"
    where = f"{language.folder} and {tower.folder}"
    values: dict[str, Any] = {"model_type": "llava", "text_config": text, "vision_config": vision}
    sizes = read_llava_config(where, values).vision_config
    values |= {
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": (sizes.image_size // sizes.patch_size) ** 2,
        "vision_feature_layer": select_layer,
        "vision_feature_select_strategy": "default",
        "architectures": ["LlavaForConditionalGeneration"],
    }
    return read_llava_config(where, values)


def _with_projector(
    config: Any, language: LanguageFolder, projector_type: str
) -> tuple[CollavoConfig, Any]:
    if not isinstance(config, CollavoConfig):
        raise ValueError(
            f"projector_type: expected 'mlp2x_gelu' beside {language.folder}, model_type "
            f"{language.values.get('model_type')!r}: it becomes a LLaVA of transformers, which has "
            f"that projector alone; got {projector_type!r}"
        )
    made: Any = config
    made.projector_type = projector_type
    quantize, made.quantize = made.quantize, None
    model = on_meta(made)  # dense
    made.quantize = quantize
    return made, model


def _plan_language(
    tensors: Tensors, model: nn.Module, names: list[str], added: Mapping[str, int]
) -> None:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in names:
        if not name.startswith((_DECODER, _HEAD)):
            continue
        source = name if name == _HEAD else f"model.{name.removeprefix(_DECODER)}"
        if source not in (_EMBEDDING, _HEAD):
            tensors.copy(name, source, shapes[name])
        elif source == _HEAD and (name in tied or tied.get(f"{_DECODER}embed_tokens.weight")):
            _take_tied(tensors)
        else:
            _plan_grown(tensors, name, source, shapes[name])
    if added:
        words = ", ".join(f"{word} (id {token})" for word, token in added.items())
        tensors.note(f"the tokenizer gets {words}")


def _take_tied(tensors: Tensors) -> None:
    """Take a head that is the embedding: files may have it, and are not to differ."""
    if _HEAD not in tensors.headers:
        return
    tensors.take(_HEAD, tensors.headers[_EMBEDDING].shape)
    where = tensors.where

    def expect_same(embedding: Tensor, head: Tensor) -> None:
        if not torch.equal(embedding, head):
            raise ValueError(
                f"{where}: {_HEAD}: expected the values of {_EMBEDDING}, since config.json ties "
                "them, got others"
            )

    tensors.check((_EMBEDDING, _HEAD), expect_same)


def _plan_grown(tensors: Tensors, name: str, source: str, shape: tuple[int, ...]) -> None:
    """Plan a table of rows by token, with the mean of its rows for tokens that it lacks."""
    rows = tensors.headers[_EMBEDDING].shape[0]
    dtype = tensors.take(source, (rows, *shape[1:]))
    make = partial(_grown, shape[0] - rows)
    tensors.make([Output(name, shape, dtype)], [source], make)


def _grown(more: int, table: Tensor) -> tuple[Tensor]:
    if not more:
        return (table,)
    mean = table.mean(dim=0, dtype=torch.promote_types(table.dtype, torch.float32))
    return (torch.cat([table, mean.to(table.dtype).expand(more, -1)]),)


def _plan_tower(tower: TowerFolder, model: nn.Module, names: list[str]) -> Plan:
    headers = {n: h for n, h in tower.weights.headers.items() if not n.startswith(_BESIDE)}
    tensors = Tensors(headers, str(tower.folder))
    inner = any(name.startswith(_INNER) for name in headers)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in names:
        if name.startswith(_TOWER):
            own = name.removeprefix(_TOWER).removeprefix(_INNER)
            tensors.copy(name, f"{_INNER if inner else ''}{own}", shapes[name])
    return tensors.plan()
