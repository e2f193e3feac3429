"""Text and crayon of the recorded cases: exact where the official code is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from collavo.panoptic import (
    DISPLAY_NAMES,
    PanopticMap,
    detections_from_crayon,
    detections_from_map,
    format_names,
    format_objects,
    object_prefix,
    parse_objects,
)
from collavo.processing import CollavoProcessor, make_image_processor
from collavo.processing.chat_templates import CHAT_TEMPLATES, OBJECTS_MARKER
from collavo_kernels import panoptic_lookup

# The official code handles these as it means to.
RIGHT = (
    "single_person", "three_ascending", "minus1_background", "repeated_class_3person_2car",
    "repeated_20_instances", "noncontiguous_ids_ascending_info", "map_id_not_in_info_last",
    "full_image_one_segment", "single_pixels_in_corners", "disconnected_segment",
    "suffix_classes", "hf_postprocess_seed0", "hf_postprocess_seed1", "hf_postprocess_seed2",
)  # fmt: skip
# Its boxes are divided by 35 whatever the map's size.
OTHER_SIZES = ("other_size_48x64", "other_size_5x7", "other_size_70x35", "size_1x1")
# Its boxes are those of other segments.
WRONG_ORDER = ("noncontiguous_ids_info_order_9_2_5", "contiguous_ids_info_descending")


@pytest.fixture(scope="module")
def recorded(golden):
    tensors, facts = golden("panoptic")

    def load(case):
        infos = facts["cases"][case]["segments_info"]
        panoptic = PanopticMap.from_segments(
            tensors[f"{case}.segmentation"],
            [info["id"] for info in infos],
            [info["label_id"] for info in infos],
        )
        return panoptic, facts["cases"][case], tensors

    return load


def text_by_rule(panoptic):
    """The text that the rule gives, worked out segment by segment from the map itself."""
    height, width = panoptic.size
    numbers: dict[int, int] = {}
    items = []
    listed = zip(panoptic.segment_ids.tolist(), panoptic.segment_classes.tolist(), strict=True)
    for segment, label in sorted(listed):
        numbers[label] = numbers.get(label, 0) + 1
        y, x = np.nonzero(panoptic.ids().numpy() == segment)
        if y.size:
            box = (x.min() / width, y.min() / height, (x.max() + 1) / width, (y.max() + 1) / height)
            text = ", ".join(f"{round(value, 2):.2f}" for value in box)
            items.append(f"(#{numbers[label]} {DISPLAY_NAMES[label]}) [{text}]")
    return ", ".join(items)


def test_display_names(golden):
    assert list(DISPLAY_NAMES) == golden("panoptic")[1]["class_names_as_printed_by_label_id"]


@pytest.mark.parametrize("case", RIGHT)
def test_text_and_crayon_are_reproduced(recorded, case):
    panoptic, facts, tensors = recorded(case)
    crayon = panoptic_lookup(
        [panoptic.segmentation], [panoptic.segment_ids], [panoptic.segment_classes], grid=(35, 35)
    )
    detections = detections_from_crayon(crayon)
    assert format_objects(detections) == facts["classesboxes2string"]
    assert format_names(detections) == facts["classes2string"]
    first = DISPLAY_NAMES[facts["segments_info"][0]["label_id"]]
    assert format_objects(detections, first) == facts["class_name_filter_first"]
    assert (
        format_objects(parse_objects(facts["classesboxes2string"])) == facts["classesboxes2string"]
    )
    rows = crayon.row_index.reshape(35, 35).long()
    known = torch.isin(panoptic.segmentation, panoptic.segment_ids)
    # Where an id is not listed the official crayon repeats the segment before it.
    for ours, theirs in (("row_class", "seg_prompt_ind"), ("row_number", "seg_num_ind")):
        values = getattr(crayon, ours)[rows]
        assert torch.equal(values[known], tensors[f"{case}.{theirs}"][known])
        assert not bool(values[~known].any())


@pytest.mark.parametrize("case", WRONG_ORDER)
def test_list_order_does_not_move_boxes_or_numbers(recorded, case):
    """Recorded quirk: boxes and text numbers go by list position, the crayon's go by id."""
    panoptic, facts, _ = recorded(case)
    text = format_objects(detections_from_map(panoptic))
    assert text == text_by_rule(panoptic)
    assert not all(facts["boxes_belong_to_own_segment"])
    # Reversed lists of equal classes happen to read alike; there only the owners differ.
    assert (text == facts["classesboxes2string"]) == (case == "contiguous_ids_info_descending")


