"""Instructions and their inverse: what is written is read, and nothing else is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collavo.panoptic import (
    DISPLAY_NAMES,
    TEMPLATES,
    Detection,
    build_instruction,
    build_instructions,
    draw_instruction,
    parse_instruction,
)

HORSE = Detection("horse", 1, (0.06, 0.38, 0.27, 0.91))
SKY = Detection("sky", 1, (0.0, 0.0, 1.0, 0.5))
CLASS = TEMPLATES["class"].format(select_class="horse")
START = "Sure, it is "


@st.composite
def detections(draw):
    hundredths = st.integers(0, 100)
    x1, x2 = sorted((draw(hundredths), draw(hundredths)))
    y1, y2 = sorted((draw(hundredths), draw(hundredths)))
    box = (x1 / 100, y1 / 100, x2 / 100, y2 / 100)
    name = draw(
        st.sampled_from(DISPLAY_NAMES[:4])
        | st.from_regex(r"[a-z'{}]{1,4}( [a-z]{1,3})?", fullmatch=True)
    )
    return Detection(name, draw(st.integers(0, 120)), box)


def rewrite(parsed):
    """Write again what was read; the names alone say nothing of boxes, so any box will do."""
    objects = parsed.objects or [Detection(n, i, (0, 0, 1, 1)) for n, i in parsed.names]
    return build_instruction(objects, parsed.template, select_class=parsed.select_class)


@given(
    st.lists(detections(), min_size=1, max_size=6),
    st.sampled_from(list(TEMPLATES)),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip(objects, template, seed):
    made = build_instruction(objects, template, rng=random.Random(seed))
    parsed = parse_instruction(made.question, made.answer)
    assert parsed.template == template
    if template == "class":
        assert made.question == TEMPLATES["class"].format(select_class=parsed.select_class)
        objects = [one for one in objects if one.name == parsed.select_class]
    else:
        assert parsed.select_class is None
    assert parsed.names == tuple((one.name, one.number) for one in objects)
    assert parsed.objects == (() if template == "names" else tuple(objects))
    assert rewrite(parsed) == made


@given(st.lists(detections(), min_size=1, max_size=3), st.sampled_from(list(TEMPLATES)), st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_what_is_accepted_is_what_would_be_written(objects, template, data):
    """A character put in, taken out or exchanged: refused, or what the builder itself writes."""
    made = build_instruction(objects, template, rng=random.Random(0))
    texts = [made.question, made.answer]
    which = data.draw(st.integers(0, 1))
    place = data.draw(st.integers(0, len(texts[which])))
    new = data.draw(st.text(alphabet="(#1 horse) [0.25,]d\n9.", max_size=2))
    cut = data.draw(st.integers(0, 2))
    texts[which] = texts[which][:place] + new + texts[which][place + cut :]
    try:
        parsed = parse_instruction(*texts)
    except ValueError as error:
        assert str(error).startswith(("question: ", "answer: ")) and " at character " in str(error)
        return
    again = rewrite(parsed)
    assert [again.question, again.answer] == texts


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("What is it?", START, "expected one of the questions of TEMPLATES at character 0"),
        (TEMPLATES["names"] + " ", START, "question: .* at character 70, got ' '"),
        (TEMPLATES["names"][:-2], START, "question: .* at character 68, got ''"),
        (CLASS[:-1], START, "question: expected a class name and ' in the image.' at character"),
        (CLASS.replace("horse", ""), START, "question: expected a class name .* at character 46"),
        (CLASS.replace("horse", "a, b"), START, "at character 47, got ', b in the image.'"),
        (CLASS.replace("horse", "__import__('os')"), START, "question: expected a class name"),
        (CLASS, "Sure, it was", "answer: expected 'Sure, it is ' at character 9, got 'was'"),
        (CLASS, START, "answer: expected at least one object at character 12, got ''"),
        (CLASS, f"{START}{HORSE}.", r"answer: expected ', ' or the end at character 47, got '\.'"),
        (CLASS, f"{START}{HORSE}, {SKY}", r"of class 'horse' at character 49, got '\(#1 sky"),
        (CLASS, f"{START}{SKY}", "objects of class 'horse' at character 12"),
        (CLASS, f"{START}#1 horse", r"answer: expected '\(#1 name\) .* at character 12"),
        (
            TEMPLATES["boxes"],
            f"{START}(#1 cow) [0.30, 0.00, 0.20, 1.00]",
            "answer: expected x1 <= x2 and y1 <= y2 at character 22, got '0.30",
        ),
        (
            TEMPLATES["boxes"],
            f"{START}{HORSE}, (#01 cow) [0.00, 0.00, 1.00, 1.00]",
            "answer: expected a number without leading zeros at character 51, got '01 cow",
        ),
        (TEMPLATES["names"], f"{START}{HORSE}", "answer: expected '#1 name' at character 12"),
    ],
)  # fmt: skip
def test_refused_with_the_position(question, answer, message):
    with pytest.raises(ValueError, match=message):
        parse_instruction(question, answer)


def test_every_instruction_of_an_image():
    """One per template, but one per class where a class is asked for; none for an empty image."""
    made = build_instructions([HORSE, SKY])
    assert [one.template for one in made] == ["names", "boxes", "class", "class"]
    assert made[2] == build_instruction([HORSE, SKY], "class", select_class="horse")
    assert made[3].answer == f"{START}{SKY}"
    assert build_instructions([]) == []
    assert [one.template for one in build_instructions([HORSE], ["boxes"])] == ["boxes"]


def test_draws_are_among_the_templates():
    made = build_instructions([HORSE, SKY])
    drawn = {draw_instruction(made, ["names", "class"], random.Random(i)) for i in range(40)}
    assert drawn == {made[0], made[2], made[3]}
    with pytest.raises(ValueError, match="expected one with template 'names', got none"):
        draw_instruction(made[1:], ["names"], random.Random(0))


@pytest.mark.parametrize("templates", [[], ["colours"], ["names", "names"]])
def test_templates_are_checked(templates):
    with pytest.raises(ValueError, match="templates: expected some of names, boxes, class"):
        build_instructions([HORSE], templates)
