"""LLaVA's stages through the trainer: what moves, in which dtype, at which rate, in which steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_patched_training import make_patched
from tiny_collavo import MixedRecords, make_collavo
from torch import Tensor
from transformers import TrainerCallback

from collavo.loading import load_pretrained
from collavo.panoptic import CocoPanopticDataset
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.dataset import ConversationDataset, CrayonInstructionDataset
from collavo.train.sampler import JoinedDataset
from collavo.train.streams import GroupedStreams
from collavo.train.trainer import CollavoTrainer

PARTS = ("crayon", "projector", "decoder", "adapters", "vision")


def with_adapters(model: Any, quantize: bool = True) -> Any:
    """Two adapters that act, of which a run names one."""
    model.add_dual_qlora(("mine", "other"), rank=4, alpha=4.0, quantize=quantize)
    for name in ("mine", "other"):
        for parameter in model.adapter_parameters(name):
            parameter.data.normal_(0.0, 0.2)
    return model


def make_trainer(model: Any, folder: Path, data: Any = None, **changes: Any) -> CollavoTrainer:
    options = {
        "stage": "instruct",
        "global_batch": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0.0,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = CollavoTrainingArguments(output_dir=str(folder), **{**options, **changes})
    data = MixedRecords(10, text_every=3) if data is None else data
    return CollavoTrainer(model, args, data)


def part_of(name: str) -> str:
    """Tell by its name alone which part a tensor is of; the other adapter is of none."""
    words = name.split(".")
    if any("crayon" in word for word in words):
        return "crayon"
    if "lora_A" in words or "lora_B" in words:
        return "adapters" if "mine" in words else "other"
    for word, part in (("multi_modal_projector", "projector"), ("vision_tower", "vision")):
        if word in words:
            return part
    return "decoder"


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "align": ({"stage": "align"}, ("projector",)),
    "instruct": ({}, ("projector", "decoder")),
    "lora": ({"adapters": ["mine"]}, ("projector", "adapters")),
    "qlora": ({"adapters": ["mine"]}, ("projector", "adapters")),
    "with the crayon": (
        {"adapters": ["mine"], "parts": ["projector", "adapters", "crayon"]},
        ("projector", "adapters", "crayon"),
    ),
    "adapters alone": ({"adapters": ["mine"], "parts": ["adapters"]}, ("adapters",)),
    "decoder alone": ({"parts": ["decoder"]}, ("decoder",)),
    "the tower too": ({"stage": "align", "parts": ["vision", "projector"]}, PARTS[1::3]),
    "crayon after align": ({"stage": "align", "parts": ["crayon"]}, ("crayon",)),
    "all": (
        {"parts": ["crayon", "projector", "decoder", "adapters", "vision"], "adapters": ["mine"]},
        PARTS,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("patched", [False, True], ids=["collavo", "patched"])
def test_a_stage_moves_its_parts_and_nothing_else(tmp_path: Path, case: str, patched: bool) -> None:
    """Bit for bit, tensor by tensor, with weight decay on: it would move what is not excluded."""
    options, parts = CASES[case]
    model = (
        make_patched(crayon_mode="projection").model if patched else make_collavo(adapters=False)
    )
    if "adapters" in parts:
        with_adapters(model, quantize="decoder" not in parts and case != "lora")
    images = MixedRecords(10) if options.get("stage") == "align" else None
    trainer = make_trainer(model, tmp_path, images, weight_decay=0.1, **options)
    before = snapshot(model)
    trainer.train()
    moved = changed(before, snapshot(model))
    # The features are of a layer before the tower's last norm, which so trains nothing.
    expected = {n for n in before if part_of(n) in parts and "post_layernorm" not in n}
    assert moved == expected and {part_of(name) for name in moved} == set(parts)


def test_a_rate_of_2e_5_moves_16_bit_weights_and_they_can_be_saved(tmp_path: Path) -> None:
    """Projector and dense decoder: float32 beside a tower in bfloat16, under autocast.

    In 16 bits most of these weights would stay as they were.
    """
    model = make_collavo(adapters=False).to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    trainer = make_trainer(model, tmp_path, bf16=True, learning_rate=2e-5, max_steps=1)
    before = snapshot(model)
    trainer.train()
    after = snapshot(model)
    assert {value.dtype for name, value in after.items() if part_of(name) == "vision"} == {
        torch.bfloat16
    }
    matrices = [n for n in after if part_of(n) in ("projector", "decoder") and after[n].ndim == 2]
    matrices = [n for n in matrices if "projector" not in n or trainer.schedule.kind(0) == "image"]
    for name in matrices:
        assert before[name].dtype == after[name].dtype == torch.float32
        if "embed_tokens" not in name:
            assert bool((before[name] != after[name]).float().mean() > 0.9)
            stuck = (before[name].bfloat16() == after[name].bfloat16()).float().mean()
            assert float(stuck) > 0.5
    trainer.save_model()
    loaded = load_pretrained(tmp_path)
    assert str(loaded.config.dtype) == "torch.bfloat16"
    found = loaded.state_dict()
    for name, value in after.items():
        own = part_of(name) == "crayon"
        assert found[name].dtype == (torch.float32 if own else torch.bfloat16)
        assert torch.equal(found[name], value.to(found[name].dtype))
    exact = load_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(exact[name], value.float()) for name, value in after.items())


@pytest.mark.parametrize("patched", [False, True], ids=["collavo", "patched"])
def test_a_trained_tower_leaves_the_folder_its_dtype(tmp_path: Path, patched: bool) -> None:
    """transformers would save the dtype of the first tensor, and all be loaded in float32."""
    model = make_patched().model if patched else make_collavo(adapters=False)
    model.to(torch.bfloat16).config.dtype = "bfloat16"
    trainer = make_trainer(model, tmp_path, MixedRecords(4), parts=["vision"], bf16=True)
    trainer.train()
    trainer.save_model()
    loaded = load_pretrained(tmp_path)
    tower = {p.dtype for n, p in loaded.named_parameters() if part_of(n) != "crayon"}
    assert tower == {torch.bfloat16}
    assert {
        value.dtype
        for name, value in load_file(tmp_path / "model.safetensors").items()
        if part_of(name) == "vision"
    } == {torch.float32}


class Calls(TrainerCallback):
    """Counts the tower's forward passes, and what each step changed."""

    def __init__(self, trainer: CollavoTrainer) -> None:
        self.model: Any = trainer.model
        self.passes, self.steps = 0, [snapshot(self.model)]
        self.per_step: list[int] = []
        self.model.model.vision_tower.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.passes += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.per_step.append(self.passes)
        self.passes = 0
        self.steps.append(snapshot(self.model))


