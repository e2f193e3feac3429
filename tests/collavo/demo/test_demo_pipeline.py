"""The demo's language, and its whole pipeline for a handful of steps."""

import argparse
import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from collavo.cli import main
from collavo.cli.demo import _verdict
from collavo.demo import answers, report
from collavo.demo.base import answer_loss
from collavo.demo.construction import only_adapter
from collavo.demo.conversations import Talks, Viewed, base_talk, image_talk, list_talk, vl_talk
from collavo.demo.estimate import estimate_seconds
from collavo.demo.experiment import BASE, Experiment
from collavo.demo.language import build_tokenizer, split_words
from collavo.demo.scenes import SIZE, Scene, SceneObject, make_scene
from collavo.demo.settings import QUICK, Margins
from collavo.demo.storage import Scenes, write_scenes
from collavo.demo.tuning import Phase, run_phase, same_bits, snapshot
from collavo.panoptic import parse_objects
from collavo.processing.processor import CollavoProcessor
from collavo_kernels.info import processor_name

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
        shipped_base=False,
        vision_steps=3,
        base_steps=3,
        cpt_steps=3,
        cit_steps=10,
        control=True,
        ablations=True,
        margins=Margins(b2c_control=200.0),
    )
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    experiment = Experiment(settings, 3, folder, lines.append, progress=False)
    return experiment, experiment.run(), settings, folder, lines


def test_the_base_that_comes_with_the_package_is_one_of_the_full_demo(finished):
    # Same parts, same sizes, a tokenizer that knows every word of the scenes: nothing was changed
    # since it was made that would ask for another.
    experiment, _, _, folder, _ = finished
    made, shipped = folder / "base_model", BASE
    assert {path.name for path in shipped.iterdir()} == {path.name for path in made.iterdir()}
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
        for path in (made / "model.safetensors", shipped / "model.safetensors")
    ]
    vocabulary = CollavoProcessor.from_pretrained(shipped).tokenizer.get_vocab()
    different = {n for n in shapes[0] if shapes[0][n] != shapes[1].get(n)}
    assert shapes[0].keys() == shapes[1].keys()
    # Twelve scenes have fewer words than the whole run's four thousand.
    assert all("embed_tokens" in name for name in different)
    assert set(experiment.processor.tokenizer.get_vocab()) <= set(vocabulary)
    assert shapes[1]["model.language_model.embed_tokens.weight"][0][0] == len(vocabulary)


@pytest.mark.slow
def test_the_quick_demo_shows_the_claim(tmp_path):
    # About a minute and a half on one core. The margins leave room for how processors round.
    experiment = Experiment(QUICK, 0, tmp_path, lambda line: None, progress=False)
    found = report.checks(experiment.run(), QUICK)
    assert len([check for check in found if not check.exact]) == 6
    assert [check.name for check in found if not check.passed] == []


def test_every_stage_is_measured_on_both_kinds_of_questions(finished):
    _, results, _, _, lines = finished
    assert set(results.measurements) == {
        "base", "cpt", "cit", "cit, crayon shuffled", "cit, crayon left out",
        "control", "one adapter", "image phase", "vl phase",
    }  # fmt: skip
    for one in results.measurements.values():
        assert one.b2c.questions > 0
        assert one.c2b.questions > 0
    assert any("vl phase" in line for line in lines)


def test_instruction_tuning_takes_turns_and_the_phases_do_not(finished):
    steps = {name: phase["steps"] for name, phase in finished[1].phases.items()}
    assert steps["CPT"] == {"image": 3, "vl": 0}
    assert min(steps["CIT"].values()) > 0
    assert sum(steps["CIT"].values()) == 10
    # The control gets the steps of CPT too, and one adapter the same turns as two.
    assert sum(steps["CIT, no crayon"].values()) == 13
    assert steps["CIT, one adapter"] == steps["CIT"]
    assert steps["CIT, image phase"] == {"image": 5, "vl": 0}
    assert steps["CIT, vl phase"] == {"image": 0, "vl": 5}


def test_what_holds_by_construction_holds_after_three_steps(finished):
    # Three steps teach nothing; these facts do not depend on how much was learned.
    _, results, settings, _, _ = finished
    exact = [check for check in report.checks(results, settings) if check.exact]
    assert len(exact) == 5
    assert all(check.passed for check in exact)
    assert results.facts["phases"]["crayon_moved_in_vl_phase"] > 0.0


