"""The crayon for a forward pass of somebody else's model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from collavo_kernels._validation import describe, expect_tensor
from collavo_kernels.nn.attention.module import CrayonAttention
from collavo_kernels.nn.attention.projections import CrayonInputs
from collavo_kernels.nn.bound import bound_crayon, current_crayon
from collavo_kernels.nn.crayon_linears import (
    CrayonLinearMixin,
    add_crayon_to_linears,
    qkv_names,
    remove_crayon_from_linears,
)
from collavo_kernels.nn.foreign.checkpoints import keep_crayon, refuse_lost_crayon
from collavo_kernels.nn.foreign.decoder import Decoder, find_decoder
from collavo_kernels.nn.foreign.placing import PlacedRows, place_rows
from collavo_kernels.nn.foreign.positions import ImagePositions
from collavo_kernels.nn.linear import has_own_forward

_HAS_ITS_OWN = (
    "crayon_context: the model hands crayons to its layers itself (apply_to_llava, "
    "CollavoForConditionalGeneration); give it crayon_index, crayon_class and crayon_number, and "
    "leave crayon_context out"
)


class _Held:
    """A context's crayon, for the forward passes of one decoder."""

    def __init__(self, decoder: nn.Module, table: Tensor, placed: PlacedRows) -> None:
        self.decoder, self.table, self.placed = decoder, table, placed
        self.used = self.left = False

    def crayon_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CrayonInputs | None:
        """Return the crayon of a forward pass; None for what goes on from a filled cache."""
        if args:
            named = inspect.signature(self.decoder.forward).bind_partial(*args, **kwargs).arguments
            kwargs = {**named, **named.get("kwargs", {})}
        x = kwargs.get("inputs_embeds")
        x = kwargs.get("input_ids") if x is None else x
        if not isinstance(x, Tensor):
            raise ValueError(
                f"crayon_context: expected a {type(self.decoder).__name__} that is called with "
                f"inputs_embeds or input_ids, got {', '.join(kwargs) or 'nothing'}"
            )
        if x.shape[1] == 1 or _is_filled(kwargs.get("past_key_values")):
            return None
        crayon = self._of_sequences(x, kwargs.get("attention_mask"))
        self.used = True
        return crayon

    def _of_sequences(self, x: Tensor, attention_mask: Any) -> CrayonInputs:
        (batch, length), placed = x.shape[:2], self.placed
        own = placed.positions.shape[0]
        repeats = batch // max(own, 1)
        expected = length if placed.length is None else placed.length
        # Beams are copies beside each other; another order would put rows on other samples' tokens.
        fits = batch == own or (batch == own * repeats and _is_repeated(x, repeats))
        if length != expected or not fits:
            raise ValueError(
                f"image_positions: expected a forward pass of {own} samples of {expected} tokens, "
                f"got {batch} of {length}; enter a crayon_context of its own for it"
            )
        if placed.length is None and bool((placed.positions >= length).any()):
            raise ValueError(
                f"image_positions: expected positions below {length}, the tokens of a sample, got "
                f"{int(placed.positions.max())}"
            )
        index = placed.row_index(length, repeats).to(x.device)
        if isinstance(attention_mask, Tensor) and attention_mask.shape == index.shape:
            padded = (index >= 0) & ~attention_mask.to(x.device).bool()
            if bool(padded.any()):
                sample, token = padded.nonzero()[0].tolist()
                raise ValueError(
                    "image_positions: expected no image token at padding, got one in sample "
                    f"{sample}, token {token}; were they found with the same padding side?"
                )
        return CrayonInputs(table=self.table.to(x.device), row_index=index)


class _Running(NamedTuple):
    """A decoder's forward pass that has not ended, and what it was given."""

    decoder: nn.Module
    crayon: CrayonInputs | None
    binding: AbstractContextManager[None]


# Of this thread alone, the last one entered first.
_HELD: ContextVar[tuple[_Held, ...]] = ContextVar("crayon_contexts", default=())
_RUNNING: ContextVar[tuple[_Running, ...]] = ContextVar("running_decoders", default=())
_INSTALLING = threading.Lock()