def test_steps_without_images_run_no_vision_tower_and_leave_the_rest_still(tmp_path: Path) -> None:
    """Nor do momentum and weight decay move projector and crayon in them."""
    model = with_adapters(make_collavo(adapters=False))
    parts = ["projector", "adapters", "crayon"]
    trainer = make_trainer(
        model, tmp_path, parts=parts, adapters=["mine"], weight_decay=0.1, num_train_epochs=3
    )
    calls = Calls(trainer)
    trainer.add_callback(calls)
    trainer.train()
    kinds = [trainer.schedule.kind(step) for step in range(9)]
    assert kinds.count("text") == 3 and trainer.state.global_step == 9
    assert kinds.index("image") < len(kinds) - 1 - kinds[::-1].index("text")
    # Ten records: six with images are two steps of two and one micro-batches.
    assert [bool(passes) for passes in calls.per_step] == [kind == "image" for kind in kinds]
    for kind, before, after in zip(kinds, calls.steps, calls.steps[1:], strict=False):
        moved = {part_of(name) for name in changed(before, after)}
        assert moved == ({"adapters"} if kind == "text" else set(parts))


def test_a_smaller_step_is_divided_by_its_own_tokens(tmp_path: Path) -> None:
    """Six samples, four a step, by micro-batches of 4, 2 and 1: as a loop of plain PyTorch.

    The last has two micro-batches for which no sample is left; theirs does not count.
    """
    steps, states = [], []
    for size in (4, 2, 1):
        model = make_collavo(adapters=False)
        trainer = make_trainer(
            model,
            tmp_path,
            MixedRecords(6),
            parts=["projector", "decoder"],
            per_device_train_batch_size=size,
            max_grad_norm=0.0,
            adam_epsilon=1e-2,
            lr_scheduler_type="constant",
        )
        trainer.train()
        steps.append([trainer.schedule.samples(step) for step in range(2)])
        states.append(snapshot(model))
    assert steps[0] == steps[1] == steps[2] and [len(own) for own in steps[0]] == [4, 2]

    model, data = make_collavo(adapters=False).train(), MixedRecords(6)
    trained = [p for n, p in model.named_parameters() if part_of(n) in ("projector", "decoder")]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-2, weight_decay=0.0)
    for own in steps[0]:
        batch = torch.utils.data.default_collate([data[i] for i in own])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
    for state in states:
        for name, value in model.state_dict().items():
            # Two steps of 1e-2, up to the order of float32 sums.
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_the_projector_has_a_rate_of_its_own(tmp_path: Path) -> None:
    model = with_adapters(make_collavo(adapters=False))
    trainer = make_trainer(
        model, tmp_path, adapters=["mine"], learning_rate=None, max_steps=1, weight_decay=None
    )
    groups = trainer.create_optimizer().param_groups
    names = {id(p): part_of(n) for n, p in model.named_parameters()}
    found = {(names[id(p)], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {("adapters", 2e-4, 0.0), ("projector", 2e-5, 0.0)}
    trainer = make_trainer(model, tmp_path, adapters=["mine"], projector_learning_rate=0.0)
    before = snapshot(model)
    trainer.train()
    assert {part_of(name) for name in changed(before, snapshot(model))} == {"adapters"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage": "align"},
            r"train_dataset: 4 of 10 records have no image, the first is mixed.json: \[0\]; they "
            r"train nothing of what is to be trained \(projector\)",
        ),
        ({"parts": ["projector"]}, "4 of 10 records have no image"),
        ({}, "stage 'instruct' trains the decoder; .* its decoder's weights are in 4 bits"),
        ({"adapters": ["none"]}, "trains the adapters; .* has no 'none'"),
        ({"parts": ["adapters"]}, "no adapter was named"),
        ({"parts": ["crayon"]}, "its crayon_mode is 'none'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = with_adapters(make_collavo("none", adapters=False))
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_data_set_has_to_say_which_records_have_images(tmp_path: Path) -> None:
    class Silent(MixedRecords):
        with_image = property(lambda self: None, lambda self, _: None)

    with pytest.raises(ValueError, match="expected a data set that says which records have an"):
        make_trainer(make_collavo(adapters=False), tmp_path, Silent())


def test_data_sets_join_for_one_stage(coco_folder: Path) -> None:
    """Crayon instructions beside conversations: kinds and numbers stay those of the records."""
    coco = coco_folder / "panoptic"
    scenes = CocoPanopticDataset(coco_folder / "images", coco, coco.with_suffix(".json"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk = ConversationDataset([{"conversation": turns, "name": f"talk {i}"} for i in range(2)])
    joined = JoinedDataset([CrayonInstructionDataset(scenes), talk])
    streams = GroupedStreams.open(joined, 2, 0)
    assert streams.schedule.sizes == {"image": 3, "text": 2} and joined.lengths is None
    assert streams.dataset is not None
    names = [streams.dataset.records.file_name(index) for index in range(5)]
    assert names == ["001.png", "002.png", "003.png", "talk 0", "talk 1"]


def test_a_record_that_cannot_be_used_is_replaced_by_one_of_its_kind(tmp_path: Path) -> None:
    """Else a step of one kind would hold another, and a rank wait for the others in the tower."""

    class Broken(MixedRecords):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if index in (8, 9):  # the last of each kind
                raise ValueError("gone")
            return super().__getitem__(index)

    trainer = make_trainer(make_collavo(adapters=False), tmp_path, Broken(10, text_every=3))
    calls = Calls(trainer)
    trainer.add_callback(calls)
    with pytest.warns(UserWarning, match=r"mixed.json: \[[89]\]: gone"):
        trainer.train()
    kinds = [trainer.schedule.kind(step) for step in range(3)]
    assert [bool(passes) for passes in calls.per_step] == [kind == "image" for kind in kinds]
    assert len((tmp_path / "skipped_records.jsonl").read_text().splitlines()) == 2


def test_saved_tensors_are_those_of_the_model(tmp_path: Path) -> None:
    model = with_adapters(make_collavo(adapters=False))
    trainer = make_trainer(model, tmp_path, adapters=["mine"])
    trainer.train()
    trainer.save_model()
    names = load_file(tmp_path / "model.safetensors")
    assert any("lora_B.mine" in name for name in names)
    assert load_pretrained(tmp_path).decoder_settings().adapters == ("mine", "other")


def test_an_adapter_may_have_the_name_of_a_module() -> None:
    """The part of a tensor's name that is the adapter's tells whose it is, not any part."""
    model = make_collavo(adapters=False).add_dual_qlora(("mine", "layers", "0"), rank=2)
    own = {name: list(model.adapter_parameters(name)) for name in ("mine", "layers", "0")}
    assert len({id(p) for ps in own.values() for p in ps}) == sum(map(len, own.values()))
    assert len(own["layers"]) == len(own["0"]) == len(own["mine"])


def test_a_run_that_is_all_warm_up_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one step, 3 % are a step: data that are fewer than the global batch train nothing."""
    for steps, said in ((1, True), (2, False)):
        caplog.clear()
        trainer = make_trainer(
            make_collavo(adapters=False), tmp_path, max_steps=steps, warmup_steps=0.03
        )
        before = snapshot(trainer.model)
        trainer.train()
        assert ("all steps (1) are warm-up" in caplog.text) is said
        assert bool(changed(before, snapshot(trainer.model))) is not said