@pytest.mark.parametrize("case", OTHER_SIZES)
def test_boxes_are_normalised_by_the_maps_own_size(recorded, case):
    """Recorded quirk: every box is divided by 35, so that coordinates reach 1.83."""
    panoptic, facts, _ = recorded(case)
    text = format_objects(detections_from_map(panoptic))
    assert text == text_by_rule(panoptic)
    assert text != facts["classesboxes2string"]


@pytest.mark.parametrize("case", ["absent_segment_last", "absent_segment_middle"])
def test_absent_segment_is_not_listed_and_keeps_its_number(recorded, case):
    """Recorded quirk: a listed segment that covers no pixel crashes the official code."""
    panoptic, facts, _ = recorded(case)
    text = format_objects(detections_from_map(panoptic))
    assert text == text_by_rule(panoptic)
    assert text.count("#") == len(facts["segments_info"]) - 1


@pytest.mark.parametrize("case", ["map_id_not_in_info_middle", "one_absent_one_extra"])
def test_unlisted_id_does_not_shift_boxes(recorded, case):
    """Recorded quirk: an id that is not listed gives its box to the next segment."""
    panoptic, facts, _ = recorded(case)
    text = format_objects(detections_from_map(panoptic))
    assert text == text_by_rule(panoptic)
    assert text != facts["classesboxes2string"]


def test_unlisted_first_id(recorded):
    """Recorded quirk: an unlisted id before all listed ones crashes the official code."""
    panoptic, _, _ = recorded("map_id_not_in_info_first")
    assert format_objects(detections_from_map(panoptic)) == text_by_rule(panoptic)


@pytest.mark.parametrize(
    "case", ["repeated_23_instances_overflow", "repeated_22_of_which_21_same_class"]
)
def test_instances_after_the_last_number_get_zero(recorded, case):
    """Recorded quirk: the text counts on to 23 while the crayon's table ends at 20."""
    panoptic, facts, _ = recorded(case)
    detections = detections_from_map(panoptic)
    theirs = parse_objects(facts["classesboxes2string"])
    assert [(one.name, one.number) for one in detections] == [
        (one.name, one.number if one.number <= 20 else 0) for one in theirs
    ]
    assert max(one.number for one in theirs) > 20


@pytest.mark.parametrize(
    "case", ["none_all_minus1", "none_all_zero", "none_in_map_but_info_present"]
)
def test_maps_without_a_visible_segment(recorded, case):
    """Recorded quirk: the official code crashes; its caller says that there is nothing."""
    panoptic, _, _ = recorded(case)
    detections = detections_from_map(panoptic)
    assert detections == []
    assert object_prefix(detections) == "None of detailed object information for image. "


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fused_same_id_twice_in_info", "id 1 is listed twice"),
        ("label_id_133_out_of_range", "expected -1..132 for segment 1, got 133"),
    ],
)
def test_lists_that_mean_nothing_are_refused(recorded, case, message):
    """Recorded quirk: an IndexError somewhere inside."""
    with pytest.raises(ValueError, match=message):
        recorded(case)


