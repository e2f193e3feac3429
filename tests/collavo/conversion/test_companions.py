"""A converted folder is whole: its processor and tokenizer are the source's, and commands run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from collavo import CollavoProcessor, apply_to_llava, loading
from collavo.cli import main
from collavo.conversion import Options, convert_folder
from collavo.loading import load_folder
from collavo.processing.chat_templates import CHAT_TEMPLATES
from tests.collavo.conversion.official_folder import (
    Sizes,
    official_config,
    official_tensors,
    write_folder,
)
from tests.collavo.conversion.tiny_sentencepiece import SYMBOLS, write_sentencepiece
from tests.collavo.model.tiny_families import make_family
from tests.collavo.processing import tiny_llavas

pytest.importorskip("sentencepiece", reason="the extra convert is not installed")

PIECES = 400


def write_official(folder: Path, *, rows: int = PIECES, **settings: Any) -> Path:
    """Write an official folder with a tokenizer."""
    sizes = Sizes(vocabulary=PIECES, rows=rows)
    write_folder(folder, official_tensors(sizes), official_config(sizes))
    write_sentencepiece(folder, vocab_size=PIECES, **settings)
    return folder


def write_llava(folder: Path, **changes: Any) -> Any:
    """Write a LLaVA of one size with its own processor, and return the processor."""
    processor = tiny_llavas.llava()
    config = copy.deepcopy(make_family("llava").config)  # families share their parts
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    config.vision_config.image_size = 24
    config.image_seq_length = 36
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_official_folder_becomes_one_that_loads_with_its_processor(tmp_path: Path) -> None:
    """The official loader adds ``<image>`` as it loads: the next id, with a row of its own."""
    write_official(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "target")
    model, processor = load_folder(tmp_path / "target")
    assert processor.image_token_id == model.config.image_token_id == PIECES
    assert model.get_input_embeddings().weight.shape[0] == PIECES + 1
    assert processor.grid == (3, 3)
    assert processor.chat_template == CHAT_TEMPLATES["eval"]
    stops = model.generation_config.eos_token_id
    assert stops == [2, processor.tokenizer.convert_tokens_to_ids(SYMBOLS[0])]
    prompt = processor.prompt("what?")
    inputs: Any = processor(images=picture(), text=prompt, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert (inputs["input_ids"] == PIECES).sum() == 9
    made: Any = model.generate(**inputs, max_new_tokens=2)
    assert made.shape[1] <= inputs["input_ids"].shape[1] + 2


def test_the_official_generation_settings_are_kept(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source", user_defined_symbols=[])
    (source / "generation_config.json").write_text(json.dumps({"num_beams": 3, "eos_token_id": 7}))
    convert_folder(source, tmp_path / "target")
    model, processor = load_folder(tmp_path / "target")
    assert model.generation_config.num_beams == 3 and model.generation_config.eos_token_id == 7
    assert processor.chat_template == CHAT_TEMPLATES["demo"]  # no turn tokens


@pytest.mark.parametrize("name", ["llava", "video_llava"])
@pytest.mark.parametrize("own", [tiny_llavas.llava, lambda: tiny_llavas.pixtral(1)])
def test_a_grid_is_compared_where_there_is_one(name: str, own: Any, tmp_path: Path) -> None:
    """A tower for pictures of any shape takes smaller ones than its largest (Pixtral in LLaVA)."""
    model, processor = make_family(name), CollavoProcessor.from_llava(own())
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    apply_to_llava(model)
    assert processor.grid != (2, 2)  # the tower's
    if not processor.one_grid:
        loading._check_pair(tmp_path, model, processor)
        return
    with pytest.raises(ValueError, match=r"processor has grid \(6, 6\) and its model \(2, 2\)"):
        loading._check_pair(tmp_path, model, processor)


@pytest.mark.parametrize("name", ["demo", "eval", "paper"])
def test_every_prompt_of_release_and_paper_is_there(tmp_path: Path, name: str) -> None:
    """Each is read beside a converted folder, and answers get labels."""
    convert_folder(write_official(tmp_path / "source"), tmp_path / "target")
    template = CHAT_TEMPLATES[name]
    processor = CollavoProcessor.from_pretrained(tmp_path / "target", chat_template=template)
    expected = {
        "demo": " <image> USER: <objects>what? ASSISTANT:",
        "eval": f" <image> {SYMBOLS[1]}user\n<objects>what?{SYMBOLS[0]}\n{SYMBOLS[1]}assistant\n",
        "paper": "<image> User: <objects>what? Assistant:",
    }
    prompt = processor.prompt("what?")
    assert prompt.endswith(expected[name]) and (name != "paper" or prompt == expected[name])
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a horse"},
    ]
    batch: Any = processor.training_batch([turns], images=[picture()])
    said = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    stop = SYMBOLS[0] if name == "eval" else "</s>"
    assert said.strip() == f"a horse{stop}"


def test_a_vocabulary_of_another_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_official(tmp_path / "source")
    write_sentencepiece(tmp_path / "source", vocab_size=PIECES + 8)
    with pytest.raises(ValueError, match=r"408|409"):
        convert_folder(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_tokenizer_that_cannot_be_followed_is_refused_before(tmp_path: Path) -> None:
    write_official(tmp_path / "source", normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match="fast tokenizer and sentencepiece differ"):
        convert_folder(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_llava_keeps_its_own_pixels_prompt_and_ids(tmp_path: Path) -> None:
    own = write_llava(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "target")
    model, processor = load_folder(tmp_path / "target")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    expected = own.apply_chat_template(turns, add_generation_prompt=True)
    assert processor.prompt("what?") == expected
    options = {"images": picture(), "text": expected, "return_tensors": "pt"}
    wanted, found = own(**options), processor(**options)
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(found[name], wanted[name])
    assert found["crayon_index"].shape[1] == 36
    stock = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "source")
    made: Any = model.generate(**found, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, stock.generate(**wanted, max_new_tokens=4, do_sample=False))


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path: Path) -> None:
    processor = write_llava(tmp_path / "source")
    words = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["more"])
    processor.save_pretrained(tmp_path / "source")
    named = rf"its tokenizer has {words + 1} ids and its embedding {words} rows"
    with pytest.raises(ValueError, match=named):
        convert_folder(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize(
    "settings", [None, {"patch_size": 4, "vision_feature_select_strategy": "default"}]
)
def test_a_folder_of_before_the_processor_knew_the_patches(
    tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    """An image processor and a tokenizer: how many tokens an image has is the model's to say."""
    own = write_llava(tmp_path / "source")
    (tmp_path / "source/processor_config.json").unlink()
    own.image_processor.save_pretrained(tmp_path / "source")
    if settings is not None:
        text = json.dumps({"processor_class": "LlavaProcessor", **settings})
        (tmp_path / "source/processor_config.json").write_text(text)
    convert_folder(tmp_path / "source", tmp_path / "target")
    model, processor = load_folder(tmp_path / "target")
    options = {"images": picture(), "text": "<image> what?", "return_tensors": "pt"}
    wanted, found = own(**options), processor(**options)
    assert torch.equal(found["input_ids"], wanted["input_ids"])
    assert torch.isfinite(model(**found).logits).all()


