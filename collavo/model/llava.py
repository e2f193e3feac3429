"""CoLLaVO on transformers' LLaVA classes."""

from __future__ import annotations

from collections.abc import Sequence
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

from collavo.configuration import CollavoConfig
from collavo.model import text as _registers_text_model  # noqa: F401
from collavo.model.crayon import CrayonGenerationMixin, CrayonModelMixin
from collavo.model.described import update_settings
from collavo.model.layer import (
    LayerSettings,
    adapt_layer,
    decoder_linears,
    name_in_decoder,
    trainable_dtype,
)
from collavo.model.linear import init_leaf
from collavo.model.pretrained import LoadedWhole, SavedWhole
from collavo_kernels.nn import CrayonPrompt, has_own_forward


class CollavoModel(CrayonModelMixin, LoadedWhole, SavedWhole, LlavaModel):  # type: ignore[misc]
    """CLIP tower, projector, crayon prompt and decoder, without the language-model head.

    Args:
        config: The configuration.
    """

    config_class = CollavoConfig
    config: CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        super().__init__(config)
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
        config: The configuration.

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
        self.model = CollavoModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def saved_config(self) -> CollavoConfig:
        """Return the configuration, after it has followed what crayon and adapters are now."""
        update_settings(self.config.text_config, self, self.model.language_model)
        return self.config

    def add_dual_qlora(
        self,
        adapters: Sequence[str] = ("image", "vl"),
        *,
        rank: int = 64,
        alpha: float = 64.0,
        dropout: float = 0.0,
        quantize: bool = True,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
    ) -> CollavoForConditionalGeneration:
        """Freeze the decoder's linear layers, quantise them, and give them LoRA adapters, in place.

        The adapters' B starts at zero, so up to the rounding of NF4 the model computes what it did.
        ``config`` follows, so ``save_pretrained`` and ``from_pretrained`` give the same bits back.

        Args:
            adapters: Names; CoLLaVO's Dual QLoRA has ``"image"`` and ``"vl"``.
            rank: R.
            alpha: The scaling is ``alpha / rank``.
            dropout: Dropout on the adapters' input, while training.
            quantize: Whether to keep the frozen weights in 4 bits; layers that are in 4 bits
                already stay so.
            double_quant: Whether to quantise their scales too.
            dtype: dtype of the adapters; None keeps ``config.adapter_dtype`` (float32 by default).

        Returns:
            The model itself.

        Raises:
            ValueError: if an adapter of one of the names exists, a setting is no possible one, or
                layers to change are offloaded; the model is then as it was.

        Source: arXiv 2402.11248, section 4 (NF4, double quantisation, R = alpha = 64).
        """
        config = self.config.text_config
        if adapters or (quantize and config.quantize is None):
            _refuse_offloaded(self.model.language_model.layers)
        config.add_adapters(adapters, rank, alpha, dropout)
        self.model.crayon_adapters = tuple(config.adapters)
        if quantize and config.quantize is None:
            config.quantize, config.double_quant = "nf4", double_quant
        if dtype is not None:
            config.adapter_dtype = str(dtype).removeprefix("torch.")
        for layer in cast(nn.ModuleList, self.model.language_model.layers):
            adapt_layer(layer, LayerSettings.from_config(config))
        return self

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


def _refuse_offloaded(layers: Any) -> None:
    """Raise if linear layers of a decoder are offloaded: their hooks keep what they had."""
    for layer in layers:
        for parent, name in decoder_linears(layer):
            linear = getattr(parent, name)
            if linear.weight.is_meta and has_own_forward(linear):
                raise ValueError(
                    f"add_dual_qlora: {name_in_decoder(layer, name)} is offloaded and cannot be "
                    "changed; load the model without a device map, change and save it, and "
                    "load that with the map"
                )


AutoModel.register(CollavoConfig, CollavoModel, exist_ok=True)
AutoModelForImageTextToText.register(CollavoConfig, CollavoForConditionalGeneration, exist_ok=True)