@pytest.mark.parametrize(
    ("template", "key", "sample"),
    [("eval", "eval_prompts", 0), ("eval", "eval_prompts", 1), ("demo", "demo_prompt_0", 0),
     ("demo", "demo_prompt_1", 1)],
)  # fmt: skip
def test_prompts_are_reproduced(recorded, golden, tiny_processor, template, key, sample):
    """The released scripts' two prompts, through the chat template and the object text."""
    expected = golden("panoptic")[1]["process"][key]
    expected = expected[sample] if isinstance(expected, list) else expected
    question = ("What is this?", "Describe this image in detail")[sample]
    panoptic, _, _ = recorded("three_ascending")
    detections = detections_from_map(panoptic) if sample == 0 else []
    processor = tiny_processor(
        grid=(35, 35), texts=[expected], chat_template=CHAT_TEMPLATES[template]
    )
    prompt = processor.prompt(question)
    assert prompt.replace(OBJECTS_MARKER, object_prefix(detections)) == expected
    batch = processor(
        text=prompt,
        images=Image.new("RGB", (35, 35)),
        panoptic=[panoptic if sample == 0 else None],
        return_tensors="pt",
    )
    cells = batch["input_ids"][0] == processor.image_token_id
    assert int(cells.sum()) == 1225
    text = processor.decode(batch["input_ids"][0]).replace("<image>" * 1225, "<image>")
    assert text == expected


def character_tokenizer():
    """The recorded toy tokenizer: character c is 3 + ord(c) % 290, <image> 300, <s> 1, pad 2."""
    characters = {chr(code): 3 + code % 290 for code in (10, *range(32, 127))}
    core = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "<pad>": 2, "<image>": 300} | characters)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def test_the_released_scripts_inputs_are_reproduced(recorded, golden):
    """Token ids, masks, crayon and pixels of a batch of two, the second without a map."""
    tensors, _ = golden("panoptic")
    panoptic, _, _ = recorded("three_ascending")
    processor = CollavoProcessor(
        make_image_processor(4), character_tokenizer(), chat_template=CHAT_TEMPLATES["eval"]
    )
    questions = ("What is this?", "Describe this image in detail")
    images = [
        Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for pixels in tensors["process.eval.images_uint8"]
    ]
    batch = processor(
        text=[processor.prompt(question) for question in questions],
        images=images,
        panoptic=[panoptic, None],
        padding=True,
        return_tensors="pt",
    )
    cells = batch["input_ids"] == 300
    assert torch.equal(cells, tensors["process.eval.im_mask"])
    for ids, mask, expected, expected_mask in zip(
        batch["input_ids"],
        batch["attention_mask"],
        tensors["process.eval.input_ids"],
        tensors["process.eval.attention_mask"],
        strict=True,
    ):
        # The recorded ids have one placeholder where ours has one for every cell.
        first = int((ids == 300).nonzero()[0])
        keep = (ids != 300) | (torch.arange(len(ids)) == first)
        assert torch.equal(ids[keep], expected)
        assert torch.equal(mask[keep], expected_mask)
    for key, recorded_key in (("crayon_class", "semantic"), ("crayon_number", "number")):
        values = batch[key].gather(1, batch["crayon_index"].long())
        assert torch.equal(values, tensors[f"process.eval.seg_{recorded_key}"])
    torch.testing.assert_close(
        batch["pixel_values"], tensors["process.eval.pixel_values"], rtol=0, atol=1e-6
    )


def test_every_recorded_case_is_tested(golden):
    elsewhere = {
        "absent_segment_last", "absent_segment_middle", "map_id_not_in_info_middle",
        "one_absent_one_extra", "map_id_not_in_info_first", "repeated_23_instances_overflow",
        "repeated_22_of_which_21_same_class", "none_all_minus1", "none_all_zero",
        "none_in_map_but_info_present", "fused_same_id_twice_in_info", "label_id_133_out_of_range",
    }  # fmt: skip
    assert {*RIGHT, *OTHER_SIZES, *WRONG_ORDER, *elsewhere} == set(golden("panoptic")[1]["cases"])
