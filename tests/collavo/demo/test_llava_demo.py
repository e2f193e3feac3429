"""``collavo demo --llava``: its records and scores, and its whole run for a handful of steps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from collavo.cli import main
from collavo.conversations import ConversationDataset
from collavo.demo.conversations import Viewed
from collavo.demo.llava import settings
from collavo.demo.llava.captions import score_captions
from collavo.demo.llava.parts import PATCH
from collavo.demo.llava.talks import (
    Talker,
    caption,
    caption_questions,
    place_questions,
    place_turns,
    turns,
    write_records,
)
from collavo.demo.scenes import SIZE, make_scene
from collavo.demo.storage import Scenes, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, [make_scene(np.random.default_rng(seed)) for seed in range(30)])
    return Scenes(folder)


def test_the_object_that_is_asked_for_is_a_patch_away_from_all_others(scenes: Scenes) -> None:
    """Otherwise two objects in one row of patches would make the answer a guess."""
    asked = 0
    for index in range(len(scenes)):
        view = Viewed(scenes, index)
        boxes = {id(one): [value * SIZE for value in one.box] for one in view.things}
        for question, answer in place_turns(view):
            asked += 1
            edge, sign = (1, 1.0) if "top" in question else (3, -1.0)
            order = sorted(view.things, key=lambda one: sign * boxes[id(one)][edge])
            first, second = (boxes[id(one)][edge] for one in order[:2])
            assert order[0].name == answer
            assert abs(first - second) >= PATCH - 0.5
    assert asked >= len(scenes) // 2


def test_conversations_follow_from_seed_and_number_and_every_class_is_in_the_caption(
    scenes: Scenes,
) -> None:
    view = Viewed(scenes, 3)
    assert turns(view, random.Random("7")) == turns(view, random.Random("7"))
    assert turns(view, random.Random("7")) != turns(view, random.Random("8"))
    words = caption(view)
    assert all(f" {one.name}" in words for one in view.detections)


def test_the_records_are_llavas_and_none_is_faulty(scenes: Scenes, tmp_path: Path) -> None:
    talker = Talker(scenes, ["sky grass"] * len(scenes), seed=0)
    records = [*talker.captions(), *talker.about_images(range(40)), *talker.about_words(range(20))]
    write_records(tmp_path / "all.json", records)
    data = ConversationDataset.from_llava_json(
        tmp_path / "all.json", images=scenes.images, on_fault="raise", workers=0
    )
    assert len(data) == 90
    assert int(data.with_image.sum()) == 70
    assert "sky grass\n" in data[70]["conversation"][0]["content"]


def test_a_caption_is_right_by_all_its_classes_and_no_other(scenes: Scenes) -> None:
    questions = caption_questions(scenes)
    truth = [question.answer for question in questions]
    assert score_captions(questions, truth).right == 1.0
    assert score_captions(questions, ["nothing"] * len(truth)).recall == 0.0
    more = [f"{text} and a zebra and a {text.split(' a ')[1].split()[0]}" for text in truth]
    assert score_captions(questions, more).right == 1.0, "named twice, or no class of the scenes"
    every = "person car dog horse cat bus cow bird sheep boat sky grass sea"
    score = score_captions(questions, [every] * len(truth))
    assert (score.right, score.recall) == (0.0, 1.0)
    with pytest.raises(ValueError, match="one for each"):
        score_captions(questions, truth[1:])


def test_the_run_writes_its_report_and_what_must_not_move_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = settings.Settings(
        train_scenes=40, test_scenes=8, batch_size=8, align_steps=4, instruct_steps=6
    )
    monkeypatch.setattr(settings, "QUICK", small)
    assert main(["demo", "--llava", "--quick", "--output", str(tmp_path / "run")]) == 0
    assert "after instruct, with the crayon" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["measurements"]) == {
        "built", "aligned", "instructed", "crayon shuffled", "crayon left out",
    }  # fmt: skip
    exact = [check for check in report["checks"] if check["exact"]]
    assert len(exact) == 2 and all(check["passed"] for check in exact)
    assert report["stages"]["align"]["moved"] == 4, "two layers of the projector"
    for name in ("report.md", "scene.png", "model/config.json", "captions.json"):
        assert (tmp_path / "run" / name).is_file(), name


def test_ablations_are_the_other_demos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["demo", "--llava", "--ablations", "--output", str(tmp_path / "run")]
    assert main(given) == 2
    assert "--ablations" in capsys.readouterr().err


def test_questions_for_places_are_of_one_kind(scenes: Scenes) -> None:
    assert {question.kind for question in place_questions(scenes)} == {"b2c"}


@pytest.mark.slow
def test_the_quick_run_reaches_its_margins(tmp_path: Path) -> None:
    # About a minute on two cores. The margins leave room for how processors round.
    out = tmp_path / "run"
    assert main(["demo", "--llava", "--quick", "--no-progress", "--output", str(out)]) == 0
    checks = json.loads((out / "report.json").read_text())["checks"]
    assert len(checks) == 7 and all(check["passed"] for check in checks)