def test_the_way_back_has_the_official_tokenizer_with_its_settings(tmp_path: Path) -> None:
    source = write_official(tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    convert_folder(source, tmp_path / "there")
    convert_folder(tmp_path / "there", tmp_path / "back", to_official=True)
    own = (source / "tokenizer.model").read_bytes()
    assert (tmp_path / "back/tokenizer.model").read_bytes() == own
    convert_folder(tmp_path / "back", tmp_path / "again")
    first, second = (load_folder(tmp_path / name)[1].tokenizer for name in ("there", "again"))
    text = "a <image>b</s> c"
    assert first(text).input_ids == second(text).input_ids
    assert first(text).input_ids[0] != first.bos_token_id


@pytest.mark.parametrize("word", ["<picture>", "<0>"])
def test_an_image_token_of_another_word_is_the_prompts(tmp_path: Path, word: str) -> None:
    """Whether it is added or among the pieces, from which the way back takes its id again."""
    source = write_official(tmp_path / "source", control_symbols=["<0>"])
    convert_folder(source, tmp_path / "there", Options(image_token=word))
    model, processor = load_folder(tmp_path / "there")
    inputs: Any = processor(images=picture(), text=processor.prompt("a?"), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 9
    convert_folder(tmp_path / "there", tmp_path / "back", to_official=True)
    convert_folder(tmp_path / "back", tmp_path / "again")
    again, _ = load_folder(tmp_path / "again")
    assert again.config.image_token_index == model.config.image_token_index
    named = "expected a word that no prompt has"
    with pytest.raises(ValueError, match=named):
        convert_folder(source, tmp_path / "new", Options(image_token=SYMBOLS[0]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("word", ["<s>", "3"])
def test_another_image_token_than_the_trained_one_is_refused(tmp_path: Path, word: str) -> None:
    write_llava(tmp_path / "source")
    with pytest.raises(ValueError, match="image token: expected id"):
        convert_folder(tmp_path / "source", tmp_path / "target", Options(image_token=word))


def test_a_processor_that_no_crayon_follows_is_refused_before(tmp_path: Path) -> None:
    write_llava(tmp_path / "source")
    values = json.loads((tmp_path / "source/processor_config.json").read_text())
    values["processor_class"] = "CLIPProcessor"
    (tmp_path / "source/processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="processor cannot be given a crayon"):
        convert_folder(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").glob("*"))


def test_from_a_llava_to_an_answer_in_two_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, as a user types it."""
    write_llava(tmp_path / "source")
    called = [sys.executable, "-m", "collavo", "convert", str(tmp_path / "source")]
    done = subprocess.run([*called, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a LLaVA" in done.stdout and "collavo train --stage cpt" in done.stdout
    picture().save(tmp_path / "picture.png")
    asked = ["chat", "--model", str(tmp_path / "out"), "--image", str(tmp_path / "picture.png")]
    assert main([*asked, "--question", "what?", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    # The same again finds a folder that is not empty.
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