def test_a_moved_idle_adapter_is_seen(finished, monkeypatch):
    # The check must be able to fail: here nothing drops the idle adapter's gradients.
    experiment, _, settings, folder, _ = finished
    monkeypatch.setattr("collavo.train.trainer.drop_idle_gradients", lambda *_: None)
    model = copy.deepcopy(experiment.model)
    phase = Phase("CIT", "cit", 4, 1e-2, image_talk, vl_talk, 0.5)
    trained = run_phase(
        model, experiment.processor, experiment.train, phase,
        folder=folder / "trainer", seed=3, batch_size=settings.batch_size, progress=False,
    )  # fmt: skip
    assert not trained.idle_kept


def test_one_adapter_leaves_the_other_without_effect(finished):
    experiment, _, settings, folder, _ = finished
    model = copy.deepcopy(experiment.model)
    before = snapshot(model.adapter_parameters("vl"))
    moved = snapshot(model.adapter_parameters("image"))
    phase = Phase("CIT", "cit", 4, 1e-2, image_talk, vl_talk, 0.5, one_adapter=True)
    run_phase(
        model, experiment.processor, experiment.train, phase,
        folder=folder / "trainer", seed=3, batch_size=settings.batch_size, progress=False,
    )  # fmt: skip
    assert same_bits(before, model.adapter_parameters("vl"))
    assert not same_bits(moved, model.adapter_parameters("image"))


def test_a_missed_margin_is_a_line_and_a_broken_fact_an_exit_status(finished, capsys):
    _, results, settings, _, _ = finished
    found = report.checks(results, settings)
    missed = [check for check in found if not check.passed]
    assert [check.exact for check in missed] == [False]
    lines = report.check_lines(found)
    assert "missed B2C: after CIT minus the same steps without crayon" in lines
    assert "(at least +200.0)" in lines
    arguments = argparse.Namespace(seed=3)
    assert _verdict(found, arguments) == 0
    assert capsys.readouterr().err == ""
    broken = dataclasses.replace(results, facts={**results.facts, "base_identical": False})
    assert _verdict(report.checks(broken, settings), arguments) == 1
    assert "4-bit base" in capsys.readouterr().err


def test_the_estimate_counts_steps_and_leaves_the_generators_alone(finished):
    small = finished[2]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one = estimate_seconds(small)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    # Times of three steps are noisy; a hundred times the steps is not within that noise.
    more = dataclasses.replace(small, base_steps=300, cit_steps=600)
    assert estimate_seconds(more) > 3 * one > 0.0


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
    assert content["measurements"]["cit"]["c2b"]["questions"] > 0
    assert content["processor"] == processor_name()
    assert content["isa"]
    answered = answers.ask_about_scene(experiment, 0)
    answers.draw_answers(experiment.test, 0, answered, folder / "scene.png")
    assert (folder / "scene.png").stat().st_size > 1000
    assert "after CIT, both adapters in turn" in report.table(results)
    assert "Describe the image." in answers.scene_lines(answered)


def test_the_scene_that_is_shown_has_a_cell_for_each_of_its_objects(tmp_path):
    # An object that is the majority of no cell is one that the crayon cannot tell of.
    segmentation = np.full((SIZE, SIZE), 1, dtype=np.int32)
    segmentation[20, 20] = 2
    segments = (
        SceneObject(1, "sky", False, (0, 0, SIZE, SIZE)),
        SceneObject(2, "dog", True, (20, 20, 21, 21)),
    )
    lost = Scene(np.zeros((SIZE, SIZE, 3), dtype=np.uint8), segmentation, segments)
    write_scenes(tmp_path, [lost, make_scene(np.random.default_rng(0))])
    assert answers.clear_scene(Scenes(tmp_path)) == 1


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
def test_eval_names_what_is_wrong(scenes, change, message, tmp_path, capsys):
    folder = scenes.images.parent
    # Of a model folder only this is looked at before the questions are made.
    (tmp_path / "config.json").write_text('{"model_type": "collavo"}', encoding="utf-8")
    command = [
        "eval", "--model", str(tmp_path), "--images", str(folder / "images"),
        "--panoptic", str(folder / "panoptic"), "--annotations", str(folder / "panoptic.json"),
    ]  # fmt: skip
    assert main([*command, *change]) == 2
    assert message in capsys.readouterr().err


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "--output" in capsys.readouterr().err
