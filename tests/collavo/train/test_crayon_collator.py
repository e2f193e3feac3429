"""Records to batches: labels, text-only batches, several turns, workers, purity of the draws."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from PIL import Image
from tiny import tiny_vision
from torch.utils.data import DataLoader

from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.panoptic import CocoPanopticDataset, PanopticMap, parse_objects
from collavo.processing import CHAT_TEMPLATES, OverlongError
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset, CrayonInstructionDataset

TURNS = [
    {"role": "user", "content": "Is there a horse"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "What is in this picture?"},
    {"role": "assistant", "content": "Sure, it is #1 horse, #1 sky"},
]


def record(**kwargs):
    return {"conversation": TURNS} | kwargs


def spoken(processor, batch, row=0):
    """The labelled tokens, as text with a bar between stretches."""
    stretches, last = [], None
    for position, token in enumerate(batch["labels"][row].tolist()):
        if token != -100:
            if last != position - 1:
                stretches.append([])
            stretches[-1].append(token)
            last = position
    return [processor.decode(one) for one in stretches]


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_on_answers_and_stop_tokens_only(tiny_processor, side):
    processor = tiny_processor(padding_side=side)
    short = [TURNS[0], {"role": "assistant", "content": "no"}]
    batch = CrayonCollator(processor)(
        [record(image=Image.new("RGB", (8, 8))), {"conversation": short}]
    )
    assert spoken(processor, batch, 0) == [" yes</s>", " Sure, it is #1 horse, #1 sky</s>"]
    assert spoken(processor, batch, 1) == [" no</s>"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not bool((kept & (batch["attention_mask"] == 0)).any())


def test_stop_token_of_the_released_template(tiny_processor):
    """There the turn's end token is what the model says last; the line feed after it is not."""
    processor = tiny_processor(chat_template=CHAT_TEMPLATES["eval"], texts=["UNUSED_TOKEN_145"])
    batch = CrayonCollator(processor)([record()])
    assert spoken(processor, batch)[0].startswith("yes[")
    assert [text[-1] for text in spoken(processor, batch)] == ["]", "]"]


def test_training_text_continues_the_prompt_of_inference(tiny_processor):
    """The tokens before the last answer are those that generate() would be given."""
    processor = tiny_processor()
    image = Image.new("RGB", (8, 8))
    batch = CrayonCollator(processor)([record(image=image)])
    first = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": TURNS[0]["content"]}],
    }
    prompt = processor(
        text=processor.prompt([first, *TURNS[1:3]]), images=image, return_tensors="pt"
    )
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompt["input_ids"])
    assert processor.decode(batch["input_ids"][0, length:]) == " Sure, it is #1 horse, #1 sky</s>"


def test_batch_without_images_has_no_image_work(tiny_processor):
    batch = CrayonCollator(tiny_processor())([record(), record(image=None, panoptic=None)])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_mixed_batch_pads_rows(tiny_processor, scene):
    ids, classes = scene
    panoptic = PanopticMap.from_segments(ids, list(classes), list(classes.values()))
    image = Image.new("RGB", (16, 12))
    batch = CrayonCollator(tiny_processor())([record(), record(image=image, panoptic=panoptic)])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert batch["crayon_class"].tolist() == [[-1] * 6, [0, 18, 18, 1, 120, 126]]
    assert batch["crayon_index"][0].eq(-1).all()


def test_object_text_by_record(tiny_processor, scene):
    """A record may switch the object text off, as crayon instructions do: it is their answer."""
    ids, classes = scene
    panoptic = PanopticMap.from_segments(ids, list(classes), list(classes.values()))
    both = [
        record(image=Image.new("RGB", (16, 12)), panoptic=panoptic, object_text=wanted)
        for wanted in (True, False)
    ]
    processor = tiny_processor()
    batch = CrayonCollator(processor)(both)
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert "The image includes (#1 horse)" in texts[0] and "includes" not in texts[1]


