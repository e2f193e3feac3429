"""Scores of hand-made answers, and the questions that are made from a map."""

import numpy as np
import pytest
import torch

from collavo.demo.scenes import THING_NAMES, make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.evaluation import (
    ObjectQuestion,
    ask_class,
    ask_presence,
    box_questions,
    class_questions,
    is_right,
    normalise_answer,
    score,
)
from collavo.evaluation.answering import with_crayon
from collavo.panoptic import detections_from_map
from collavo.processing import to_padded


def c2b(name, answer):
    return ObjectQuestion("c2b", 0, name, ask_presence(name), answer)


def b2c(name):
    return ObjectQuestion("b2c", 0, name, "Which object is in the box [...]?", name)


def test_accuracy_recall_and_specificity_by_hand():
    asked = [c2b("dog", "yes"), c2b("cat", "yes"), c2b("cow", "yes"), c2b("dog", "no"),
             c2b("cow", "no")]  # fmt: skip
    result = score("c2b", asked, ["Yes", "no", "yes.", "No, none", "maybe"])
    assert result.questions == 5
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.recall == pytest.approx(2 / 3)
    assert result.specificity == pytest.approx(1 / 2)
    assert result.unreadable == 1


def test_always_yes_has_full_recall_and_no_specificity():
    # The paper's printed questions have positives only: this is what they would not notice.
    asked = [c2b("dog", "yes"), c2b("dog", "no")]
    result = score("c2b", asked, ["yes", "yes"])
    assert (result.accuracy, result.recall, result.specificity) == (0.5, 1.0, 0.0)


def test_classes_weigh_the_same_in_the_class_mean():
    asked = [b2c("dog")] * 3 + [b2c("cat")]
    result = score("b2c", asked, ["dog", "dog", "cat", "cat"])
    assert result.accuracy == pytest.approx(3 / 4)
    assert result.class_mean == pytest.approx((2 / 3 + 1) / 2)
    rows = {row.name: (row.questions, row.accuracy) for row in result.classes}
    assert rows == {"dog": (3, pytest.approx(2 / 3)), "cat": (1, 1.0)}
    assert result.recall is None
    assert result.unreadable == 0


def test_top_and_bottom_twenty():
    names = [f"class{i:02d}" for i in range(30)]
    asked = [b2c(name) for name in names]
    answers = [name if i < 15 else "wrong" for i, name in enumerate(names)]
    result = score("b2c", asked, answers)
    assert result.top20 == pytest.approx(15 / 20)
    assert result.bottom20 == pytest.approx(5 / 20)


def test_nothing_asked_has_no_score():
    result = score("c2b", [b2c("dog")], ["dog"])
    assert result.questions == 0
    assert result.accuracy is None
    assert result.as_dict()["classes"] == ()


def test_as_many_answers_as_questions():
    with pytest.raises(ValueError, match="answers: expected 1, got 2"):
        score("b2c", [b2c("dog")], ["dog", "cat"])


@pytest.mark.parametrize(
    ("said", "right"),
    [("traffic light", True), ("A Traffic  light.", True), ("light", False), ("", False),
     ("traffic light and dog", False)],
)  # fmt: skip
def test_b2c_takes_the_name_only(said, right):
    assert is_right(b2c("traffic light"), said) is right


@pytest.mark.parametrize(
    ("said", "right"),
    [("yes", True), ("Yes, two.", True), ("yesterday", False), ("there is: yes", False)],
)
def test_c2b_takes_the_first_word(said, right):
    assert is_right(c2b("dog", "yes"), said) is right


def test_articles_and_blanks_do_not_matter():
    assert normalise_answer("  An  Apple! ") == "apple"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    write_scenes(folder, [make_scene(np.random.default_rng(seed)) for seed in range(8)])
    return Scenes(folder)


def test_every_positive_has_a_negative_that_is_not_there(scenes):
    asked = class_questions(scenes, candidates=THING_NAMES, seed=1)
    assert asked == class_questions(scenes, candidates=THING_NAMES, seed=1)
    for image in range(len(scenes)):
        own = [question for question in asked if question.image == image]
        there = {question.name for question in box_questions(scenes) if question.image == image}
        assert {q.name for q in own if q.answer == "yes"} == there
        assert not {q.name for q in own if q.answer == "no"} & there
        assert sum(q.answer == "yes" for q in own) == sum(q.answer == "no" for q in own)


def test_stuff_is_not_asked_for(scenes):
    assert {question.name for question in box_questions(scenes)} <= set(THING_NAMES)


def test_boxes_of_questions_follow_the_processor(coco_dataset):
    """A model that saw boxes of padded squares is asked for them."""
    plain, padded = (box_questions(coco_dataset, box_frame=name) for name in ("image", "padded"))
    for one, other in zip(plain, padded, strict=True):
        height, width = coco_dataset.panoptic_map(one.image).size
        objects = detections_from_map(coco_dataset.panoptic_map(one.image))
        boxes = [item.box for item in objects if ask_class(item.box) == one.text]
        assert other.text in [ask_class(to_padded(box, height, width)) for box in boxes]
        assert other.text != one.text
        assert other.answer == one.answer
    with pytest.raises(ValueError, match="box_frame: expected one of image, padded, got 'map'"):
        box_questions(coco_dataset, box_frame="map")


def test_limit_and_candidates_are_checked(scenes):
    assert {question.image for question in box_questions(scenes, limit=2)} == {0, 1}
    with pytest.raises(ValueError, match="limit"):
        box_questions(scenes, limit=0)
    with pytest.raises(ValueError, match="sky"):
        class_questions(scenes, candidates=["sky"])


def test_shuffled_rows_are_all_moved_and_none_is_lost():
    batch = {
        "input_ids": torch.zeros(2, 1),
        "crayon_index": torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]], dtype=torch.int32),
        "crayon_class": torch.tensor([[0, 5, 7, 9], [0, 4, -1, -1]], dtype=torch.int32),
        "crayon_number": torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]], dtype=torch.int32),
    }
    changed = with_crayon(batch, "shuffled", torch.Generator().manual_seed(0))
    pairs = list(zip(changed["crayon_class"][0], changed["crayon_number"][0], strict=True))
    assert sorted((int(a), int(b)) for a, b in pairs) == [(0, 0), (5, 1), (7, 2), (9, 3)]
    assert (changed["crayon_class"][0, 1:] != batch["crayon_class"][0, 1:]).all()
    # A single segment has nowhere to go, and padding stays padding.
    assert torch.equal(changed["crayon_class"][1], batch["crayon_class"][1])
    assert torch.equal(changed["crayon_index"], batch["crayon_index"])
    assert set(with_crayon(batch, "off")) == {"input_ids"}
