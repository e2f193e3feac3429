"""The decoders that can carry the crayon, and where it joins in each."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from torch import nn

Path = Literal["fused", "linear"]


class DecoderPaths(NamedTuple):
    """Where the crayon joins in a decoder layer.

    Attributes:
        attention: ``"fused"``: ``CrayonAttention`` takes the attention's place. ``"linear"``: the
            crayon joins inside of its linear layers, and its own forward runs.
        layer: ``"fused"``: the forwards of layer and MLP are ours, which hand on the crayon.
            ``"linear"``: they are transformers' own.
    """

    attention: Path
    layer: Path


DECODERS: dict[str, DecoderPaths] = {
    "Llama": DecoderPaths("fused", "fused"),
    "Mistral": DecoderPaths("fused", "fused"),
    "Qwen2": DecoderPaths("fused", "fused"),
    "Granite": DecoderPaths("fused", "linear"),  # a factor on what joins the residual stream
    "SmolLM3": DecoderPaths("fused", "linear"),  # layers that do not rotate
    "Qwen3": DecoderPaths("linear", "linear"),  # norms of q and k, after the addition
    "Phi3": DecoderPaths("linear", "linear"),  # fused qkv_proj and gate_up_proj
    "Olmo2": DecoderPaths("linear", "linear"),  # norms of all of q and k, and behind either part
}
"""By what the classes are called whose forwards attention, layer and MLP have."""

# The attention first: it tells which decoder this is.
_PARTS = {"self_attn": "Attention", "": "DecoderLayer", "mlp": "MLP"}


def decoder_paths(decoder: nn.Module) -> DecoderPaths:
    """Return where the crayon joins in a decoder that is not patched.

    Args:
        decoder: With ``layers``.

    Raises:
        ValueError: naming a forward that the crayon does not know: look-alikes compute something
            else.
    """
    family = None
    for layer in cast(nn.ModuleList, decoder.layers):
        for name, part in _PARTS.items():
            module = layer if not hasattr(layer, name or "mlp") else layer.get_submodule(name)
            # transformers and FSDP wrap the forward of every subclass; what counts is who wrote it.
            forward: Any = inspect.unwrap(type(module).forward)
            wrote = forward.__qualname__.removesuffix(".forward")
            if family is None and wrote.removesuffix(part) in DECODERS:
                family = wrote.removesuffix(part)
            _check_owner(forward, part, family)
    return DECODERS[cast(str, family)]


def _check_owner(forward: Any, part: str, family: str | None) -> None:
    known = "one of " + ", ".join(DECODERS) if family is None else f"{family}'s {part}"
    owner = f"{forward.__module__}.{forward.__qualname__}"
    if not forward.__module__.startswith("transformers."):
        raise ValueError(
            f"model: expected a forward that transformers wrote, {known}, got {owner}, which the "
            "crayon does not know; load the model without the package that patches it"
        )
    if family is None or forward.__qualname__ != f"{family}{part}.forward":
        raise ValueError(
            f"model: expected a decoder of transformers, {known}, got {owner}, which may compute "
            "something else; crayon_context of collavo_kernels.nn gives a crayon to any decoder "
            'with linear layers for q, k and v, and attn_implementation="crayon" runs this '
            "package's attention in it"
        )
