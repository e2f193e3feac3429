"""``build_llava``: a LLaVA of a language model's folder and a CLIP tower's, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor

from collavo.cli import main
from collavo.conversion import build_llava
from collavo.loading import load_folder
from collavo.model.inventory import part_of
from collavo.processing.chat_templates import chat_template
from collavo_kernels.testing import assert_within_budget
from tests.collavo.conversion.official_folder import read_folder
from tests.collavo.conversion.tiny_parts import (
    LANGUAGES,
    VISION,
    word_tokenizer,
    write_language,
    write_tower,
)

TURNS: list[Any] = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}],
    },
    {"role": "assistant", "content": "yes"},
]
PLAIN: dict[str, Any] = {"image_mode": "pad"}
DECODER, TOWER = "model.language_model.", "model.vision_tower."


def build(folder: Path, kind: str = "llama", tower: Any = None, **options: Any) -> Any:
    """Write both parts, build, and return the language model, the tower, and what was built."""
    settings = {n: options.pop(n) for n in list(options) if n in ("tokenizer", "spare", "save")}
    config = options.pop("config", {})
    language = write_language(folder / "llm", kind, **settings, **config)
    vision = write_tower(folder / "clip", **(tower or {}))
    build_llava(folder / "llm", folder / "clip", folder / "built", **{**PLAIN, **options})
    model, processor = load_folder(folder / "built")
    return language, vision, model, processor


def own_names(vision: Any) -> dict[str, Tensor]:
    """The tower's tensors by their names of now."""
    return {n.removeprefix("vision_model."): v for n, v in vision.state_dict().items()}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_built_model_computes_what_its_parts_do_in_a_stock_llava(
    tmp_path: Path, kind: str
) -> None:
    """Put together by hand: the tower's second last layer without CLS, projector, decoder."""
    language, vision, model, processor = build(tmp_path, kind)
    expected = "" if kind == "llama" else "Llava"
    assert type(model).__name__ == f"Collavo{expected}ForConditionalGeneration"
    stock: Any = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision.config,
            text_config=language.config,
            image_token_index=processor.image_token_id,
        )
    ).eval()
    rows = model.get_input_embeddings().weight.shape[0]
    stock.resize_token_embeddings(rows, mean_resizing=False)
    state = {}
    for name in stock.state_dict():
        own = name
        if "vision_tower" in name and name not in model.state_dict():
            own = name.replace("vision_tower.vision_model.", "vision_tower.")
        state[name] = model.state_dict()[own]
        if name.startswith(DECODER) and "embed" not in name:
            source = f"model.{name.removeprefix(DECODER)}"
            assert torch.equal(state[name], language.state_dict()[source])
        elif name.startswith(TOWER):
            source = name.removeprefix(TOWER).removeprefix("vision_model.")
            assert torch.equal(state[name], own_names(vision)[source])
    stock.load_state_dict(state)
    batch = processor.training_batch([TURNS], [Image.new("RGB", (20, 30), (200, 30, 60))])
    plain = {n: v for n, v in batch.items() if not n.startswith("crayon")}
    with torch.no_grad():
        found, wanted = model(**plain).logits, stock(**plain).logits
        features = model.model.get_image_features(plain["pixel_values"])
        hidden = vision(plain["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = model.model.multi_modal_projector(hidden)
        plain["pixel_values"] = plain["pixel_values"].double()
        exact = stock.double()(**plain).logits
    assert_within_budget(found, wanted, exact)
    assert torch.equal(getattr(features, "pooler_output", features)[0], projected[0])


def test_new_tokens_get_the_mean_of_the_rows(tmp_path: Path) -> None:
    """Zeros would be a logit above the usual negative ones: the new words would be said."""
    language, _, model, processor = build(tmp_path)
    old = language.get_input_embeddings().weight.shape[0]
    for table, source in (
        (model.get_input_embeddings(), language.get_input_embeddings()),
        (model.lm_head, language.lm_head),
    ):
        assert torch.equal(table.weight[:old], source.weight)
        assert table.weight.shape[0] == old + 2
        assert torch.equal(table.weight[old:], source.weight.mean(0).expand(2, -1))
    words = processor.tokenizer
    assert words.convert_tokens_to_ids(["<image>", "<pad>"]) == [old, old + 1]
    assert (words.pad_token_id, model.config.text_config.pad_token_id) == (old + 1, old + 1)
    assert model.generation_config.pad_token_id == old + 1
    assert words("a<image>b")["input_ids"].count(old) == 1


def test_rows_that_are_there_already_are_used(tmp_path: Path) -> None:
    """Embeddings have more rows than the tokenizer has words where a vocabulary was padded."""
    language, _, model, processor = build(tmp_path, spare=64)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert processor.image_token_id == model.lm_head.weight.shape[0] - 64


@pytest.mark.parametrize("role", ["<unk>", "</s>", "<s>"])
def test_a_pad_token_that_means_something_else_is_replaced(tmp_path: Path, role: str) -> None:
    """Code that takes masks from the pad token's id would hide these tokens."""
    *_, processor = build(tmp_path, tokenizer=word_tokenizer(pad_token=role))
    assert processor.tokenizer.pad_token == "<pad>"


def test_a_pad_token_of_its_own_stays(tmp_path: Path) -> None:
    special = ("<unk>", "<s>", "</s>", "<empty>")
    words = word_tokenizer(special, pad_token="<empty>")
    language, _, model, processor = build(tmp_path, tokenizer=words)
    assert processor.tokenizer.pad_token_id == 3
    assert model.lm_head.weight.shape[0] == language.lm_head.weight.shape[0] + 1


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_tied_head_stays_tied(tmp_path: Path, kind: str) -> None:
    language, _, model, _ = build(tmp_path, kind, config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    old = language.lm_head.weight.shape[0]
    assert torch.equal(model.lm_head.weight[:old], language.lm_head.weight)


@pytest.mark.parametrize(
    "tower", [{"whole": True}, {"whole": True, "old_names": False}, {"old_names": False}], ids=str
)
def test_towers_of_every_form(tmp_path: Path, tower: dict[str, Any]) -> None:
    """A whole CLIP or its tower, by the names of either side of transformers 5.17."""
    _, vision, model, _ = build(tmp_path, tower=tower)
    for name, value in own_names(vision).items():
        assert torch.equal(model.state_dict()[f"{TOWER}{name}"], value), name


def test_shards_of_16_bits_stay_so(tmp_path: Path) -> None:
    """The projector is of the decoder's dtype; the crayon is trained in 32 bits."""
    config = {"dtype": torch.bfloat16}
    language, _, model, _ = build(tmp_path, save={"max_shard_size": "100KB"}, config=config)
    assert len(list((tmp_path / "llm").glob("model-*"))) > 1
    for name, value in read_folder(tmp_path / "built").items():
        if part_of(name) is not None:
            assert value.dtype == torch.float32
        elif not name.startswith(TOWER):
            assert value.dtype == torch.bfloat16
    head = language.lm_head.weight
    assert torch.equal(model.lm_head.weight[: len(head)], head)
    assert torch.equal(model.lm_head.weight[len(head)], head.float().mean(0).bfloat16())


def test_the_projector_is_drawn_as_pytorch_draws_it_by_the_seed_alone(tmp_path: Path) -> None:
    """The same folder twice is the same bytes, whatever the caller has drawn before."""
    write_language(tmp_path / "llm")
    write_tower(tmp_path / "clip")
    projectors, state = [], torch.get_rng_state()
    for number, seed in enumerate((0, 0, 1)):
        target = tmp_path / f"built{number}"
        build_llava(tmp_path / "llm", tmp_path / "clip", target, seed=seed, **PLAIN)
        projectors.append((target / "model.safetensors").read_bytes())
        torch.rand(number + 1)
    assert projectors[0] == projectors[1] != projectors[2]
    found = read_folder(tmp_path / "built0")
    for layer, width in (("linear_1", VISION["hidden_size"]), ("linear_2", 64)):
        for part in ("weight", "bias"):
            value = found[f"model.multi_modal_projector.{layer}.{part}"]
            assert value.abs().max() <= width**-0.5 < 1.1 * value.abs().max()
    torch.set_rng_state(state)
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "again", **PLAIN)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator was moved"


def test_4_bits_and_one_linear_layer(tmp_path: Path) -> None:
    """LLaVA-1's projector over a decoder in 4 bits, the crayon without an effect."""
    options = {"quantize": "nf4", "projector_type": "linear", "dtype": torch.bfloat16}
    _, _, model, processor = build(tmp_path, **options)
    assert (model.config.projector_type, model.config.quantize) == ("linear", "nf4")
    assert isinstance(model.model.multi_modal_projector, torch.nn.Linear)
    batch = processor.training_batch([TURNS], [Image.new("RGB", (20, 30))])
    assert model(**batch.to(torch.bfloat16)).loss.isfinite()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"projector_type": "linear", "quantize": "nf4"}),
        ("llama", {"dtype": torch.bfloat16}),
        ("qwen2", {"quantize": "nf4"}),
        ("mistral", {}),
    ],
    ids=str,
)
def test_the_first_stage_trains_the_projector_of_what_was_built(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """The command, on the folder: it moves the projector and nothing else."""
    write_language(tmp_path / "llm", kind)
    write_tower(tmp_path / "clip")
    build_llava(tmp_path / "llm", tmp_path / "clip", tmp_path / "built", **options)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    Image.new("RGB", (20, 30), (200, 30, 60)).save(tmp_path / "a.png")
    records = [{"id": "a", "image": "a.png", "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["train", "--use_cpu", "--stage", "align", "--max_steps", "1", "--global-batch", "1"]
    words += ["--model", str(tmp_path / "built"), "--data", str(tmp_path / "data.json")]
    words += ["--images", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--report_to", "none", "--warmup_steps", "0"]) == 0
    before, after = read_folder(tmp_path / "built"), read_folder(tmp_path / "out")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}


def test_the_processor_is_that_of_the_arguments(tmp_path: Path) -> None:
    """Tokens and grid follow from tower and tokenizer; mean and deviation are the tower's own."""
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    chatty = word_tokenizer()
    chatty.chat_template = "{{ messages[0]['content'] }}"
    write_language(tmp_path / "llm", tokenizer=chatty)
    write_tower(tmp_path / "clip")
    (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(settings))
    build_llava(
        tmp_path / "llm", tmp_path / "clip", tmp_path / "out", image_mode="squash",
        chat_template="llava_v1",
    )  # fmt: skip
    model, processor = load_folder(tmp_path / "out")
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.chat_template == processor.chat_template == chat_template("llava_v1")
    assert processor.grid == (4, 4)
    assert list(processor.image_processor.image_mean) == settings["image_mean"]
    assert list(processor.image_processor.image_std) == settings["image_std"]
    text = processor.apply_chat_template(TURNS[:1], add_generation_prompt=True)
    assert text.startswith("A chat between a curious human") and "<image>\nWhat" in text
    assert not processor.object_text and processor.tokenizer.padding_side == "left"
    assert model.config.vision_feature_layer == -2


def test_generation_stops_where_answers_end(tmp_path: Path) -> None:
    """A template's own end of a turn joins the language model's end of a text."""
    special = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    words = word_tokenizer(special, additional_special_tokens=list(special[3:]))
    *_, model, _ = build(tmp_path, tokenizer=words, chat_template="mpt")
    assert model.generation_config.eos_token_id == [2, 4]
    other = tmp_path / "v1"
    build_llava(tmp_path / "llm", tmp_path / "clip", other, chat_template="vicuna_v1", **PLAIN)
    assert json.loads((other / "generation_config.json").read_text())["eos_token_id"] == 2
