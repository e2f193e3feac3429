"""Random adapter folders: equal to what PEFT computes with them, or refused by name.

``python -m tests.fuzz.fuzz_adapters --seconds 120 --seed 0`` runs until the time is over or a case
fails, and prints the case. A case is a folder that PEFT saved with random settings, or such a
folder damaged in one place.
"""

from __future__ import annotations

import copy
import json
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collavo_kernels.nn import DualQLoRALinear, load_peft_adapter, save_peft_adapter
from tests.fuzz.command_line import seconds_and_seed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = ("q_proj", "v_proj", "o_proj")
PREFIX = "model.language_model."
LAYOUTS = (PREFIX, PREFIX, PREFIX, "language_model.model.", "model.")
HARMLESS_INIT = (True, True, True, False, "gaussian", "orthogonal", "mica", "eva")
OTHER_INIT = ("pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga", "invented")
# What a field may be set to, and the word that a refusal has to hold.
FEATURES: tuple[tuple[str, Any], ...] = (
    ("use_dora", True),
    ("lora_bias", True),
    ("fan_in_fan_out", True),
    ("bias", "lora_only"),
    ("modules_to_save", ["norm"]),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("velora_config", {}),
    ("kasa_config", {}),
    ("monteclora_config", {"num_samples": 2}),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {}),
    ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", [1]),
    ("target_parameters", ["weight"]),
    ("megatron_config", {"a": 1}),
    ("ensure_weight_tying", True),
    ("invented_number", 0),
    ("invented_flag", True),
    ("invented_config", {"a": None}),
    ("peft_type", "LOHA"),
)
IDLE: tuple[tuple[str, Any], ...] = (
    ("invented_flag", False),
    ("invented_config", {}),
    ("invented_list", []),
    ("invented_text", ""),
    ("invented_nothing", None),
    ("qalora_group_size", 7),
    ("megatron_core", "elsewhere"),
    ("eva_config", {"rho": 1.5}),
    ("corda_config", {"corda_method": "kpm"}),
    ("loftq_config", {"loftq_bits": 2}),
    ("modules_to_save", None),
    ("use_dora", False),
)
JUNK: tuple[Any, ...] = (None, "four", -1, 0, 2.5, True, [], {}, [1], {"a": 1}, "(", 10**400)


class Block(nn.Module):
    """A residual block with three linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width + 8, bias=False),
                "v_proj": nn.Linear(width + 8, width),
                "o_proj": nn.Linear(width, width, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three in turn."""
        out = F.gelu(self.self_attn["q_proj"](x))
        out = self.self_attn["o_proj"](F.gelu(self.self_attn["v_proj"](out)))
        return x + out


class Net(nn.Module):
    """Three blocks under the names of a LLaVA model's decoder."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = nn.ModuleDict({"layers": nn.ModuleList(Block(width) for _ in range(3))})
        self.model = nn.ModuleDict({"language_model": inner})
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks."""
        for block in self.model["language_model"]["layers"]:  # type: ignore[index]
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


@dataclass
class AdapterCase:
    """A folder that PEFT saves, and what is changed in it afterwards.

    Attributes:
        seed: Of the weights.
        options: PEFT's settings.
        edits: Fields set in ``adapter_config.json``.
        layout: How names begin in the file.
        dtype: Of the file.
        slot_rank: Of the slot that is filled, which holds an adapter before.
        damage: A way to break the folder, or "".
    """

    seed: int
    options: dict[str, Any]
    edits: dict[str, Any] = field(default_factory=dict)
    layout: str = PREFIX
    dtype: str = "float32"
    slot_rank: int = 4
    damage: str = ""


def draw(rng: random.Random) -> AdapterCase:
    """Draw a case: mostly settings that are honoured, sometimes one that is not."""
    layout = rng.choice(LAYOUTS)
    # Mostly names that fit a layer in both layouts: the others have to be refused.
    start = PREFIX if layout == PREFIX or rng.random() < 0.2 else ""
    full = [f"{start}layers.{i}.self_attn.{name}" for i in range(3) for name in NAMES]
    picked = rng.sample(NAMES, rng.randint(1, 3))
    options: dict[str, Any] = {
        "r": rng.randint(1, 8),
        "lora_alpha": rng.choice((1, 3, 6, 16, 0.7)),
        "use_rslora": rng.random() < 0.4,
        "init_lora_weights": rng.choice(HARMLESS_INIT if rng.random() < 0.85 else OTHER_INIT),
        "target_modules": rng.choice(
            (picked, rng.sample(full, rng.randint(1, 5)), rf".*\.({'|'.join(picked)})")
        ),
        "lora_dropout": rng.choice((0.0, 0.1)),
    }
    for name, values in (("rank_pattern", range(1, 9)), ("alpha_pattern", (2, 5, 7.5))):
        if rng.random() < 0.5:
            keys = rng.sample(
                (*picked, *full, f"{'^' * bool(start)}{full[0]}", r"layers\.[01]\..*"), 2
            )
            options[name] = {key: rng.choice(list(values)) for key in keys}
    if rng.random() < 0.2:
        options["exclude_modules"] = rng.choice(([full[0]], rf".*\.1\..*({NAMES[0]}|{NAMES[1]})"))
    if isinstance(options["target_modules"], list) and rng.random() < 0.3:
        options["layers_to_transform"] = rng.choice((0, [0, 2], [1]))
        options["layers_pattern"] = rng.choice((None, "layers", ["layers"]))
    case = AdapterCase(rng.randint(0, 999), options, slot_rank=rng.randint(1, 8))
    case.layout, case.dtype = layout, rng.choice(("float32", "bfloat16", "float64"))
    chance = rng.random()
    if chance < 0.25:
        case.edits = dict([rng.choice(FEATURES)])
    elif chance < 0.5:
        case.edits = dict(rng.sample(IDLE, 2))
    elif chance < 0.8:
        case.damage = rng.choice(list(DAMAGES))
    return case


