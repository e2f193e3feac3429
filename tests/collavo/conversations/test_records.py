"""Records of one's own: their form is checked, and messages name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from collavo.panoptic import PanopticMap
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset


def test_a_tag_in_a_message_with_an_image_is_named(tiny_processor: Callable[..., Any]) -> None:
    """There images are parts of a content; a line with the tag would be learned as words."""
    talk = [{"role": "user", "content": "<image>\nWhat"}, {"role": "assistant", "content": "yes"}]
    record = {"conversation": talk, "image": Image.new("RGB", (8, 8)), "id": 5}
    with pytest.raises(ValueError, match=r"records\[0\] \(id 5\): conversation\[0\]: '<image>' on"):
        CrayonCollator(tiny_processor())([record])
    talk[0]["content"] = "What is <image>"
    CrayonCollator(tiny_processor())([record])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object_text": "perhaps"}, "expected 'object_text' as true or false, got 'perhaps'"),
        ({"image": 3.5}, "'image': expected an RGB image"),
        ({"image": Image.new("RGB", (2, 2)), "panoptic": "a.png"}, "expected a PanopticMap, a"),
        (
            {
                "conversation": [
                    {"role": "user", "content": [{"type": "image"}]},
                    {"role": "assistant", "content": "yes"},
                ]
            },
            "expected no image part in 'content', or one for each of 0 images",
        ),
    ],
)
def test_values_of_records_are_checked(change: dict[str, Any], message: str) -> None:
    talk = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ValueError, match=rf"records\[0\] \(id 'a'\): .*{message}"):
        ConversationDataset([{"conversation": talk, "id": "a", **change}])


@pytest.mark.parametrize(("value", "named"), [("false", False), (1, True), (None, True)])
def test_object_text_as_other_tools_write_it(
    tiny_processor: Callable[..., Any], value: Any, named: bool
) -> None:
    """The text "false" is true to Python; None leaves it to the processor."""
    talk = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]
    image = Image.new("RGB", (4, 4))
    record = {"conversation": talk, "object_text": value, "image": image}
    record["panoptic"] = PanopticMap.empty(4, 4)
    processor = tiny_processor()
    batch = CrayonCollator(processor)([ConversationDataset([record])[0]])
    assert ("detailed object" in processor.tokenizer.decode(batch["input_ids"][0])) == named
