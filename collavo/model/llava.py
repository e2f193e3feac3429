"""CoLLaVO on transformers' LLaVA classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)

from collavo.configuration import CollavoConfig, CollavoTextConfig
from collavo.model import text as _registers_text_model  # noqa: F401
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.described import update_settings
from collavo.model.layer import trainable_dtype
from collavo.model.linear import init_leaf
from collavo.model.pretrained import LoadedWhole, SavedWhole
from collavo_kernels.nn import CrayonPrompt


class CollavoModel(CrayonModelMixin, LoadedWhole, SavedWhole, LlavaModel):  # type: ignore[misc]
    """CLIP tower, projector, crayon prompt and decoder, without the language-model head.

    Args:
        config: The configuration.
    """

    config_class = CollavoConfig
    config: CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        super().__init__(config)
        if config.vision_config.model_type == "clip_vision_model":
            # Before transformers 5.6 it is a module in a module: tensors would have other names.
            self.vision_tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        if config.projector_type == "linear":
            made = self.multi_modal_projector.linear_1  # the same two widths
            cast(Any, self).multi_modal_projector = nn.Linear(
                made.in_features, made.out_features, bias=config.multimodal_projector_bias
            )
        self.crayon_adapters = tuple(config.adapters)
        self.crayon_image_adapters = tuple(config.image_adapters)
        self.crayon_prompt: CrayonPrompt | None = None
        if config.crayon_mode != "none":
            self.crayon_prompt = CrayonPrompt(
                config.num_crayon_classes,
                config.max_crayon_number,
                config.crayon_embed_dim or config.vision_config.hidden_size,
                config.text_config.hidden_size,
                zero_init=config.crayon_mode == "attention",
                dtype=trainable_dtype(config.text_config),
            )
            if config.crayon_mode == "attention":
                cast(Any, self.crayon_prompt.mlp[-1]).starts_at_zero = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring; one factor on the crayon's path starts at zero."""
        if not init_leaf(module):
            super()._init_weights(module)

    def saved_config(self) -> CollavoConfig:
        """Return the configuration, after it has followed what crayon and adapters are now."""
        update_settings(self.config.text_config, self, self.language_model)
        return self.config


class CollavoForConditionalGeneration(  # type: ignore[misc]
    CrayonGenerationMixin, LoadedWhole, LlavaForConditionalGeneration
):
    r"""The CoLLaVO vision-language model.

    Image tokens carry the panoptic segment they lie in: the Crayon Prompt, one vector per segment,
    joins every decoder layer (``config.crayon_mode``). All inputs are batch-first and padded; see
    ``forward``.

    Args:
        config: The configuration; the weights are made in its ``dtype`` where it says one.

    Source: arXiv 2402.11248.

    Example:
        >>> import torch
        >>> from transformers import CLIPVisionConfig
        >>> vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, image_size=8, patch_size=4)
        >>> text = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> config = CollavoConfig(vision_config=vision, text_config=text, image_token_index=31,
        ...     vision_feature_layer=-1)
        >>> model = CollavoForConditionalGeneration(config)
        >>> output = model(torch.tensor([[1, 31, 31, 31, 31, 5]]), torch.randn(1, 3, 8, 8),
        ...     crayon_index=torch.tensor([[0, 1, 1, -1]]), crayon_class=torch.tensor([[0, 18]]),
        ...     crayon_number=torch.tensor([[0, 1]]))
        >>> output.logits.shape
        torch.Size([1, 6, 32])
    """

    config_class = CollavoConfig
    config: CollavoConfig
    model: CollavoModel

    def __init__(self, config: CollavoConfig) -> None:
        # LLaVA's own constructor builds a LlavaModel.
        LlavaPreTrainedModel.__init__(self, config)
        # Else the released model, which has 18.6 GB, would take twice that.
        with _made_in(getattr(config, "dtype", None)):
            self.model = CollavoModel(config)
            text = config.text_config
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def saved_config(self) -> CollavoConfig:
        """Return the configuration, after it has followed what crayon and adapters are now."""
        update_settings(self.config.text_config, self, self.model.language_model)
        return self.config

    def decoder_settings(self) -> CollavoTextConfig:
        """Return what the decoder's layers are."""
        return self.config.text_config

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize embedding and head together, as in LLaVA.

        Raises:
            ValueError: if the embedding has rows the head has not; no one size would describe both.
        """
        if args and args[0] is not None and self.config.extra_embeddings:
            raise ValueError(
                f"resize_token_embeddings: the embedding has {self.config.extra_embeddings} row(s) "
                "beyond the output head (config.extra_embeddings), so one size cannot describe both"
            )
        return super().resize_token_embeddings(*args, **kwargs)


@contextmanager
def _made_in(dtype: torch.dtype | str | None) -> Iterator[None]:
    """Make floating tensors in a dtype; None leaves PyTorch's default."""
    default = torch.get_default_dtype()
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        torch.set_default_dtype(wanted or default)
        yield
    finally:
        torch.set_default_dtype(default)


AutoModel.register(CollavoConfig, CollavoModel, exist_ok=True)
AutoModelForImageTextToText.register(CollavoConfig, CollavoForConditionalGeneration, exist_ok=True)
