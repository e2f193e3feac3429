"""LLaVA's templates in use: prompts as trained, start and pad tokens, other processors, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, StopStringCriteria

from collavo.processing import (
    ALIASES,
    CHAT_TEMPLATES,
    CollavoProcessor,
    Measured,
    OverlongError,
    chat_template,
    make_image_processor,
)
from tests.collavo.processing import golden_llava, tiny_llavas
from tests.collavo.processing.golden_llava import TOKENIZERS

PICTURE = Image.new("RGB", (8, 8))
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it raining?"}]},
    {"role": "assistant", "content": "No, it is not."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Caf\u00e9 weather.  "},
]


def turns_for(template: str) -> list[dict[str, Any]]:
    return TURNS[:2] if template == "plain" else TURNS


@pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_sees_the_prompt_of_inference(name: str, template: str) -> None:
    """Before each answer, token by token, behind an image too, whatever the tokenizer's kind."""
    processor = golden_llava.processor(name, template, object_text=False)
    turns = turns_for(template)
    batch = processor.training_batch([turns], [[PICTURE]])
    targets = (batch["labels"][0] >= 0).tolist()
    starts = [i for i, on in enumerate(targets) if on and not targets[i - 1]]
    assert len(starts) == len(turns) // 2
    for answer, start in enumerate(starts):
        prompt = processor.prompt(turns[: 2 * answer + 1])
        inputs = processor(text=prompt, images=PICTURE, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == batch["input_ids"][0, :start].tolist()


@pytest.mark.parametrize("template", sorted(set(CHAT_TEMPLATES) - {"demo", "eval", "paper"}))
@pytest.mark.parametrize("name", ["spm_legacy", "spm_chatml_bos_legacy"])
def test_masks_are_those_of_transformers_own_processor(name: str, template: str) -> None:
    """By the template's ``generation`` block; the repeated placeholder is one token each there."""
    tokenizer = golden_llava.tokenizer(name)
    square = {"height": 8, "width": 8}
    own = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=chat_template(template),
    )
    turns = turns_for(template)
    shown = [{"type": "image", "image": PICTURE}, TURNS[0]["content"][1]]
    parts = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn["content"], str)
        else {**turn, "content": shown}
        for turn in turns
    ]
    theirs = own.apply_chat_template(
        parts,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    processor = golden_llava.processor(name, template)
    ours = processor.training_batch([turns], [[PICTURE]])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    targets = torch.as_tensor(theirs["assistant_masks"]).bool()
    assert torch.equal(ours["labels"] >= 0, targets.reshape(ours["labels"].shape))
    prompts = tokenizer.apply_chat_template(
        parts[:1], chat_template=chat_template(template), add_generation_prompt=True, tokenize=False
    )
    assert prompts == processor.prompt(turns[:1])


@pytest.mark.parametrize("pad", ["<unk>", "</s>", "<pad>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_pad_token_may_be_any(pad: str, side: str) -> None:
    """A mask made by comparing ids would lose the stop token of each answer, or unknown words."""
    tokenizer = golden_llava.tokenizer("spm_legacy", pad_token=pad)
    tokenizer.padding_side = side
    processor = CollavoProcessor(
        make_image_processor(8), tokenizer, grid=(2, 2), chat_template=chat_template("v1")
    )
    batch = processor.training_batch([TURNS, TURNS[2:]], [[PICTURE], []])
    lengths = batch["attention_mask"].sum(1).tolist()
    for row, turns in enumerate((TURNS, TURNS[2:])):
        alone = processor.training_batch([turns], [[PICTURE] * (row == 0)])
        assert lengths[row] == alone["input_ids"].shape[1]
        assert bool(alone["attention_mask"].all())
    stops = batch["labels"] == tokenizer.eos_token_id
    assert stops.sum(1).tolist() == [2, 1] and bool((batch["attention_mask"][stops] == 1).all())


def test_a_tokenizer_without_a_pad_token() -> None:
    """Alone a conversation needs none."""
    processor = golden_llava.processor("spm_legacy", "v1")
    processor.tokenizer.pad_token = None
    alone = processor.training_batch([TURNS], [[PICTURE]])
    assert bool(alone["attention_mask"].all())
    with pytest.raises(ValueError, match="tokenizer: expected a pad token, since sequences of"):
        processor.training_batch([TURNS, TURNS[2:]], [[PICTURE], []])


def test_the_start_token_comes_once() -> None:
    """The tokenizer's, or that of a template which writes it."""
    processor = golden_llava.processor("spm_legacy", "v1")
    writes = golden_llava.processor("spm_legacy", "v1")
    writes.chat_template = "{{ bos_token }}" + str(processor.chat_template)
    for own in (processor, writes):
        ids = own.training_batch([TURNS], [[PICTURE]])["input_ids"][0].tolist()
        assert ids[:2] != [1, 1] and ids[0] == 1 and ids.count(1) == 1
        prompt = own(text=own.prompt(TURNS[:1]), images=PICTURE)["input_ids"][0]
        assert prompt == ids[: len(prompt)]
    core = processor.tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    batch = processor.training_batch([TURNS], [[PICTURE]])
    assert batch["input_ids"][0, -1] == 2 and batch["labels"][0, -1] == -100


def test_a_state_that_a_call_left_behind_cuts_nothing() -> None:
    """Of a fast tokenizer the last call's truncation and padding stay set."""
    processor = golden_llava.processor("spm_legacy", "v1")
    expected = processor.training_batch([TURNS], [[PICTURE]])["input_ids"]
    processor.tokenizer(["a b c d"], truncation=True, max_length=3, padding="max_length")
    assert torch.equal(processor.training_batch([TURNS], [[PICTURE]])["input_ids"], expected)


def test_options_of_a_call() -> None:
    processor = golden_llava.processor("spm_legacy", "v1")
    text = processor.prompt(TURNS[:1])
    whole = processor(text=text, images=PICTURE)["input_ids"][0]
    bare = processor(text=text, images=PICTURE, add_special_tokens=False)
    assert bare["input_ids"][0] == whole[1:]
    wide = processor(text=[text], images=PICTURE, padding=True, pad_to_multiple_of=100)
    assert sum(wide["attention_mask"][0]) == len(whole) and len(wide["input_ids"][0]) % 100 == 0
    with pytest.raises(ValueError, match="return_offsets_mapping: expected options of"):
        processor(text=text, images=PICTURE, return_offsets_mapping=True)


def test_a_template_is_saved_with_its_system(tmp_path: Path) -> None:
    template = chat_template("llava_v0", system='It\'s \\ {{ "brief" }}\n\U0001f600 USER_START')
    processor = CollavoProcessor(
        make_image_processor(8), golden_llava.tokenizer("bytes"), (2, 2), chat_template=template
    )
    processor.save_pretrained(tmp_path)
    loaded = CollavoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == template and not loaded.names_objects
    assert loaded.fingerprint() == processor.fingerprint()
    start = 'It\'s \\ {{ "brief" }}\n\U0001f600 USER_START\n\n### Human: <image>\nIs it raining?'
    assert loaded.prompt(TURNS[:1]).startswith(start)


def test_a_system_message_replaces_the_templates() -> None:
    said = [{"role": "system", "content": "Be brief."}, *TURNS[2:3]]
    prompts = {
        "v1": "Be brief. USER: Why? ASSISTANT:",
        "v0": "Be brief.\n\n### Human: Why?\n### Assistant:",
        "llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]",
        "mistral_instruct": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST]",
        "mpt": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nWhy?<|im_end|>"
        "<|im_start|>assistant\n",
    }
    for name, expected in prompts.items():
        assert golden_llava.processor("spm_legacy", name).prompt(said) == expected
        own = golden_llava.processor("spm_legacy", name)
        own.chat_template = chat_template(name, system="Be brief.")
        assert own.prompt(TURNS[2:3]) == expected
    silent = golden_llava.processor("spm_legacy", "v1")
    silent.chat_template = chat_template("v1", system="")
    assert silent.prompt(TURNS[2:3]) == "USER: Why? ASSISTANT:"


STOPS = {"plain": "\n", "mpt": "<|im_end|>", "chatml_direct": "<|im_end|>"}
STOPS |= {"v0": "\n###", "v0_mmtag": "\n###"}


def test_an_answer_stops_where_no_token_says_so() -> None:
    """Of ``v0`` it would go on with the next question, until the limit; ``mpt`` stops at no eos."""
    for name, template in CHAT_TEMPLATES.items():
        processor = golden_llava.processor("spm_legacy", name)
        stop = STOPS.get(name)
        options = processor.stopping()
        assert options.get("stop_strings") == (stop and [stop]), name
        assert ("tokenizer" in options) == (stop is not None) and template
        made = processor.tokenizer(f"No.{stop or '</s>'} Human: Why?"[: None if stop else 7])
        assert processor.answer(made["input_ids"]) == "No.", name


@pytest.mark.parametrize("name", ["bytes", "spm_legacy", "spm_chatml_bos_legacy"])
@pytest.mark.parametrize("template", sorted(STOPS))
def test_generation_ends_at_the_stop(name: str, template: str) -> None:
    """Where it is a token of control, the only text of an answer that is not decoded, too."""
    processor = golden_llava.processor(name, template)
    batch = processor.training_batch([TURNS[:2]], [[PICTURE]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    first, last = (int(labels.ge(0).nonzero()[i, 0]) for i in (0, -1))
    options = processor.stopping()
    stops = StopStringCriteria(options["tokenizer"], options["stop_strings"])
    found = [bool(stops(ids[None, :end], None)[0]) for end in range(first + 1, last + 2)]
    assert found == [False] * (last - first) + [True]
    assert processor.answer(ids[first : last + 1]) == "No, it is not."


def test_whether_objects_are_named_follows_the_template() -> None:
    """Also of one that is chosen later; whoever says so decides otherwise."""
    tokenizer = golden_llava.tokenizer("spm_legacy")
    lengths = {}
    for said in (None, True, False):
        made = CollavoProcessor(make_image_processor(8), tokenizer, (2, 2), object_text=said)
        assert made.names_objects is (said is not False)
        made.chat_template = chat_template("v1")
        assert made.names_objects is (said is True)
        lengths[said] = made.measure(TURNS, [(8, 8)]).tokens
        batch = made.training_batch([TURNS], [[PICTURE]], pixels=False)
        assert batch["input_ids"].shape[1] == lengths[said]
    assert lengths[None] == lengths[False] < lengths[True]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # As ``image_order="keep"`` has them, texts without blanks at their ends.
        (["In", None, "it"], "In it"),
        (["In", None, None, "it"], "In it"),
        (["In ", None, "it"], "In it"),
        (["In", None, "\nit"], "In\nit"),
        ([None, "In"], "In"),
        (["In", None], "In"),
        (["In", "it", None], "Init"),
    ],
)
@pytest.mark.parametrize("template", ["demo", "eval", "paper"])
def test_words_around_an_image_stay_apart(
    template: str, content: list[str | None], expected: str
) -> None:
    """Where images go first whatever their places, nothing stood between the words."""
    parts = [{"type": "image"} if own is None else {"type": "text", "text": own} for own in content]
    prompt = golden_llava.processor("spm_legacy", template).prompt(
        [{"role": "user", "content": parts}]
    )
    after = {"demo": " ASSISTANT:", "eval": "[UNUSED_TOKEN_145]\n", "paper": " Assistant:"}[
        template
    ]
    assert "<objects>" * content.count(None) + expected + after in prompt


def test_start_tokens_come_once_whatever_writes_them() -> None:
    """Some tokenizers have two, and templates that write them; a model's own processor too."""
    processor = golden_llava.processor("spm_chatml_bos_legacy", "v1")
    core = processor.tokenizer.backend_tokenizer
    pair = [(one, core.token_to_id(one)) for one in ("<|im_start|>", "<s>")]
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <s> $A", special_tokens=pair
    )
    plain = processor.training_batch([TURNS], [[PICTURE]])
    template = str(processor.chat_template)
    for written in ("<s>", "<|im_start|><s>"):
        processor.chat_template = written + template
        assert torch.equal(
            processor.training_batch([TURNS], [[PICTURE]])["labels"], plain["labels"]
        )
    wrapped = CollavoProcessor.from_llava(tiny_llavas.llava())
    begin, core = wrapped.tokenizer.bos_token, wrapped.tokenizer.backend_tokenizer
    pair = [(begin, wrapped.tokenizer.bos_token_id)]
    core.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=pair)
    for template in (wrapped.chat_template, f"{{{{ bos_token }}}}{wrapped.chat_template}"):
        wrapped.chat_template = template
        ids = wrapped.training_batch([TURNS], [[PICTURE]])["input_ids"][0].tolist()
        prompt = wrapped(text=wrapped.prompt(TURNS[:1]), images=PICTURE)["input_ids"][0]
        assert ids[: len(prompt)] == prompt and ids.count(wrapped.tokenizer.bos_token_id) == 1


