"""Folders of adapters: which settings are honoured, which are named, and that a load is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels.nn import DualQLoRALinear, load_peft_adapter, save_peft_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WIDTH = 16


def layer(**options: Any) -> DualQLoRALinear:
    torch.manual_seed(0)
    made = DualQLoRALinear(WIDTH, WIDTH, quantized=False, **{"rank": 4, **options})
    for name in made.adapter_names:
        nn.init.normal_(made.adapter(name).b, std=0.3)
    return made


class Net(nn.Module):
    """Two blocks of two layers, under a prefix."""

    def __init__(self, prefix: str = "model.language_model", make: Any = layer) -> None:
        super().__init__()
        blocks = nn.ModuleList(
            nn.ModuleDict({name: make() for name in ("q_proj", "v_proj")}) for _ in range(2)
        )
        inner: nn.Module = nn.ModuleDict({"layers": blocks})
        first, *rest = prefix.split(".")
        for name in reversed(rest):
            inner = nn.ModuleDict({name: inner})
        self.add_module(first, inner)
        self.blocks = [blocks]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[0]:
            x = x + block["v_proj"](torch.tanh(block["q_proj"](x)))  # type: ignore[index]
        return x


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_peft_adapter(Net(), tmp_path, "vl")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is set; adapters with DoRA"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set; .* aLoRA"),
        ({"use_qalora": True}, "use_qalora is set; .* QALoRA"),
        ({"bias": "lora_only"}, "bias: expected 'none', got 'lora_only'"),
        ({"velora_config": {}}, "velora_config is set; .* VeLoRA"),  # PEFT's defaults, switched on
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .* PiSSA"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: .* OLoRA"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: .* CorDA"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: .* LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: .* LoRA-GA"),
        ({"init_lora_weights": "invented"}, "init_lora_weights: expected true, false or one of"),
        ({"peft_type": "LOHA"}, "peft_type: expected 'LORA', got 'LOHA'"),
        ({"peft_type": None}, "peft_type: missing"),
        # A field that nobody knows may mean anything, a zero too.
        ({"invented": True}, "invented is set and is not known here"),
        ({"invented": 0}, "invented is set and is not known here"),
        ({"invented": {"rate": 1}}, "invented is set and is not known here"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, got 'no'"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
        ({"r": "four"}, "r: expected a whole number of at least 1, got 'four'"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: expected a regular expression"),
        # An expression by itself, and none inside of PEFT's.
        ({"rank_pattern": {"(?i)q_proj": 2}}, r"rank_pattern: expected a regular expression"),
        (
            {"layers_to_transform": [0], "layers_pattern": ["(?P<idx>a)"]},
            "layers_pattern: expected a regular expression",
        ),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: expected a whole number"),
        ({"alpha_pattern": [2]}, "alpha_pattern: expected an object"),
        ({"target_modules": 3}, "target_modules: expected a regular expression or a list"),
        ({"target_modules": []}, "target_modules: model.* is not among them"),
        ({"target_modules": ["v_proj"]}, "target_modules: model.*q_proj is not among them"),
        ({"exclude_modules": ["q_proj"]}, "target_modules: model.*q_proj is not among them"),
    ],
)
def test_a_setting_that_is_not_honoured_is_named(
    saved: Path, change: dict[str, Any], message: str
) -> None:
    edit(saved, **change)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{CONFIG}: {message}"):
        load_peft_adapter(model, saved, "vl")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        *({"invented": value} for value in (None, False, [], {}, "")),
        {"qalora_group_size": 7},
        {"loftq_config": {"loftq_bits": 2}},
        {"eva_config": {"rho": 2.0}},
        {"megatron_core": "elsewhere"},
        {"modules_to_save": []},
        *({"init_lora_weights": value} for value in (False, "gaussian", "eva", "orthogonal")),
    ],
)
def test_what_is_off_or_does_not_matter_is_ignored(saved: Path, change: dict[str, Any]) -> None:
    edit(saved, **change)
    model, x = Net(make=lambda: layer(rank=2)), torch.randn(3, WIDTH)
    for module in model.modules():
        if isinstance(module, DualQLoRALinear):  # Net()'s "image" has another rank
            nn.init.zeros_(module.adapter("image").b)
    load_peft_adapter(model, saved, "vl")
    expected = Net()
    for module in expected.modules():
        if isinstance(module, DualQLoRALinear):
            nn.init.zeros_(module.adapter("image").b)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "prefix",
    ["model.language_model", "language_model.model", "model"],
    ids=["now", "4.51", "llava"],
)
def test_the_layouts_of_llava(tmp_path: Path, prefix: str) -> None:
    """transformers before 4.52, and the original repository, call the decoder by other names."""
    save_peft_adapter(Net(prefix), tmp_path, "vl")
    edit(tmp_path, target_modules=["q_proj", "v_proj"])
    model = Net(make=lambda: layer(rank=3))
    filled = load_peft_adapter(model, tmp_path, "vl")
    assert filled == [f"model.language_model.layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    stored = load_file(tmp_path / WEIGHTS)
    first = model.get_submodule(filled[0])
    assert isinstance(first, DualQLoRALinear)
    key = f"base_model.model.{prefix}.layers.0.q_proj.lora_A.weight"
    assert torch.equal(first.adapter("vl").a, stored[key])


def test_a_pattern_that_fits_one_layout_alone_is_refused(tmp_path: Path) -> None:
    """PEFT of today would take the usual alpha, and the one that trained took the pattern's."""
    save_peft_adapter(Net("language_model.model"), tmp_path, "vl")
    edit(
        tmp_path,
        target_modules=["q_proj", "v_proj"],
        alpha_pattern={"^language_model.model.layers.0.q_proj": 2},
    )
    with pytest.raises(
        ValueError, match=r"alpha_pattern: gives 2\.0 for language_model.* and 64\.0"
    ):
        load_peft_adapter(Net(), tmp_path, "vl")