@contextmanager
def crayon_context(
    model: nn.Module,
    crayon: tuple[Tensor, Tensor | Sequence[Tensor]] | CrayonInputs,
    image_positions: ImagePositions | Tensor,
) -> Iterator[None]:
    r"""Give the forward passes of somebody else's model a crayon, in this thread.

    ``q = W_q (h + c[row])``, and so k and v, in every layer of the language decoder, for code that
    merges image features into ``inputs_embeds`` itself: the original LLaVA and its descendants, or
    any decoder whose q, k and v (or fused ``qkv_proj``) are linear layers, with adapters on them
    or not. ``CrayonAttention`` in it gets the crayon as its argument. Prefills and training take
    it; decode steps, and whatever goes on from a filled cache, are left alone.

    The first time, layers for q, k and v get a class of their own that adds a crayon where there is
    one, and the checkpoint functions of the decoder keep it for the backward; outside of a context
    the model computes what it did. A thread that is started inside has no context: enter one in it.

    Args:
        model: What is called, or a wrapper around it.
        crayon: The table ``[T, hidden_size]`` (``CrayonPrompt``'s output), floating, and the row of
            each image token: int32 or int64 ``[images, P]`` (``CrayonMap.row_index``) or a list of
            one ``[P]`` per image, in the order of the batch's images; -1 = none (a newline token).
            A ``CrayonInputs`` has the rows of whole sequences, ``[B, S]``.
        image_positions: What ``find_image_positions`` returns, a mask bool ``[B, S]`` of the image
            tokens, or int32 or int64 ``[B, P]``, the place of each entry of a row index
            ``[B, P]`` in its sequence, -1 = left out.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: on entry, if positions and crayon disagree, there is a layer whose q, k and v
            cannot take it, or the model has crayons of its own (``apply_to_llava``); in a forward
            pass, if that is of other sequences, or a checkpoint function is not torch's.
        RuntimeError: on leaving, if no forward pass took the crayon; in a backward, if a
            checkpoint lost it.

    Source: arXiv 2402.11248, section 3.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48,
        ...     num_hidden_layers=1, num_attention_heads=4, vocab_size=16))
        >>> where = torch.tensor([[False, True, True, True, False]])
        >>> crayon = torch.randn(2, 32), torch.tensor([[0, 1, 1]])
        >>> with crayon_context(model, crayon, where):
        ...     model(inputs_embeds=torch.randn(1, 5, 32)).logits.shape
        torch.Size([1, 5, 16])
    """
    table, placed = _read(crayon, image_positions)
    decoder = find_decoder(model)
    for layer in decoder.layers.values():
        if "crayon" in inspect.signature(type(layer).forward).parameters:
            raise ValueError(_HAS_ITS_OWN)
    _check_widths(decoder, table)
    with _INSTALLING:
        _install(decoder)
    held = _Held(decoder.module, table, placed)
    _HELD.set((held, *_open()))
    try:
        yield
    finally:
        # No token: generators leave their contexts in any order, and in other threads.
        held.left = True
        _HELD.set(_open())
    if not held.used:
        raise RuntimeError(
            "crayon_context: expected a forward pass of the model, in this thread, that begins a "
            f"sequence; no {type(decoder.module).__name__} took the crayon. A thread started "
            "inside, or a replica, needs a context of its own"
        )


def _open() -> tuple[_Held, ...]:
    """Return this thread's contexts that have not been left."""
    return tuple(held for held in _HELD.get() if not held.left)


def _read(
    crayon: tuple[Tensor, Tensor | Sequence[Tensor]] | CrayonInputs,
    image_positions: ImagePositions | Tensor,
) -> tuple[Tensor, PlacedRows]:
    given: tuple[Any, ...] = crayon
    if isinstance(crayon, CrayonInputs):
        given = crayon[:2]
        further = list(crayon._asdict().items())[len(given) :]
        extra = [name for name, each in further if each is not None]
        if extra:
            raise ValueError(f"crayon.{extra[0]}: expected None in a crayon_context, got a value")
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(
            "crayon: expected (table, row_index) or CrayonInputs(table=..., row_index=...), got "
            f"{describe(crayon)}; CrayonPrompt's output and CrayonMap.row_index are such a pair"
        )
    table, row_index = given
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    expect_tensor("crayon.table", table, shape=("T", "hidden_size"), dtypes=dtypes)
    whole = isinstance(crayon, CrayonInputs)
    return table, place_rows(row_index, image_positions, count=table.shape[0], whole=whole)