def test_a_cut_that_changes_an_images_tokens_is_refused() -> None:
    """LLaVA-OneVision cuts one picture into tiles, and several not: the model would get neither."""
    processor = CollavoProcessor.from_llava(tiny_llavas.llava_onevision())
    pictures = [Image.new("RGB", (60, 50))] * 2
    asked = [TURNS[0], TURNS[1], {**TURNS[0]}, TURNS[3]]
    whole = processor.training_batch([asked], [pictures])["input_ids"].shape[1]
    sizes = [(50, 60)] * 2
    for make in (
        lambda: processor.training_batch([asked], [pictures], max_length=whole - 3),
        lambda: processor.measure(asked, sizes, max_length=whole - 3),
    ):
        with pytest.raises(OverlongError, match="its images have other tokens"):
            make()
    own = golden_llava.processor("spm_legacy", "v1")
    whole = own.measure(asked, sizes).tokens
    assert own.measure(asked, sizes, max_length=whole - 1).image_tokens == 4


def test_names_that_are_none() -> None:
    assert all(chat_template(name) == CHAT_TEMPLATES[own] for name, own in ALIASES.items())
    with pytest.raises(ValueError, match=r"expected one of demo, .*vicuna_v1.*got 'vicuna_v2'"):
        chat_template("vicuna_v2")
    for name in ("plain", "demo"):
        with pytest.raises(
            ValueError, match=f"system: expected none for the chat template '{name}"
        ):
            chat_template(name, system="Be brief.")


