"""A tiny language model's folder and a tiny CLIP tower's, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.collavo.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 8,
}
LANGUAGES: dict[str, tuple[Any, Any]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
}


def word_tokenizer(special: tuple[str, ...] = ("<unk>", "<s>", "</s>"), **roles: str) -> Any:
    """Build a word-level tokenizer that knows no image token; ``roles`` as of transformers."""
    vocabulary = {**tiny_tokenizer().get_vocab()}
    words = [word for word in sorted(vocabulary, key=vocabulary.__getitem__) if "<" not in word]
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z]+(?:[-'][A-Za-z]+)*| ?[0-9]|\s|[^\sA-Za-z0-9]"), behavior="isolated"
    )
    core.decoder = decoders.Fuse()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **roles}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **named
    )
    return tokenizer


def write_language(
    folder: Path, kind: str = "llama", *, tokenizer: Any = None, spare: int = 0, **settings: Any
) -> Any:
    """Write a language model with its tokenizer and return it; ``save`` goes to its save."""
    tokenizer = word_tokenizer() if tokenizer is None else tokenizer
    save = settings.pop("save", {})
    dtype = settings.pop("dtype", torch.float32)
    config_class, model_class = LANGUAGES[kind]
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": len(tokenizer) + spare, **settings}
    model = model_class(config_class(**sizes)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    return model


def write_tower(folder: Path, *, whole: bool = False, old_names: bool = True) -> Any:
    """Write a CLIP tower, or a ``whole`` CLIP, and return the tower."""
    torch.manual_seed(2)
    vision = hf.CLIPVisionConfig(**VISION)
    if not whole:
        tower = hf.CLIPVisionModel(vision).eval()
        tower.save_pretrained(folder, save_original_format=old_names)
        return tower
    text = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=8)
    clip = hf.CLIPModel(config).eval()
    clip.save_pretrained(folder, save_original_format=old_names)
    return clip.vision_model