def test_layers_that_are_not_covered_forget_the_old_adapter(tmp_path: Path) -> None:
    source = Net()
    for block in source.blocks[0]:
        del block["v_proj"]  # type: ignore[operator]
    save_peft_adapter(source, tmp_path, "vl")
    model = Net()
    model.blocks[0][1]["v_proj"].merge()  # type: ignore[index, operator, union-attr]
    old = model.blocks[0][0]["v_proj"].adapter("vl").a.clone()  # type: ignore[index]
    image = model.blocks[0][0]["v_proj"].adapter("image").b.clone()  # type: ignore[index]
    load_peft_adapter(model, tmp_path, "vl")
    for block in model.blocks[0]:
        left = block["v_proj"]  # type: ignore[index]
        assert not left.adapter("vl").b.any() and not left.merged
        assert left.scaling["vl"] == 16.0
    kept = model.blocks[0][0]["v_proj"]  # type: ignore[index]
    assert not torch.equal(kept.adapter("vl").a, old)
    assert torch.equal(kept.adapter("image").b, image)


def test_parameters_keep_their_identity_where_the_rank_stays(saved: Path) -> None:
    """An optimizer made before goes on training what the model computes with."""
    model = Net()
    before = {name: parameter for name, parameter in model.named_parameters()}
    load_peft_adapter(model, saved, "vl")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_model_made_in_inference_mode(saved: Path) -> None:
    with torch.inference_mode():
        model = Net()
        for module in model.modules():
            if isinstance(module, DualQLoRALinear):
                nn.init.zeros_(module.adapter("vl").b)
    load_peft_adapter(model, saved, "vl")
    x = torch.randn(2, WIDTH)
    with torch.inference_mode():
        assert torch.equal(model(x), Net()(x))


