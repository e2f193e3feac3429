"""The decoder of a CoLLaVO model: transformers' LLaMA with crayon and adapters."""

from __future__ import annotations

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from collavo.configuration import CollavoTextConfig
from collavo.model.described import update_settings
from collavo.model.layer import CrayonLayerMixin, CrayonMLPMixin, LayerSettings, build_layer
from collavo.model.linear import init_leaf
from collavo.model.pretrained import LoadedWhole, SavedWhole
from collavo_kernels.nn import CrayonAttention


class CollavoMLP(CrayonMLPMixin, LlamaMLP):  # type: ignore[misc]
    """A LLaMA MLP with ``CollavoLinear`` inside."""


class CollavoDecoderLayer(CrayonLayerMixin, LlamaDecoderLayer):  # type: ignore[misc]
    """A LLaMA decoder layer with ``CollavoAttention`` and ``CollavoMLP`` inside."""

    def __init__(self, config: CollavoTextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        # LLaMA's constructor made it; making it again would draw its weights twice.
        self.mlp.__class__ = CollavoMLP
        build_layer(self, config, LayerSettings.from_config(config))


class CollavoTextModel(LoadedWhole, SavedWhole, LlamaModel):  # type: ignore[misc]
    """LLaMA's decoder with CoLLaVO layers, and embedding rows for tokens the head cannot generate.

    Args:
        config: The text configuration.
    """

    config_class = CollavoTextConfig
    config: CollavoTextConfig
    _no_split_modules = ["CollavoDecoderLayer"]  # noqa: RUF012 (transformers declares it so)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LlamaDecoderLayer,
        "attentions": CrayonAttention,
    }

    def __init__(self, config: CollavoTextConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            CollavoDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        if config.extra_embeddings:
            rows = config.vocab_size + config.extra_embeddings
            self.embed_tokens = nn.Embedding(rows, config.hidden_size, self.padding_idx)
        self.post_init()

    def saved_config(self) -> CollavoTextConfig:
        """Return the configuration, after it has followed what crayon and adapters are now."""
        update_settings(self.config, self, self)
        return self.config

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring; adapters start without effect."""
        if not init_leaf(module, self.config.initializer_range):
            super()._init_weights(module)


AutoModel.register(CollavoTextConfig, CollavoTextModel, exist_ok=True)
