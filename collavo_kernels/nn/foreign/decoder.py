"""Where in somebody else's model the language decoder is, and its attention modules."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from collavo_kernels.nn.crayon_linears import qkv_names, qkv_words


class Decoder(NamedTuple):
    """The language decoder of a model.

    Attributes:
        module: What is called with token ids or embeddings and runs the layers.
        layers: Its layers, by their names in the model.
        attentions: One attention module per layer, by its name in the model.
    """

    module: nn.Module
    layers: dict[str, nn.Module]
    attentions: dict[str, nn.Module]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder: the module nearest to the input embedding that holds a list of layers.

    Vision towers have layers with the same names; the embedding of token ids is not theirs.

    Args:
        model: Any, or a wrapper around it, whose ``get_input_embeddings()`` is the embedding of
            token ids.

    Raises:
        TypeError: if it is no module.
        ValueError: if no list of layers, or more than one, is next to the embedding, or a layer
            has not exactly one attention with linear layers for q, k and v; it is named.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    path = _embedding_path(model, modules)
    while True:
        path = path.rpartition(".")[0]
        lists = _layer_lists(path, modules)
        if lists:
            break
        if not path:
            raise ValueError(
                f"model: expected a {type(model).__name__} with a list of decoder layers beside "
                f"its input embedding, each with {qkv_words()}; found none"
            )
    if len(lists) > 1:
        raise ValueError(f"model: expected one list of decoder layers, got {', '.join(lists)}")
    ((name, layers),) = lists.items()
    named = {f"{name}.{i}": layer for i, layer in layers.named_children()}
    return Decoder(modules[path], named, dict(_attention_of(n, m) for n, m in named.items()))


def _embedding_path(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Return where the embedding of token ids is, as the outermost module that knows says."""
    paths: dict[str, str] = {}
    for name, module in modules.items():  # wrappers (DDP, DeepSpeed) do not hand the question on
        known = any(not outer or name.startswith(f"{outer}.") for outer in paths)
        embedding = None if known else _embedding(module)
        path = next((n for n, m in modules.items() if m is embedding), None)
        if path is not None:
            paths[name] = path
    if len(set(paths.values())) == 1:
        return next(iter(paths.values()))
    found = ", ".join(paths.values()) or "none"
    raise ValueError(
        f"model: expected one whose get_input_embeddings() says which layers are the language "
        f"decoder's, got a {type(model).__name__} with {found}; pass the language model in it"
    )


def _embedding(module: nn.Module) -> nn.Module | None:
    """Return a module's input embedding; None for a vision tower, whose input is pixels."""
    ask = getattr(module, "get_input_embeddings", None)
    try:
        found = None if ask is None else ask()
    except (AttributeError, NotImplementedError):  # what transformers' base class does
        return None
    pixels = isinstance(found, nn.Linear) or hasattr(found, "kernel_size")
    return found if isinstance(found, nn.Module) and not pixels else None


def _layer_lists(path: str, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return lists of layers under a module: its own where it has one, else those further down."""
    prefix = f"{path}." if path else ""
    lists: dict[str, nn.Module] = {
        name: module
        for name, module in modules.items()
        if name.startswith(prefix) and isinstance(module, nn.ModuleList) and _attends(module)
    }
    own = {name: module for name, module in lists.items() if "." not in name[len(prefix) :]}
    return own or lists


def _attends(layers: nn.Module) -> bool:
    return any(qkv_names(module) for module in layers.modules())


def _attention_of(name: str, layer: nn.Module) -> tuple[str, nn.Module]:
    found = {
        ".".join(filter(None, (name, inner))): module
        for inner, module in layer.named_modules()
        if qkv_names(module)
    }
    if len(found) != 1:
        raise ValueError(
            f"{name}: expected one attention with {qkv_words()}, got "
            f"{', '.join(found) or f'none in a {type(layer).__name__}'}"
        )
    return next(iter(found.items()))