def save_by_peft(case: AdapterCase, folder: Path) -> None:
    """Let PEFT make and save the adapter; then bring in the case's edits."""
    import peft

    options = dict(case.options)
    init = options["init_lora_weights"]
    if init in ("corda", "lora_ga", "invented", "mica", "loftq", "eva"):
        options["init_lora_weights"] = True  # it asks for data, or for other packages, to begin
    model = peft.get_peft_model(Net(), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(case.seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    dtype = getattr(torch, case.dtype)
    start = f"base_model.model.{PREFIX}"
    renamed = {
        f"base_model.model.{case.layout}{k.removeprefix(start)}": v for k, v in state.items()
    }
    save_file({key: value.to(dtype) for key, value in renamed.items()}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"init_lora_weights": init} | case.edits
    (folder / CONFIG).write_text(json.dumps(config))


def by_peft(folder: Path, layout: str, x: Tensor) -> Tensor:
    """Return what PEFT computes with a folder; it knows the present layout alone."""
    import peft

    with tempfile.TemporaryDirectory() as name:
        copied = Path(name)
        (copied / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        start, present = f"base_model.model.{layout}", f"base_model.model.{PREFIX}"
        state = load_file(folder / WEIGHTS)
        renamed = {present + k.removeprefix(start): v for k, v in state.items()}
        save_file(renamed, copied / WEIGHTS)
        model = peft.PeftModel.from_pretrained(Net(), copied).eval()
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def slots(rank: int, *, trained: bool = True) -> Net:
    """Return the same model of our layers, an adapter of another training in its slot."""
    model = Net()
    for block in model.model["language_model"]["layers"]:  # type: ignore[index]
        for name in NAMES:
            linear = DualQLoRALinear.from_linear(
                block.self_attn[name], rank=rank, adapters=("vl",), quantized=False
            )
            if trained:
                nn.init.normal_(linear.adapter("vl").b, std=0.2)
            block.self_attn[name] = linear
    return model.eval()


def compare(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raise unless two results agree up to float32's rounding in other orders of summation."""
    torch.testing.assert_close(
        ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a load may change."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DualQLoRALinear)}
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "scaling": {name: dict(layer.scaling) for name, layer in layers.items()},
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tell whether two snapshots are equal to the bit."""
    states = first["state"], second["state"]
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        and first["identity"] == second["identity"]
        and first["scaling"] == second["scaling"]
    )


def run(case: AdapterCase, folder: Path) -> str:
    """Run one case; return how it ended.

    Raises:
        AssertionError: if it ended wrongly.
    """
    try:
        save_by_peft(case, folder)
    except (ValueError, TypeError) as error:
        return f"PEFT does not make it: {type(error).__name__}"
    rng = random.Random(case.seed)
    touched = DAMAGES[case.damage](folder, rng) if case.damage else ""
    model, x = slots(case.slot_rank), torch.randn(4, 16)
    before = snapshot(model)
    try:
        load_peft_adapter(model, folder, "vl")
    except (ValueError, OSError) as error:
        assert same(before, snapshot(model)), "a load that failed changed the model"
        check_message(str(error))
        if not named(case, str(error), touched):
            # PEFT sorts patterns when it saves them, and then cannot load what it saved.
            assert not peft_loads(case, folder, x), f"refused without a reason: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"a bare {type(error).__name__}: {error}") from error
    with torch.no_grad():
        ours = model(x)
    try:
        theirs = by_peft(folder, case.layout, x)
    except Exception as error:
        # What PEFT stumbles over and does not act on (a bad value in an idle field).
        assert case.damage or case.edits or case.layout != PREFIX, f"PEFT fails: {error!r}"
        return "loaded, PEFT fails"
    compare(ours, theirs, "after loading")
    check_saves(model, ours, x, folder)
    return "loaded"


def check_message(message: str) -> None:
    """Raise unless a refusal is one line that names the file."""
    assert "\n" not in message and len(message) < 900, message
    assert CONFIG in message or WEIGHTS in message, message


def named(case: AdapterCase, message: str, touched: str) -> bool:
    """Tell whether a refusal names what was set or damaged."""
    init = case.options["init_lora_weights"]
    reasons = [touched] if touched else []
    reasons += [name for name, value in case.edits.items() if (name, value) in FEATURES]
    reasons += ["init_lora_weights"] if init in OTHER_INIT else []
    if case.layout != PREFIX:  # a pattern that fits a name of one layout alone
        reasons += ["rank_pattern", "alpha_pattern", "target_modules"]
    return any(word in message for word in reasons)


def peft_loads(case: AdapterCase, folder: Path, x: Tensor) -> bool:
    """Tell whether PEFT takes a folder."""
    try:
        by_peft(folder, case.layout, x)
    except Exception:
        return False
    return True


def check_saves(model: Net, expected: Tensor, x: Tensor, folder: Path) -> None:
    """Raise unless what is saved gives the same results: to PEFT, to us, and as a state dict."""
    save_peft_adapter(model, folder / "again", "vl")
    compare(by_peft(folder / "again", PREFIX, x), expected, "PEFT, from our folder")
    other, third = slots(3), slots(5)
    load_peft_adapter(other, folder / "again", "vl")
    third.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        for name, reloaded in (("our folder", other), ("state dict", third)):
            torch.testing.assert_close(
                reloaded(x), expected, rtol=0, atol=0, equal_nan=True, msg=f"{name}: other results"
            )


def _cut(name: str) -> Any:
    def act(folder: Path, rng: random.Random) -> str:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: rng.randrange(len(data))])
        return name

    return act


def _remove(name: str) -> Any:
    def act(folder: Path, rng: random.Random) -> str:
        (folder / name).unlink()
        return name

    return act


def _flip(name: str) -> Any:
    def act(folder: Path, rng: random.Random) -> str:
        data = bytearray((folder / name).read_bytes())
        data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        return "a"  # any message about one of the files

    return act


def _spoil_field(folder: Path, rng: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    name = rng.choice(sorted(config))
    value = rng.choice(JUNK)
    (folder / CONFIG).write_text(json.dumps(config | {name: value}))
    # A rank that is a rank, and not the file's, is a disagreement of two files.
    return "expected rank" if name == "r" and value is True else name.split("_pattern")[0]


def _drop_field(folder: Path, rng: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    name = rng.choice(sorted(config))
    del config[name]
    (folder / CONFIG).write_text(json.dumps(config))
    return CONFIG


def _replace_config(folder: Path, rng: random.Random) -> str:
    text = rng.choice(("[]", "null", "3", '"text"', "{}", "", "[" * 5000, "\ufeff{}", "\x00"))
    (folder / CONFIG).write_text(text)
    return CONFIG


def _change_entry(folder: Path, rng: random.Random) -> str:
    state = load_file(folder / WEIGHTS)
    key = rng.choice(sorted(state))
    value = state.pop(key)
    changed: dict[str, dict[str, Tensor]] = {
        "missing": {},
        "renamed": {key.replace("proj", "projection"): value},
        "with a name": {key.replace(".weight", ".default.weight"): value},
        "bytes": {key: value.to(torch.uint8)},
        "flat": {key: value.flatten()},
        "empty": {key: value[:0]},
        "wider": {key: torch.cat([value, value], 1)},
        "longer": {key: torch.cat([value, value], 0)},
        "surplus": {key: value, re.sub(r"lora_[AB]\.weight", "lora_C.weight", key): value.clone()},
    }
    save_file(state | rng.choice(list(changed.values())), folder / WEIGHTS)
    return "self_attn"


def _drop_layer(folder: Path, rng: random.Random) -> str:
    state = load_file(folder / WEIGHTS)
    layer = rng.choice(sorted(state)).rsplit(".", 2)[0]
    kept = {key: value for key, value in state.items() if not key.startswith(f"{layer}.")}
    save_file(kept, folder / WEIGHTS)
    return WEIGHTS


DAMAGES = {
    "cut config": _cut(CONFIG),
    "cut weights": _cut(WEIGHTS),
    "no config": _remove(CONFIG),
    "no weights": _remove(WEIGHTS),
    "flip config": _flip(CONFIG),
    "flip weights": _flip(WEIGHTS),
    "spoil a field": _spoil_field,
    "drop a field": _drop_field,
    "other config": _replace_config,
    "change an entry": _change_entry,
    "drop a layer": _drop_layer,
}


def run_cases(seed: int, *, cases: int = 0, seconds: float = 0.0) -> Counter[str]:
    """Run a number of cases, or as many as fit into a time; return how they ended.

    Raises:
        AssertionError: with the case in its message.
    """
    rng, ends, start = random.Random(seed), Counter[str](), time.monotonic()
    while sum(ends.values()) < cases or time.monotonic() - start < seconds:
        case = draw(rng)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ends[run(case, Path(folder))] += 1
            except Exception as error:
                number = sum(ends.values())
                raise AssertionError(f"seed {seed}, case {number}, {case}: {error}") from error
    return ends


def main() -> None:
    """Run from the command line."""
    seconds, seed = seconds_and_seed(__doc__)
    torch.set_num_threads(1)  # the cases are tiny
    for end, count in run_cases(seed, seconds=seconds).most_common():
        print(f"{count:6d} {end}")


if __name__ == "__main__":
    main()
