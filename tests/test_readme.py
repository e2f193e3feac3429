"""The front page and the usage page: their code as pasted, their length, what they list."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "collavo" / "README.md").read_text(encoding="utf-8")
# What has to be downloaded, and is made here instead.
LLAVA, DECODER = "llava-hf/llava-1.5-7b-hf", "HuggingFaceTB/SmolLM2-135M"
# As LLaVA-1.5's: roles in capitals, a picture on a line of its own, no mark around answers.
TEMPLATE = """\
{%- for message in messages -%}
  {{- message['role'].upper() + ': ' -}}
  {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
  {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] + ' ' -}}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``collavo-demo`` as ``collavo demo`` leaves it, after a step or two."""
    from dataclasses import replace

    from collavo.demo.experiment import Experiment
    from collavo.demo.settings import QUICK

    here = tmp_path_factory.mktemp("demo")
    small = {"train_scenes": 12, "test_scenes": 4, "batch_size": 4, "cpt_steps": 1, "cit_steps": 2}
    settings = replace(QUICK, **small)
    experiment = Experiment(settings, 0, here / "collavo-demo", lambda line: None, progress=False)
    experiment.run()
    for part in (experiment.model, experiment.processor):
        part.save_pretrained(here / "collavo-demo" / "model")
    return here


def tiny_llava(folder: Path, tokenizer: Any) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        image_size=48, patch_size=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=9
    )
    Llava(config).to(torch.bfloat16).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@pytest.fixture
def at_home(demo_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The demo's folder as the current one; what stands for each thing that is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from collavo.demo.language import build_tokenizer

    monkeypatch.chdir(demo_made)
    texts = [" USER: What is in it? ASSISTANT:", " What is here?"]
    tiny_llava(tmp_path / "llava", build_tokenizer(texts))
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    return {LLAVA: str(tmp_path / "llava"), DECODER: str(tmp_path / "decoder")}


def run(code: list[str], names: dict[str, Any], instead: dict[str, str]) -> None:
    for block in code:
        for name, folder in instead.items():
            block = block.replace(name, folder)
        exec(compile(block, "README", "exec"), names)


def test_the_blocks_of_the_front_page_run_as_pasted(
    at_home: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    run(blocks(README), names, at_home)
    assert LLAVA in README, "the second snippet begins with a LLaVA of the hub"
    assert capsys.readouterr().out.endswith("\n"), "the first snippet prints an answer"
    assert type(names["model"]).__name__ == "LlavaForConditionalGeneration"


def test_the_blocks_of_the_usage_page_run_after_those_of_the_front_page(
    at_home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from collavo.panoptic import PanopticMap, TransformersSegmenter

    class Segmenter:
        settings = "one object"

        def __call__(self, image: Any) -> Any:
            ids = torch.ones(image.size[::-1], dtype=torch.int32)
            one, horse = (torch.tensor([value], dtype=torch.int32) for value in (1, 17))
            return PanopticMap(ids, one, horse)

    load = staticmethod(lambda *_, **__: Segmenter())
    monkeypatch.setattr(TransformersSegmenter, "from_pretrained", load)
    names: dict[str, Any] = {}
    run(blocks(README) + blocks(USAGE), names, at_home)
    assert names["logits"].shape == (1, 4, 8)
    assert load_file("crayon.safetensors").keys() == names["handle"].added_state_dict().keys()
    assert names["inputs"]["crayon_class"].unique().numel() > 1, "what was drawn is there"


def test_the_front_page_is_short_and_says_its_state_early() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert any("on a GPU" in line for line in lines[:8])


def test_the_commands_of_the_usage_page_exist() -> None:
    from collavo.cli import COMMANDS

    listed = re.findall(r"^\| `collavo ([a-z]+)` \|", USAGE, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_numbers_of_the_demo_are_those_of_the_kept_runs() -> None:
    from collavo.demo import seeds

    kept = sorted((ROOT / "benchmarks" / "results").glob("*/demo_seed?.json"))
    reports = seeds.read_reports(kept)
    assert seeds.markdown_table(reports) in README
    assert seeds.gains_in_words(reports) in " ".join(README.split())


def test_the_speeds_are_those_of_the_picture() -> None:
    from benchmarks import headline, report

    device = re.search(r"benchmarks/plots/([^/]+)/headline\.svg", README)
    assert device is not None
    shown = {bar.number for bar in headline.bars(report.by_device()[device[1]])}
    said = re.findall(r"\*\*([\d.]+x)\*\*", README)
    assert len(said) >= 3
    assert set(said) <= shown


def test_the_numbers_of_llavas_stages_are_those_of_the_kept_rows() -> None:
    kept = ROOT / "benchmarks" / "results" / "amd-epyc-family-26-model-2"
    ms = {
        (row["op"], row["mode"], row["provider"]): float(row["p50_ms"])
        for name in ("llava_training", "llava_data")
        for row in csv.DictReader((kept / f"{name}.csv").read_text(encoding="utf-8").splitlines())
    }
    peer, own = "transformers+peft+bitsandbytes", "llava_training"
    align = ms[own, "align", peer] / ms[own, "align", "ours"]
    instruct = ms[own, "instruct", peer] / ms[own, "instruct", "ours"]
    crayon = ms[own, "instruct", "ours:crayon"] / ms[own, "instruct", "ours"]
    assert f"takes 1/{align:.2f} (`align`) and 1/{instruct:.2f} (`instruct`" in README
    assert f"and {crayon:.2f} times its own with the crayon" in README
    text, image = (ms["llava_data", mode, "ours"] for mode in ("text", "image"))
    assert f"in {text:.2f} ms, a JPEG a padded tensor in {image:.1f} ms" in README
    assert 0.45 < image / ms["llava_data", "image", "transformers"] < 0.55, "half"
