"""An export is read by this package, by PEFT around stock LLaVA, and as LLaVA's projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_collavo import CollavoRecords, make_collavo
from transformers import LlavaConfig, LlavaForConditionalGeneration

from collavo import load_pretrained
from collavo.configuration import CollavoConfig
from collavo.model.llava import CollavoForConditionalGeneration
from collavo.model.projector import PROJECTOR_FILE
from collavo.train import CollavoTrainer, CollavoTrainingArguments, exports
from collavo.train.exports import ADAPTERS, export, projector_tensors
from collavo.train.saving import SaveError


def llava(kind: str = "mlp2x_gelu") -> CollavoForConditionalGeneration:
    """A model without crayon, with one adapter and a dense decoder."""
    config = make_collavo("none", adapters=False).config.to_dict()
    torch.manual_seed(0)
    model = CollavoForConditionalGeneration(
        CollavoConfig.from_dict({**config, "projector_type": kind})
    )
    model.add_dual_qlora(("instruct",), rank=4, alpha=6.0, quantize=False)
    for parameter in model.adapter_parameters("instruct"):
        parameter.data.normal_(0.0, 0.3)
    return model.eval()


def test_stock_llava_computes_the_same_with_the_parts(tmp_path: Path) -> None:
    """The base, PEFT's adapter and the projector's file are all that it takes, and all needed."""
    model = llava()
    export(model, None, tmp_path / "out")
    projector = torch.load(tmp_path / "out" / PROJECTOR_FILE, weights_only=True)
    names = {f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert projector.keys() == names
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=model.config.vision_config.to_dict(),
            text_config=model.config.text_config.to_dict() | {"model_type": "llama"},
            image_token_index=model.config.image_token_id,
            vision_feature_layer=-1,
        )
    ).eval()
    base = {n: v for n, v in model.state_dict().items() if "lora_" not in n}
    lacking = stock.load_state_dict(
        {n: v for n, v in base.items() if "projector" not in n}, strict=False
    )
    assert all("projector" in name for name in lacking.missing_keys)
    one, two = (
        stock.model.multi_modal_projector.linear_1,
        stock.model.multi_modal_projector.linear_2,
    )
    for layer, index in ((one, 0), (two, 2)):
        layer.weight.data = projector[f"model.mm_projector.{index}.weight"]
        layer.bias.data = projector[f"model.mm_projector.{index}.bias"]
    adapted = PeftModel.from_pretrained(stock, str(tmp_path / "out" / ADAPTERS / "instruct"))
    inputs = {k: v[None] for k, v in CollavoRecords("image")[0].items() if "crayon" not in k}
    with torch.no_grad():
        wanted, found = model(**inputs).logits, adapted(**inputs).logits
        plain = adapted.get_base_model()
        with adapted.disable_adapter():
            without = plain(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (without - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_the_whole_folder_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    """In 4 bits too: the projector is never among what is quantised."""
    model = llava(kind)
    model.add_dual_qlora((), quantize=True)
    export(model, None, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    one, two = model.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    projector = torch.load(tmp_path / "out" / PROJECTOR_FILE, weights_only=True)
    own = [p for n, p in model.named_parameters() if "multi_modal_projector" in n]
    assert all(any(torch.equal(value, p) for p in own) for value in projector.values())
    assert len(projector) == len(own) == {"linear": 2, "mlp2x_gelu": 4}[kind]


def trainer(tmp_path: Path, **changes: Any) -> CollavoTrainer:
    options: dict[str, Any] = {
        "stage": "cit", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True,
        "vl_probability": 0.0, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    args = CollavoTrainingArguments(output_dir=str(tmp_path / "run"), **{**options, **changes})
    return CollavoTrainer(make_collavo(), args, CollavoRecords("image"))


def test_a_run_exports_at_its_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, export=str(tmp_path / "out"))
    run.train()
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    own = {"adapter_config.json", "adapter_model.safetensors"}
    adapters = {f"{ADAPTERS}/{name}/{file}" for name in ("image", "vl") for file in own}
    assert adapters | {PROJECTOR_FILE, "config.json", "model.safetensors"} <= files
    moved = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(v, moved[n]) for n, v in run.model.state_dict().items())  # type: ignore[union-attr]


def test_the_last_checkpoint_and_the_run_hold_the_parts(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_trained_only=True, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model()
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2"):
        assert (folder / ADAPTERS / "vl/adapter_config.json").is_file()
        assert (
            torch.load(folder / PROJECTOR_FILE, weights_only=True).keys()
            == projector_tensors(
                run.model  # type: ignore[arg-type]
            ).keys()
        )
        load_pretrained(folder)
    assert not (tmp_path / "run/checkpoint-1" / PROJECTOR_FILE).exists()


def test_a_place_that_takes_no_export_is_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    run = trainer(tmp_path, export=str(tmp_path / "out"))
    with pytest.raises(SaveError, match=r"does not begin: .*out"):
        run.train()
    assert run.state.global_step == 0


def test_an_export_that_fails_at_the_end_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run, which nobody wants to repeat for a disk that is full elsewhere."""
    run = trainer(tmp_path, export=str(tmp_path / "out"))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(exports, "save_peft_adapter", fail)
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert not (tmp_path / "out").exists()
    load_pretrained(tmp_path / "run")


def test_adapters_of_image_tokens_alone_stay_in_the_whole_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT would apply them to all tokens."""
    model = make_collavo("none", adapters=False)
    model.add_dual_qlora(("image", "vl"), rank=2, quantize=False)
    for module in model.modules():
        if hasattr(module, "image_adapters"):
            module.image_adapters = ("vl",)
    exports.write_parts(model, tmp_path)
    assert {path.name for path in (tmp_path / ADAPTERS).iterdir()} == {"image"}
    assert "'vl' acts on image tokens alone" in caplog.text


def test_parts_of_an_earlier_model_do_not_stay_beside_another(tmp_path: Path) -> None:
    """A projector or an adapter of another model would be taken for this one's."""
    export(llava(), None, tmp_path / "out")
    other = make_collavo("none", adapters=False).add_dual_qlora(("other",), rank=2, quantize=False)
    other.model.multi_modal_projector.extra = torch.nn.Linear(2, 2)  # LLaVA has no file for such
    (tmp_path / "out/adapters/mine.txt").write_text("a note")
    export(other, None, tmp_path / "out")
    found = {p.parent.name for p in (tmp_path / "out").rglob("adapter_model.safetensors")}
    assert found == {"other"} and not (tmp_path / "out" / PROJECTOR_FILE).exists()
    assert (tmp_path / "out/adapters/mine.txt").is_file()
    (tmp_path / "run").mkdir()
    torch.save({}, tmp_path / "run" / PROJECTOR_FILE)
    trainer(tmp_path).save_model()
    assert not (tmp_path / "run" / PROJECTOR_FILE).exists()