def test_a_file_that_lacks_a_layer_is_named(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    save_file(
        {key: value for key, value in state.items() if ".1.v_proj" not in key}, saved / WEIGHTS
    )
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: target_modules .* covers .*1\.v_proj"):
        load_peft_adapter(Net(), saved, "vl")


def test_a_pickle_is_not_read(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=rf"{WEIGHTS}: missing.*adapter_model.bin is a pickle"
    ):
        load_peft_adapter(Net(), saved, "vl")


def test_another_default_device_and_dtype(saved: Path) -> None:
    """Code that sets them for its models makes what layers without an entry get, too."""
    source, model = Net(), Net(make=lambda: layer(rank=3))
    for block in source.blocks[0]:
        del block["v_proj"]  # type: ignore[operator]
    save_peft_adapter(source, saved, "vl")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            load_peft_adapter(model, saved, "vl")
            state = model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(value.is_meta for value in state.values())
    left = model.blocks[0][0]["v_proj"].adapter("vl").a  # type: ignore[index]
    assert left.dtype == torch.float32 and left.shape == (4, WIDTH) and bool(left.any())


def test_arguments_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        load_peft_adapter("folder", Net(), "vl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"slot: no layer .* 'text'; there are image, vl"):
        load_peft_adapter(Net(), "folder", "text")
    with pytest.raises(ValueError, match=r"slot: .* the model has no adapters"):
        load_peft_adapter(nn.Linear(2, 2), "folder", "vl")
    with pytest.raises(FileNotFoundError, match=f"nowhere/{CONFIG}: missing"):
        load_peft_adapter(Net(), "nowhere", "vl")


def test_what_llava_trained_beside_the_adapter_is_said_to_be_left(saved: Path) -> None:
    (saved / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"non_lora_trainables\.bin: not read"):
        load_peft_adapter(Net(), saved, "vl")


def test_nothing_is_loaded_onto_meta(saved: Path) -> None:
    with pytest.raises(ValueError, match="meta device, where nothing can be loaded"):
        load_peft_adapter(Net().to("meta"), saved, "vl")


def test_a_save_that_breaks_off_leaves_no_mixture(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights beside old settings would be another adapter, without a word."""
    old = (saved / WEIGHTS).read_bytes(), (saved / CONFIG).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr("collavo_kernels.nn.linear.peft.json.dumps", fail)
        save_peft_adapter(Net(make=lambda: layer(rank=2)), saved, "vl")
    assert old == ((saved / WEIGHTS).read_bytes(), (saved / CONFIG).read_bytes())
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_a_save_is_on_the_disk_before_it_has_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash may leave files without content; and two nodes may have one process id."""
    done: list[str] = []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(a.name), replace(a, b)))
    for _ in range(2):
        save_peft_adapter(Net(), tmp_path, "vl")
    assert done[:2] == done[4:6] == ["sync", "sync"]
    assert len({*done[2:4], *done[6:]}) == 4


def test_names_that_end_alike_keep_ranks_of_their_own(tmp_path: Path) -> None:
    """PEFT's patterns fit every name with that end: ``q`` is also the end of ``block.q``."""
    peft = pytest.importorskip("peft")

    class Nested(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.q, self.norm = make(2, 3.0), nn.LayerNorm(WIDTH)
            self.block = nn.ModuleDict({"q": make(3, 1.0), "norm": nn.ModuleDict({"q": nn.GELU()})})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["q"](torch.tanh(self.q(x)))  # type: ignore[no-any-return]

    def ours(rank: int, alpha: float) -> DualQLoRALinear:
        return layer(rank=rank, alpha=alpha, adapters=("vl",))

    model, x = Nested(ours), torch.randn(3, WIDTH)
    save_peft_adapter(model, tmp_path, "vl")
    plain = Nested(lambda *_: nn.Linear(WIDTH, WIDTH, bias=False))
    for name in ("q", "block.q"):
        plain.get_submodule(name).weight = model.get_submodule(name).weight  # type: ignore[assignment]
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_loads(tmp_path: Path, init: str) -> None:
    """With the first state beside it PEFT saves the difference, which fits the unchanged base."""
    peft = pytest.importorskip("peft")

    def dense() -> Net:
        torch.manual_seed(1)
        return Net(make=lambda: nn.Linear(WIDTH, WIDTH, bias=False))

    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=init
    )
    theirs = peft.get_peft_model(dense(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "first")
    theirs.peft_config["default"].init_lora_weights = init
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    base = iter([module for module in dense().modules() if isinstance(module, nn.Linear)])
    make = lambda: DualQLoRALinear.from_linear(  # noqa: E731
        next(base), rank=2, quantized=False, adapters=("vl",)
    )
    model, x = Net(make=make), torch.randn(3, WIDTH)
    load_peft_adapter(model, tmp_path / "converted", "vl")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "scaling"), [(3, 6 / 3**0.5), (7, 0.7 / 7), (5, 5.0), (1, 0.1)])
def test_a_state_dict_brings_rank_and_scaling(rank: int, scaling: float) -> None:
    first, second, x = layer(), layer(), torch.randn(2, WIDTH)
    assert not any("scaling" in key for key in first.state_dict()), "PEFT's keys alone"
    first.set_adapter("vl", torch.randn(rank, WIDTH), torch.randn(WIDTH, rank), scaling)
    state = first.state_dict()
    assert state["lora_scaling.vl"].dtype == torch.float64
    second.load_state_dict(state)
    assert torch.equal(first(x), second(x))
    size = second.adapter_size("vl")
    assert size[0] == rank and abs(size[1] / rank - scaling) <= 1e-15 * scaling
    del state["lora_scaling.vl"]
    if rank != 4:  # a rank alone does not say what the branch is scaled by
        with pytest.raises(RuntimeError, match=r"lora_A\.vl\.weight"):
            layer().load_state_dict(state)
    with pytest.raises(RuntimeError, match="expected one number, got float32 "):
        layer().load_state_dict(state | {"lora_scaling.vl": torch.ones(2)})


def test_slots_of_image_tokens_stay_out_of_peft(saved: Path) -> None:
    """PEFT's adapters act on all tokens, so either way the results would be others."""
    model = Net()
    for module in model.modules():
        if isinstance(module, DualQLoRALinear):
            module.image_adapters = ("image",)
    for act in (load_peft_adapter, save_peft_adapter):
        with pytest.raises(ValueError, match="slot: 'image' acts on image tokens alone"):
            act(model, saved, "image")


def test_wrappers_are_not_part_of_a_name(saved: Path) -> None:
    model = Net()
    model.blocks[0][0]["q_proj"] = torch.compile(model.blocks[0][0]["q_proj"])  # type: ignore[index, assignment]
    assert "model.language_model.layers.0.q_proj._orig_mod" in dict(model.named_modules())
    assert len(load_peft_adapter(model, saved, "vl")) == 4
    state, config = load_file(saved / WEIGHTS), (saved / CONFIG).read_text()
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        save_peft_adapter(wrapped, saved, "vl")  # type: ignore[arg-type]
        assert load_file(saved / WEIGHTS).keys() == state.keys()
        assert (saved / CONFIG).read_text() == config