def test_instructions_are_a_pure_function_of_seed_epoch_and_index(coco_dataset):
    data = CrayonInstructionDataset(coco_dataset, seed=3)
    again = CrayonInstructionDataset(coco_dataset, seed=3)
    forwards = [data[i]["conversation"] for i in range(3)]
    assert [again[i]["conversation"] for i in (2, 1, 0)] == forwards[::-1]
    drawn = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        drawn |= {data[i]["conversation"][0]["content"].split(" for ")[0] for i in range(3)}
    assert len(drawn) == 3  # every template was drawn
    data.set_epoch(0)
    assert [data[i]["conversation"] for i in range(3)] == forwards


def test_instruction_answers_describe_the_crayon(coco_dataset):
    data = CrayonInstructionDataset(coco_dataset, templates=["boxes"])
    answer = data[0]["conversation"][1]["content"]
    found = parse_objects(answer.removeprefix("Sure, it is "))
    assert [(one.number, one.name) for one in found] == [
        (1, "horse"), (2, "horse"), (1, "person"), (1, "sky"), (1, "grass"),
    ]  # fmt: skip
    assert found[0].box == (0.06, 0.17, 0.31, 0.67)


def test_images_without_segments_are_left_out(coco_folder):
    path = coco_folder / "panoptic.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["segments_info"] = []
    path.write_text(json.dumps(content))
    samples = CocoPanopticDataset(coco_folder / "images", coco_folder / "panoptic", path)
    data = CrayonInstructionDataset(samples)
    assert len(samples) == 3 and len(data) == 2
    assert data[1]["image"].size == (30, 16)
    assert samples[1].panoptic.num_segments == 0


def test_workers_see_the_same_batches_and_the_epoch(coco_dataset, tiny_processor):
    """Workers hold pickled or forked copies; one that lives on still sees a new epoch."""
    data = CrayonInstructionDataset(coco_dataset, seed=1)
    collator = CrayonCollator(tiny_processor())
    loader = DataLoader(
        data, batch_size=3, num_workers=1, collate_fn=collator, persistent_workers=True
    )
    for epoch in range(3):
        data.set_epoch(epoch)
        (batch,) = list(loader)
        expected = collator([data[i] for i in range(3)])
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key


def test_pickling(coco_dataset, tiny_processor):
    data = CrayonInstructionDataset(coco_dataset, seed=1)
    copy = pickle.loads(pickle.dumps(data))
    assert copy[1]["conversation"] == data[1]["conversation"]
    collator = pickle.loads(pickle.dumps(CrayonCollator(tiny_processor())))
    assert sorted(collator([copy[0]])) == [
        "attention_mask", "crayon_class", "crayon_index", "crayon_number", "input_ids", "labels",
        "pixel_values",
    ]  # fmt: skip


def test_llava_json(tmp_path, coco_folder, tiny_processor):
    """LLaVA's own format: relative images, '<image>' in the first turn, text-only records."""
    records = [
        {
            "id": "a",
            "image": "001.png",
            "conversations": [
                {"from": "human", "value": "<image>\nIs there a horse"},
                {"from": "gpt", "value": "yes"},
            ],
        },
        {"conversations": [{"from": "human", "value": "What"}, {"from": "gpt", "value": "no"}]},
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records))
    seen = []

    def segment(image_path):
        seen.append(image_path.name)
        return PanopticMap.empty(12, 16)

    data = ConversationDataset.from_llava_json(
        path, images=coco_folder / "images", panoptic=segment
    )
    processor = tiny_processor()
    batch = CrayonCollator(processor)([data[0], data[1]])
    assert seen == ["001.png"]
    assert spoken(processor, batch, 0) == [" yes</s>"]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0]


def test_a_long_conversation_is_cut_behind_a_whole_answer(tiny_processor):
    """Half an answer teaches to stop nowhere, and half an image is none."""
    processor = tiny_processor()
    image = Image.new("RGB", (8, 8))
    full = CrayonCollator(processor)([record(image=image)])
    length = full["input_ids"].shape[1]
    cut = CrayonCollator(processor, max_length=length - 1)([record(image=image)])
    kept = cut["input_ids"].shape[1]
    assert torch.equal(cut["labels"], full["labels"][:, :kept])
    assert spoken(processor, cut) == [" yes</s>"] and int(cut["labels"][0, -1]) != -100
    with pytest.raises(OverlongError, match=rf"expected at most max_length={length - 1} tokens"):
        CrayonCollator(processor, max_length=length - 1, overlong="raise")([record(image=image)])
    with pytest.raises(ValueError, match="overlong: expected 'cut' or 'raise', got 'skip'"):
        CrayonCollator(processor, overlong="skip")([record()])


