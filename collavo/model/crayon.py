"""What turns transformers' LLaVA classes into CoLLaVO classes: mixins that go in front of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from collavo.model.described import describe_llava
from collavo.model.layer import BRANCHES
from collavo.model.pretrained import SavedWhole
from collavo.model.rows import CrayonRows, flatten_rows
from collavo.model.turns import is_packed, new_images, repeat_images
from collavo_kernels.nn import (
    CrayonInputs,
    CrayonPrompt,
    interval_range,
    is_prefill_mask,
    read_prefill_mask,
)

CRAYON_INPUTS = ("crayon_index", "crayon_class", "crayon_number")


class CrayonModelMixin:
    """Put before ``LlavaModel``: makes the crayon table once and sends it to every layer."""

    config: Any
    training: bool
    language_model: nn.Module
    crayon_prompt: CrayonPrompt | None
    # The decoder's adapters in the order of the mask's bits, and those for image tokens only.
    crayon_adapters: tuple[str, ...]
    crayon_image_adapters: tuple[str, ...]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        crayon_index: Tensor | None = None,
        crayon_class: Tensor | None = None,
        crayon_number: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run LLaVA's forward with the crayon; inputs as in ``CrayonGenerationMixin.forward``."""
        images = self.image_tokens(input_ids, inputs_embeds)
        if input_ids is None and pixel_values is None:
            self._check_images_are_found(images, past_key_values, kwargs)
        table, index = self._crayon_table(images, crayon_index, crayon_class, crayon_number)
        fused, key_range = self._fused(
            attention_mask, position_ids, past_key_values, images.shape[1]
        )
        adapter_mask, row_mask = self._adapter_masks(images, table)
        crayon = CrayonInputs(table, index, adapter_mask, row_mask, key_range, fused)
        return super().forward(  # type: ignore[misc]
            input_ids,
            pixel_values,
            # A fused prefill has the key range; a mask of S x S elements would be made for nothing.
            None if fused else attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            *args,
            crayon=crayon,
            **kwargs,
        )

    def image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return bool ``[B, S]``: where the image's tokens stand.

        Args:
            input_ids: int64 ``[B, S]`` or None.
            inputs_embeds: ``[B, S, hidden_size]``, read where there are no ids. An image token is
                one that has the embedding of ``config.image_token_id``: none where features have
                taken its place.

        Raises:
            ValueError: if both are None.
        """
        if input_ids is not None:
            return cast(Tensor, input_ids == self.config.image_token_id)
        if inputs_embeds is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        embed = cast(Any, self).get_input_embeddings()
        token = torch.full(
            (), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device
        )
        return cast(Tensor, (inputs_embeds == embed(token)).all(-1))

    def _check_images_are_found(self, images: Tensor, cache: Any, inputs: dict[str, Any]) -> None:
        """Raise where adapters of image tokens would miss images that stand in the embeddings."""
        if not self.crayon_image_adapters or inputs.get("mm_encoder_outputs"):
            return
        is_prefill = cache is None or int(cache.get_seq_length()) == 0
        if is_prefill and not bool(images.any()):
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
        text = self.config.get_text_config()
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


class CrayonGenerationMixin(SavedWhole):
    """Put before ``LlavaForConditionalGeneration``: the crayon in ``forward`` and ``generate``."""

    config: Any
    model: nn.Module

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        crayon_index: Tensor | None = None,
        crayon_class: Tensor | None = None,
        crayon_number: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; what is not described here is LLaVA's.

        Args:
            input_ids: int64 ``[B, L]``, the image token repeated once per grid cell.
            pixel_values: ``[images, 3, height, width]``.
            attention_mask: ``[B, L]``.
            position_ids: int64 ``[B, L]``.
            past_key_values: The cache.
            inputs_embeds: ``[B, L, hidden_size]`` in place of ``input_ids``.
            vision_feature_layer: As in LLaVA.
            vision_feature_select_strategy: As in LLaVA.
            labels: int64 ``[B, L]``, -100 = no loss.
            logits_to_keep: As in LLaVA.
            image_sizes: As in LLaVA.
            crayon_index: int32 ``[B, P]``: the row, local to the sample, of each of its image
                tokens in order; -1 = none.
            crayon_class: int32 ``[B, R]``: per row 0 = unknown, class c is c + 1; -1 = the row only
                pads.
            crayon_number: int32 ``[B, R]``: per row the instance number, 0 = unknown.
            **kwargs: As in LLaVA.

        Raises:
            ValueError: if one of the crayon's inputs is missing or does not fit the others.
        """
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            crayon_index=crayon_index,
            crayon_class=crayon_class,
            crayon_number=crayon_number,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Leave images and their crayon out of every step that reads them from the cache.

        A later turn may bring its new images alone or those of the whole conversation. The
        parameters have the names that transformers looks for (``generate(inputs_embeds=...)``).
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        cached = kwargs.get("use_cache", True)
        if not is_first_iteration and cached:
            dropped: tuple[str, ...] = CRAYON_INPUTS
        elif self._image_is_cached(inputs):
            dropped = (*CRAYON_INPUTS, "pixel_values", "mm_encoder_outputs")
        else:
            dropped = ()
            inputs |= new_images(inputs, input_ids, self.config)
        return {name: value for name, value in inputs.items() if name not in dropped}

    def _image_is_cached(self, inputs: dict[str, Any]) -> bool:
        """Tell whether this is a later turn of a conversation whose new tokens hold no image."""
        cache, tokens = inputs.get("past_key_values"), inputs.get("input_ids")
        if cache is None or tokens is None or int(cache.get_seq_length()) == 0:
            return False
        return not bool((tokens == self.config.image_token_id).any())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat every input for the beams, the images of a sample together.

        transformers repeats image by image: where a sample has several, beams would mix them up.
        """
        pixels = model_kwargs.get("pixel_values")
        expanded, inputs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if expand_size > 1 and pixels is not None:
            embeds = model_kwargs.get("inputs_embeds")
            # Beside embeddings the ids are those of the answer so far: none.
            ids = input_ids if embeds is None else None
            tokens = cast(Any, self.model).image_tokens(ids, embeds).sum(1)
            inputs["pixel_values"] = repeat_images(pixels, tokens, expand_size)
        return expanded, inputs

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        """Keep from an assistant model the inputs that its forward does not know.

        It has no use for them: transformers gives an assistant no images, however it is called.
        """
        if assistant_model is not None:
            known = inspect.signature(assistant_model.forward).parameters
            unknown = {name for name in (*CRAYON_INPUTS, "pixel_values") if name not in known}
            model_kwargs = {k: v for k, v in model_kwargs.items() if k not in unknown}
        return super()._get_candidate_generator(  # type: ignore[misc]
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def saved_config(self) -> Any:
        """Return the configuration to save; that of a patched LLaVA says what was done to it."""
        settings = getattr(self, "crayon_settings", None)
        return self.config if settings is None else describe_llava(self, settings)

    def crayon_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what CPT trains: queries, crayon MLP and, in projection mode, every A and B."""
        for name, parameter in cast(nn.Module, self).named_parameters():
            if any(part == "crayon_prompt" or part in BRANCHES for part in name.split(".")):
                yield parameter

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of one adapter, over all layers.

        Args:
            name: The adapter's name, e.g. ``"image"``.

        Raises:
            ValueError: if the model has no adapter of that name.
        """
        known = cast(Any, self.model).crayon_adapters
        if name not in known:
            raise ValueError(
                f"name: expected one of the model's adapters {list(known)}, got {name!r}"
            )
        for key, parameter in cast(nn.Module, self).named_parameters():
            parts = key.split(".")
            if name in parts and ("lora_A" in parts or "lora_B" in parts):
                yield parameter
