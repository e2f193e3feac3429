"""What a resumed run of LLaVA's stages shares beside tensors: pictures, maps, precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from collavo.processing import CollavoProcessor
from collavo.train import checkpoint
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.collator import CrayonCollator
from collavo.train.dataset import ConversationDataset

TALK = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "yes"}]


def facts(processor: Any, maps: Any = None) -> dict[str, Any]:
    data = ConversationDataset([{"conversation": TALK, "image": Image.new("RGB", (2, 2))}])
    data.panoptic = maps
    return checkpoint.data_facts(data, CrayonCollator(processor))


def test_how_pictures_are_made_counts(tiny_processor: Callable[..., Any], tmp_path: Path) -> None:
    """Padded or cropped, a picture has as many tokens, so ids and labels are the same."""
    found = [facts(tiny_processor(mode=mode)) for mode in ("squash", "crop", "pad")]
    assert len({one["processor"] for one in found}) == 1
    pictures = [
        json.dumps({name: one[name] for name in sorted(one) if name.startswith("image_processor.")})
        for one in found
    ]
    assert len(set(pictures)) == 3
    tiny_processor(mode="pad").save_pretrained(tmp_path)
    assert facts(CollavoProcessor.from_pretrained(tmp_path)) == found[2]


def test_where_maps_come_from_counts(tiny_processor: Callable[..., Any]) -> None:
    """Else a run that has lost --panoptic goes on with one unknown segment for each picture."""
    processor = tiny_processor()
    assert "maps" not in facts(processor)
    assert facts(processor, lambda _: None)["maps"] == "function"


def test_precision_counts_in_llavas_stages(tmp_path: Path) -> None:
    def precision(stage: str, **given: Any) -> Any:
        args = CollavoTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, stage=stage, **given
        )
        return args.stream_facts().get("precision")

    assert precision("align") == "bf16" and precision("align", bf16=False) == "float32"
    assert precision("cit", bf16=True) is None


@pytest.mark.parametrize("name", ["adapters", "maps"])
def test_a_fact_that_this_run_lacks_counts_too(tmp_path: Path, name: str) -> None:
    """Not only another value: adapters that are no longer named, maps that are gone."""
    sealed = {"stage": "instruct", name: "those", "files": {}}
    (tmp_path / checkpoint.STREAMS).write_text(json.dumps(sealed))
    for file in checkpoint.RESUME_FILES:
        (tmp_path / file).write_text("{}")
    checkpoint.check_resume(tmp_path, {"stage": "instruct", name: "those"})
    with pytest.raises(ValueError, match=rf"^{name}: .*'those', this run has None"):
        checkpoint.check_resume(tmp_path, {"stage": "instruct"})