def test_an_image_behind_the_cut_is_left_out(tiny_processor):
    """Its pixels would be looked for by image tokens that are not there."""
    processor = tiny_processor(chat_template=CHAT_TEMPLATES["v1"], texts=["USER ASSISTANT"])
    part = {"type": "image"}
    turns = [dict(TURNS[0]), TURNS[1], dict(TURNS[2]), TURNS[3]]
    for turn in (turns[0], turns[2]):
        turn["content"] = [part, {"type": "text", "text": turn["content"]}]
    two = record(conversation=turns, image=[Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])
    whole = CrayonCollator(processor)([two])
    length = whole["input_ids"].shape[1]
    cut = CrayonCollator(processor, max_length=length - 1)([two])
    assert (whole["pixel_values"].shape[0], cut["pixel_values"].shape[0]) == (2, 1)
    assert (cut["input_ids"] == processor.image_token_id).sum() == 16
    assert cut["crayon_index"].shape == (1, 16)


def test_an_answer_that_is_cut_away_is_named(tiny_processor):
    """A batch without a label has a loss of 0 / 0, and one such step spoils every weight."""
    processor = tiny_processor()
    whole = CrayonCollator(processor)([record()])
    start = int((whole["labels"] != -100).int().argmax())
    with pytest.raises(ValueError, match=r"records\[0\]: nothing of its answer is left within"):
        CrayonCollator(processor, max_length=start)([record()])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"records\[0\]: expected 'conversation' as a list of messages"),
        ({"conversation": []}, r"records\[0\]: expected 'conversation'"),
        (
            {"conversation": [{"role": "robot", "content": ""}]},
            r"conversation\[0\]: expected 'role'",
        ),
        ({"conversation": TURNS[:1]}, "expected an assistant's turn"),
        (
            {"conversation": TURNS, "panoptic": PanopticMap.empty(2, 2)},
            "expected 0 maps for 'image'",
        ),
        (
            {"conversation": [{"role": "user", "content": [{"type": "text"}]}, *TURNS[1:]]},
            r"conversation\[0\]: expected 'content' as a string, or a list",
        ),
        (
            {"conversation": [{"role": "user", "content": None}, *TURNS[1:]]},
            r"conversation\[0\]: expected 'content'",
        ),
    ],
)
def test_malformed_records_are_named(tiny_processor, bad, message):
    with pytest.raises(ValueError, match=message):
        CrayonCollator(tiny_processor())([bad])
    with pytest.raises(ValueError, match=message):
        ConversationDataset([bad])


def test_template_without_generation_block(tiny_processor):
    """Answers are told from questions by what each turn adds: no training on everything."""
    marked = tiny_processor()
    plain = tiny_processor(
        chat_template=re.sub(r"{%- (end)?generation -%}", "", CHAT_TEMPLATES["demo"])
    )
    one, other = (CrayonCollator(each)([record()]) for each in (marked, plain))
    assert torch.equal(one["labels"], other["labels"])
    lost = tiny_processor(chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out the words of turn 0"):
        CrayonCollator(lost)([record()])


def test_the_model_takes_what_the_collator_and_the_processor_make(coco_dataset, tiny_processor):
    """Mixed batch, text-only batch and a prompt for generate(), end to end."""
    processor = tiny_processor()
    vision = tiny_vision(16)
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }  # fmt: skip
    config = CollavoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        crayon_mode="attention",
    )
    model = CollavoForConditionalGeneration(config).eval()
    collator = CrayonCollator(processor)
    data = CrayonInstructionDataset(coco_dataset)
    for records in ([data[0], record(), data[1]], [record(), record()]):
        loss = model(**collator(records)).loss
        assert loss.dim() == 0 and bool(loss.isfinite())
    prompts = [processor.prompt("What"), processor.prompt("What", num_images=0)]
    inputs = processor(
        text=prompts,
        images=[data[0]["image"]],
        panoptic=[data[0]["panoptic"]],
        padding=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
