"""The demo's language, and its whole pipeline for a handful of steps."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from collavo.cli import main
from collavo.demo import report
from collavo.demo.base import answer_loss
from collavo.demo.construction import only_adapter
from collavo.demo.conversations import Talks, Viewed, base_talk, image_talk, list_talk, vl_talk
from collavo.demo.experiment import Experiment
from collavo.demo.language import build_tokenizer, split_words
from collavo.demo.scenes import make_scene
from collavo.demo.settings import QUICK, Margins
from collavo.demo.storage import Scenes, write_scenes
from collavo.panoptic import parse_objects

TALKS = (base_talk, list_talk, image_talk, vl_talk)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, [make_scene(np.random.default_rng(seed)) for seed in range(12)])
    return Scenes(folder)


@pytest.mark.parametrize("talk", TALKS)
def test_the_tokenizer_gives_every_text_back(scenes, talk):
    turns = [turn for index in range(12) for turn in Talks(scenes, talk, 0).turns(index)]
    texts = [f" User: {question} Assistant: {answer}" for question, answer in turns]
    tokenizer = build_tokenizer(texts)
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids) == split_words(text)
        assert tokenizer.decode(ids) == text


def test_a_coordinate_has_a_token_of_its_own_for_each_corner():
    words = split_words(" [0.25, 0.25, 0.25, 0.25]")
    assert len(words) == len(set(words)) == 4


def test_lists_are_read_back_by_the_strict_parser(scenes):
    view = Viewed(scenes, 0)
    rng = random.Random(0)
    answers = {q: a for _ in range(20) for q, a in list_talk(view, rng)}
    boxed = next(a for q, a in answers.items() if "names" in q and "box" in q)
    found = parse_objects(boxed.removeprefix("Sure, it is "))
    assert [one.name for one in found] == [one.name for one in view.detections]


def test_short_answers_weigh_nearly_as_much_as_long_ones():
    # One answer of four tokens, one of a single token: weights 4 x 1/2 and 1.
    labels = torch.tensor([[-100, 1, 1, 1, 1, -100, 2]])
    logits = torch.zeros(1, 7, 3)
    logits[0, 5, 2] = 50.0  # the short answer is certain and right
    expected = (4 * 0.5 * np.log(3.0)) / (4 * 0.5 + 1.0)
    assert float(answer_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = dataclasses.replace(
        QUICK,
        train_scenes=24,
        test_scenes=6,
        batch_size=4,
        vision_steps=3,
        base_steps=3,
        cpt_steps=3,
        image_steps=3,
        vl_steps=3,
        control=True,
        margins=Margins(),
    )
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    experiment = Experiment(settings, 3, folder, lines.append, progress=False)
    return experiment, experiment.run(), settings, folder, lines


def test_every_stage_is_measured_on_both_kinds_of_questions(finished):
    _, results, _, _, lines = finished
    expected = {"base", "cpt", "image", "vl", "image, no crayon", "vl, no crayon"}
    assert expected < set(results.measurements)
    for one in results.measurements.values():
        assert one.b2c.questions > 0
        assert one.c2b.questions > 0
    assert any("vl, no crayon" in line for line in lines)


def test_what_holds_by_construction_holds_after_three_steps(finished):
    # Three steps teach nothing; these facts do not depend on how much was learned.
    _, results, settings, _, _ = finished
    facts = {check.name: check for check in report.checks(results, settings)}
    identical = [check for name, check in facts.items() if "bit" in name or "nothing else" in name]
    assert len(identical) == 4
    assert all(check.passed for check in identical)
    assert results.facts["crayon_moved_in_vl_phase"] > 0.0


def test_an_untrained_run_fails_its_margins(finished):
    _, results, settings, _, _ = finished
    failed = [check for check in report.checks(results, settings) if not check.passed]
    assert failed
    assert "FAILED" in report.check_lines(failed)


def test_switching_an_adapter_off_changes_the_output_and_is_undone(finished):
    experiment = finished[0]
    sample = experiment.test[0]
    processor = experiment.processor
    batch = processor(
        [sample.image], [processor.prompt("x")], [sample.panoptic], return_tensors="pt"
    )
    experiment.model.eval()
    with torch.no_grad():
        both = experiment.model(**batch).logits
        with only_adapter(experiment.model, "image"):
            one = experiment.model(**batch).logits
        assert not torch.equal(both, one)
        assert torch.equal(both, experiment.model(**batch).logits)


def test_report_and_picture(finished):
    experiment, results, settings, folder, _ = finished
    found = report.checks(results, settings)
    report.write_json(folder / "report.json", results, found, settings, 3)
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["seed"] == 3
    assert content["measurements"]["vl"]["c2b"]["questions"] > 0
    answered = report.ask_about_scene(experiment, 0)
    report.draw_answers(experiment.test, 0, answered, folder / "scene.png")
    assert (folder / "scene.png").stat().st_size > 1000
    assert "after vl phase, crayon" in report.table(results)
    assert "Describe the image." in report.scene_lines(answered)


def test_the_saved_model_is_evaluated_by_the_command(finished, tmp_path, capsys):
    experiment, _, _, folder, _ = finished
    experiment.model.save_pretrained(tmp_path / "model")
    experiment.processor.save_pretrained(tmp_path / "model")
    test = folder / "scenes" / "test"
    command = [
        "eval", "--model", str(tmp_path / "model"), "--images", str(test / "images"),
        "--panoptic", str(test / "panoptic"), "--annotations", str(test / "panoptic.json"),
        "--limit", "3", "--output", str(tmp_path / "scores.json"), "--no-progress",
        "--crayon", "on", "shuffled", "--candidates", "dog", "cat", "person",
    ]  # fmt: skip
    assert main(command) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["crayon"]) == {"on", "shuffled"}
    assert scores["images"] == 3
    assert scores["object_text"] is False
    assert "SPECIFICITY" in capsys.readouterr().out.upper()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--limit", "0"], "limit"),
        (["--candidates", "sky"], "sky"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_eval_names_what_is_wrong(scenes, change, message, capsys):
    folder = scenes.images.parent
    command = [
        "eval", "--model", str(folder), "--images", str(folder / "images"),
        "--panoptic", str(folder / "panoptic"), "--annotations", str(folder / "panoptic.json"),
    ]  # fmt: skip
    assert main([*command, *change]) == 2
    assert message in capsys.readouterr().err


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "--output" in capsys.readouterr().err
