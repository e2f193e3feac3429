"""What turns transformers' classes into CoLLaVO classes: mixins that go in front of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from collavo.model.adapters import AdaptersMixin
from collavo.model.families import (
    MODALITIES,
    decoder_of,
    encode_images,
    find_tokens,
    image_inputs,
)
from collavo.model.rows import CrayonRows, flatten_rows
from collavo.model.signatures import parameter_names, with_signature
from collavo.model.turns import cached_tokens, encode_for_beams, is_packed, new_images
from collavo_kernels.nn import (
    CrayonInputs,
    CrayonPrompt,
    interval_range,
    is_prefill_mask,
    read_prefill_mask,
)

CRAYON_INPUTS = ("crayon_index", "crayon_class", "crayon_number")
# With it in a signature transformers would encode images before turns are sorted.
_HIDDEN = ("mm_encoder_outputs",)
# Of this thread's forward alone: what its images were encoded to before it began, by modality.
_ENCODED: ContextVar[Mapping[str, Any]] = ContextVar("encoded_images", default={})  # noqa: B039


class CrayonModelMixin:
    """Put before a model class without a head: makes the crayon table once for every layer."""

    config: Any
    training: bool
    crayon_prompt: CrayonPrompt | None
    # The decoder's adapters in the order of the mask's bits, and those for image tokens only.
    crayon_adapters: tuple[str, ...]
    crayon_image_adapters: tuple[str, ...]
    # Whether its attention has the fused prefill: its own masks are not needed then.
    crayon_fused: bool = True
    _forward_names: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class the signatures of the one that the mixin stands before."""
        super().__init_subclass__(**kwargs)
        if CrayonModelMixin not in cls.__bases__:
            return
        behind: Any = super()
        cls._forward_names = parameter_names(behind.forward)
        made: Any = cls
        made.forward = with_signature(cls.forward, behind.forward, CRAYON_INPUTS, _HIDDEN)
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if hasattr(behind, name):
                encode = with_signature(_encoder(modality), getattr(behind, name))
                setattr(cls, name, encode)

    def forward(
        self,
        *args: Any,
        crayon_index: Tensor | None = None,
        crayon_class: Tensor | None = None,
        crayon_number: Tensor | None = None,
        encoded_images: Mapping[str, Any] | None = None,
        encode_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model's forward with the crayon.

        Args:
            *args: The model's own inputs.
            crayon_index: As in ``CrayonGenerationMixin.forward``, like the next two.
            crayon_class: See there.
            crayon_number: See there.
            encoded_images: What to take in place of the model's own ``get_image_features`` and
                ``get_video_features``, by modality ("image", "video").
            encode_only: Whether to return these and do no more.
            **kwargs: The model's own inputs.
        """
        if len(args) > len(self._forward_names):
            raise TypeError(
                f"forward: expected at most {len(self._forward_names)} positional inputs, got "
                f"{len(args)}"
            )
        inputs = dict(zip(self._forward_names, args, strict=False)) | kwargs
        if encode_only:
            return encode_images(self, inputs)
        given = (inputs.get("input_ids"), inputs.get("inputs_embeds"))
        images = self.image_tokens(*given)
        cache = inputs.get("past_key_values")
        if given[0] is None and not image_inputs(self, inputs):
            self._check_images_are_found(images, cache, inputs)
        table, index = self._crayon_table(images, crayon_index, crayon_class, crayon_number)
        fused, key_range = self._fused(
            inputs.get("attention_mask"), inputs.get("position_ids"), cache, images.shape[1]
        )
        adapter_mask, row_mask = self._adapter_masks(images, table)
        inputs["crayon"] = CrayonInputs(table, index, adapter_mask, row_mask, key_range, fused)
        if fused:
            # It has the key range; a mask of S x S elements would be made for nothing.
            inputs["attention_mask"] = None
        if not encoded_images:
            return super().forward(**inputs)  # type: ignore[misc]
        token = _ENCODED.set(encoded_images)
        try:
            return super().forward(**inputs)  # type: ignore[misc]
        finally:
            _ENCODED.reset(token)

    def image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return bool ``[B, S]``: where the tokens of images and videos stand.

        Args:
            input_ids: int64 ``[B, S]`` or None.
            inputs_embeds: ``[B, S, hidden_size]``, read where there are no ids. An image token is
                one that has the embedding of ``config.image_token_id``: none where features have
                taken its place.

        Raises:
            ValueError: if both are None.
        """
        found = list(find_tokens(self, input_ids, inputs_embeds).values())
        return found[0] if len(found) == 1 else found[0] | found[1]

    def _check_images_are_found(self, images: Tensor, cache: Any, inputs: dict[str, Any]) -> None:
        """Raise where adapters of image tokens would miss images that stand in the embeddings."""
        if not self.crayon_image_adapters or inputs.get("mm_encoder_outputs"):
            return
        if cached_tokens(cache) == 0 and not bool(images.any()):
            raise ValueError(
                "inputs_embeds: expected embeddings of image tokens with pixel_values, or "
                f"input_ids, since the adapters {list(self.crayon_image_adapters)} act on image "
                "tokens alone; got neither: where features are merged in already no image token "
                "can be found"
            )

    def _crayon_table(
        self,
        images: Tensor,
        crayon_index: Tensor | None,
        crayon_class: Tensor | None,
        crayon_number: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        given = (crayon_index, crayon_class, crayon_number)
        if self.crayon_prompt is None:
            return None, None
        if all(value is None for value in given):
            return self._idle_table(images)
        if crayon_index is None or crayon_class is None or crayon_number is None:
            missing = [n for n, v in zip(CRAYON_INPUTS, given, strict=True) if v is None]
            raise ValueError(
                f"{missing[0]}: expected all of {', '.join(CRAYON_INPUTS)} or none of them"
            )
        rows = flatten_rows(images, crayon_index, crayon_class, crayon_number)
        # Called, not asked: offload brings weights to a module when it is called.
        return self.crayon_prompt(rows), rows.row_index

    def _idle_table(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return, in training, a table whose one row no token has, else None twice.

        The crayon's gradient is then zero, not absent: FSDP2 reduces the gradients that there are,
        and fails where one rank's batch has images and another's has none.
        """
        if self.crayon_prompt is None or not (self.training and torch.is_grad_enabled()):
            return None, None
        row = torch.zeros(1, dtype=torch.int32, device=images.device)
        index = torch.full_like(images, -1, dtype=torch.int32)
        return self.crayon_prompt(CrayonRows(row, row, index)), index

    def _fused(
        self, attention_mask: Any, position_ids: Tensor | None, past_key_values: Any, length: int
    ) -> tuple[bool, Tensor | None]:
        if not self.crayon_fused:
            return False, None
        text: Any = decoder_of(self).config
        dropout = self.training and bool(getattr(text, "attention_dropout", 0.0))
        if dropout or text._attn_implementation not in ("sdpa", "crayon"):
            return False, None
        # A static cache counts on its device: asking it at every token would wait for a GPU.
        if past_key_values is not None and (
            length == 1 or int(past_key_values.get_seq_length()) > 0
        ):
            return False, None
        # ``generate`` makes them early for a static cache, one for each kind of layer.
        masks = attention_mask.values() if isinstance(attention_mask, dict) else [attention_mask]
        early = [mask for mask in masks if is_prefill_mask(mask)]
        if early and all(mask is None or is_prefill_mask(mask) for mask in masks):
            return True, read_prefill_mask(early[0])[0]
        if isinstance(attention_mask, Tensor):
            if attention_mask.shape[-1] != length:
                return False, None
        elif attention_mask is not None or is_packed(position_ids, attention_mask):
            return False, None
        return interval_range(attention_mask)

    def _adapter_masks(
        self, images: Tensor, table: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the adapter bits of tokens ``[B, S]`` and of rows ``[T]``, on which all act."""
        if not self.crayon_image_adapters:
            return None, None
        everywhere = 0
        for bit, name in enumerate(self.crayon_adapters):
            everywhere |= 0 if name in self.crayon_image_adapters else 1 << bit
        on_image = (1 << len(self.crayon_adapters)) - 1
        mask = torch.where(images, on_image, everywhere).to(torch.uint8)
        if table is None:
            return mask, None
        return mask, torch.full((table.shape[0],), on_image, dtype=torch.uint8, device=mask.device)


def _encoder(modality: str) -> Any:
    """Return a model's function that encodes images, which gives what is encoded already."""

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoded = _ENCODED.get().get(modality)
        if encoded is not None:
            return encoded
        behind: Any = super(CrayonModelMixin, self)
        return getattr(behind, f"get_{modality}_features")(*args, **kwargs)

    return encode


class CrayonGenerationMixin(AdaptersMixin):
    """Put before a class ``...ForConditionalGeneration``: crayon in ``forward``, ``generate``."""

    config: Any
    model: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class the signatures of the one that the mixin stands before."""
        super().__init_subclass__(**kwargs)
        if CrayonGenerationMixin not in cls.__bases__:
            return
        behind, made = cast(Any, super()), cast(Any, cls)
        made.forward = with_signature(cls.forward, behind.forward, CRAYON_INPUTS, _HIDDEN)
        for name in ("generate", "prepare_inputs_for_generation"):
            setattr(cls, name, with_signature(getattr(cls, name), getattr(behind, name)))

    def forward(
        self,
        *args: Any,
        crayon_index: Tensor | None = None,
        crayon_class: Tensor | None = None,
        crayon_number: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; its signature has the model's own inputs and the crayon's three.

        Args:
            *args: As in the model's own forward: ``input_ids`` int64 ``[B, L]``, the image token
                repeated once per feature of the image, ...
            crayon_index: int32 ``[B, P]``: the row, local to the sample, of each of its image
                tokens in order; -1 = none. Tokens of videos count as image tokens, and so do
                those that end a line of an image (row -1), where the model gives them features.
            crayon_class: int32 ``[B, R]``: per row 0 = unknown, class c is c + 1; -1 = the row only
                pads.
            crayon_number: int32 ``[B, R]``: per row the instance number, 0 = unknown.
            **kwargs: As in the model's own forward.

        Raises:
            ValueError: if one of the crayon's inputs is missing or does not fit the others.
        """
        crayon = {
            "crayon_index": crayon_index,
            "crayon_class": crayon_class,
            "crayon_number": crayon_number,
        }
        return super().forward(*args, **crayon, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does.

        Args:
            *args: As in the model's own.
            **kwargs: As in the model's own, and the crayon's inputs.

        Raises:
            ValueError: if the crayon is given where a model draws images: that loop has no use for
                one.
        """
        mode = kwargs.get("generation_mode", "text")
        given = [name for name in CRAYON_INPUTS if kwargs.get(name) is not None]
        if mode != "text" and given:
            raise ValueError(
                f"generation_mode: expected 'text' beside {', '.join(given)}, got {mode!r}, which "
                "reads no images; leave the crayon's inputs out"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Leave images and their crayon out of every step that reads them from the cache.

        A later turn may bring its new images alone or those of the whole conversation.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, **kwargs
        )
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            dropped: set[str] = {*CRAYON_INPUTS, "encoded_images"}
        elif self._image_is_cached(inputs):
            given = image_inputs(self.model, inputs).values()
            dropped = {*CRAYON_INPUTS, *_HIDDEN, "encoded_images"}.union(*given)
        else:
            dropped = set()
            inputs |= new_images(self.model, inputs, input_ids)
        return {name: value for name, value in inputs.items() if name not in dropped}

    def _image_is_cached(self, inputs: dict[str, Any]) -> bool:
        """Tell whether this is a later turn of a conversation whose new tokens hold no image."""
        tokens = inputs.get("input_ids")
        if tokens is None or cached_tokens(inputs.get("past_key_values")) == 0:
            return False
        return not bool(cast(Any, self.model).image_tokens(tokens, None).any())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat every input for the beams; of images, what they are encoded to.

        The tensors of images do not begin with the batch: repeated one by one, beams of samples
        with several images would mix them up.
        """
        given = image_inputs(self.model, model_kwargs) if expand_size > 1 else {}
        images = {name: model_kwargs[name] for names in given.values() for name in names}
        if images:
            # Beside embeddings the ids are those of the answer so far: none.
            ids = input_ids if model_kwargs.get("inputs_embeds") is None else None
            images["encoded_images"] = encode_for_beams(self.model, model_kwargs, ids, expand_size)
        expanded, inputs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **{name: value for name, value in model_kwargs.items() if name not in images},
        )
        return expanded, inputs | images

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        """Keep from an assistant model the inputs that its forward does not know.

        It has no use for them: transformers gives an assistant no images, however it is called.
        """
        if assistant_model is not None:
            known = inspect.signature(assistant_model.forward).parameters
            own = {*CRAYON_INPUTS, "encoded_images"}
            own = own.union(*image_inputs(self.model, model_kwargs).values()) - set(known)
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in own}
        return super()._get_candidate_generator(  # type: ignore[misc]
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