def _check_widths(decoder: Decoder, table: Tensor) -> None:
    for name, attention in decoder.attentions.items():
        for projection in qkv_names(attention):
            layer = getattr(attention, projection)
            width = getattr(layer, "in_features", None)
            if width is None:
                raise ValueError(
                    f"{name}.{projection}: expected a linear layer with in_features, got "
                    f"{type(layer).__name__}"
                )
            if width != table.shape[1]:
                raise ValueError(
                    f"crayon.table: expected [T, {width}], the hidden size of {name}, got "
                    f"{list(table.shape)}"
                )


def _install(decoder: Decoder) -> None:
    """Put on what a crayon needs, wherever it is not there yet (layers may have been replaced)."""
    for name, attention in decoder.attentions.items():
        for projection in qkv_names(attention):
            _check_projection(f"{name}.{projection}", getattr(attention, projection))
    for attention in decoder.attentions.values():
        names = qkv_names(attention)
        wanted = [] if isinstance(attention, CrayonAttention) else list(names)
        for projection in names:
            # Put around a layer later: PEFT's adapters, or CrayonAttention, which adds the crayon.
            outer = getattr(attention, projection)
            remove_crayon_from_linears(
                [m for m in outer.modules() if _carries(m) and (not wanted or m is not outer)]
            )
        missing = [name for name in wanted if not _carries(getattr(attention, name))]
        if missing:
            add_crayon_to_linears(attention, missing)
        if _before_attention not in attention._forward_pre_hooks.values():
            attention.register_forward_pre_hook(_before_attention, with_kwargs=True)
    if _before_decoder not in decoder.module._forward_pre_hooks.values():
        decoder.module.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.module.register_forward_hook(_after_decoder, always_call=True)


def _carries(module: nn.Module) -> bool:
    return isinstance(module, CrayonLinearMixin)


def _check_projection(name: str, layer: nn.Module) -> None:
    if has_own_forward(layer) and not _carries(layer):
        raise ValueError(
            f"{name}: the {type(layer).__name__} has a forward of its own instance (a device map's "
            "hooks, or another patch), which a crayon cannot join; enter the first crayon_context "
            "before that is put on"
        )


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        keep_crayon(decoder)  # checkpointing may have been turned on since
    held = next((each for each in _open() if each.decoder is decoder), None)
    crayon = None if held is None else held.crayon_for(args, kwargs)
    binding = bound_crayon(crayon)
    binding.__enter__()
    _RUNNING.set((_Running(decoder, crayon, binding), *_RUNNING.get()))


def _after_decoder(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    running = _RUNNING.get()
    if running and running[0].decoder is decoder:  # not where another hook raised before ours
        _RUNNING.set(running[1:])
        running[0].binding.__exit__(None, None, None)


def _before_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    refuse_lost_crayon()
    crayon, running = current_crayon(), _RUNNING.get()
    ours = running[0].crayon if running else None
    if ours is not None:
        # A checkpoint replaces the table and keeps the rest.
        hidden = crayon is None or crayon.row_index is not ours.row_index
        if hidden or kwargs.get("crayon") is not None:
            raise ValueError(_HAS_ITS_OWN)
    if crayon is None or not isinstance(attention, CrayonAttention) or kwargs.get("crayon"):
        return None
    return args, {**kwargs, "crayon": crayon}


def _is_filled(cache: Any) -> bool:
    """Tell whether a cache, transformers' or a tuple of each layer's, has tokens."""
    if cache is None or isinstance(cache, tuple | list):
        return bool(cache)
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) > 0


def _is_repeated(x: Tensor, repeats: int) -> bool:
    copies = x.reshape(-1, repeats, *x.shape[1:])
    return bool((copies == copies[:, :1]).all())