def test_measure_is_the_batch_without_pictures() -> None:
    """Of another model's processor too, whose tokens depend on a picture's size."""
    sizes = [(30, 20), (8, 8)]
    pictures = [Image.new("RGB", (width, height)) for height, width in sizes]
    asked = [{**TURNS[0], "content": [{"type": "image"}, *TURNS[0]["content"]]}, *TURNS[1:]]
    wrapped = CollavoProcessor.from_llava(tiny_llavas.llava_next())
    for own in (golden_llava.processor("spm_new", "v1"), wrapped):
        batch = own.training_batch([asked], [pictures])
        kept = int((batch["labels"] >= 0).sum())
        length = batch["input_ids"].shape[1]
        found = own.measure(asked, sizes)
        assert (found.tokens, found.targets, found.cut) == (length, kept, False)
        assert found.image_tokens >= batch["crayon_index"].shape[1]
    own = golden_llava.processor("spm_new", "v1")
    cut = own.measure(asked, sizes, max_length=length - 1)
    assert isinstance(cut, Measured)
    with pytest.raises(ValueError, match="got 2"):
        own.measure(asked, sizes[:1])
    with pytest.raises(ValueError, match=r"a\.json: \[3\]: expected at most max_length=9"):
        own.measure(asked, sizes, max_length=9, overlong="raise", name="a.json: [3]")


def test_a_fingerprint_differs_where_tokens_would() -> None:
    base = golden_llava.processor("spm_legacy", "v1")
    first = base.fingerprint()
    base.tokenizer(["a"], truncation=True, max_length=3)
    assert base.fingerprint() == first == golden_llava.processor("spm_legacy", "v1").fingerprint()
    others = [
        golden_llava.processor("spm_new", "v1"),
        golden_llava.processor("spm_legacy", "llava_v1"),
        golden_llava.processor("spm_legacy", "v1", object_text=True),
        CollavoProcessor(
            make_image_processor(8),
            golden_llava.tokenizer("spm_legacy"),
            grid=(4, 1),
            chat_template=chat_template("v1"),
        ),
        CollavoProcessor.from_llava(tiny_llavas.llava()),
        CollavoProcessor.from_llava(tiny_llavas.llava_next()),
    ]
    base.tokenizer.split_special_tokens = True
    split = base.fingerprint()
    base.tokenizer.add_tokens(["raining"])
    prints = [first, split, base.fingerprint(), *(one.fingerprint() for one in others)]
    assert len(set(prints)) == len(prints)
