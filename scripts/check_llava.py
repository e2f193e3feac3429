"""Runs the crayon in LLaVA's own code, on a tiny random model, against the crayon's dense form.

The dense form adds ``c[row]`` to the input of every q, k and v projection by hooks. Prints a line
per check with the largest difference; ``check_llava.sh`` makes the environment.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from collavo_kernels.nn import (
    CrayonPrompt,
    DualQLoRALinear,
    ImagePositions,
    crayon_context,
    find_image_positions,
    swap_linears,
)

SIDE, PATCHES, HIDDEN = 8, 4, 64
# Of float32 logits, losses and gradients of order one: another order of sums.
TOLERANCE = 5e-6
IDS = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6, 7, 9], [1, 2, 4, IMAGE_TOKEN_INDEX, 8, 0]])
MASK = (IDS != 0).long()
LABELS = IDS.masked_fill(IDS <= 0, IGNORE_INDEX)
ROWS = torch.tensor([[0, 1, 1, -1], [2, 2, 3, 0]], dtype=torch.int32)
CLASSES, NUMBERS = torch.tensor([[0, 18, 3, 5], [0, 1, 1, 2]])


def tiny_llava(folder: str) -> LlavaLlamaForCausalLM:
    """Return a LLaVA of two layers with random weights, its vision tower loaded from a folder."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=SIDE // 2,
    )
    CLIPVisionModel(vision).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}).save_pretrained(folder)
    config = LlavaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        mm_vision_tower=folder,
        mm_hidden_size=32,
        mm_vision_select_layer=-2,
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat",
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@contextmanager
def dense_form(model: Any, table: Tensor, rows: Tensor, mask: Tensor) -> Iterator[None]:
    """Add the crayon per token to the input of q, k and v; decode steps are shorter."""
    index = torch.full(mask.shape, -1)
    index[mask] = rows.flatten().long()
    crayon = torch.where((index >= 0)[..., None], table[index.clamp_min(0)], 0.0)

    def add(module: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if args[0].shape[1] != crayon.shape[1]:
            return None
        return (args[0] + crayon.repeat_interleave(args[0].shape[0] // crayon.shape[0], 0),)

    hooks = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_pre_hook(add)
        for layer in model.model.layers
        for name in "qkv"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: Any, prompt: CrayonPrompt) -> dict[str, Tensor]:
    """Return all gradients by name, and let them go."""
    named = [*model.named_parameters(), *prompt.named_parameters(prefix="prompt")]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    model.zero_grad()
    prompt.zero_grad()
    return found


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors with the same names."""
    if set(found) != set(expected):
        raise AssertionError(f"other tensors: {sorted(set(found) ^ set(expected))}")
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def report(what: str, difference: float, limit: float = TOLERANCE) -> None:
    """Print a check, and raise if it failed."""
    print(f"  {what:<58} {difference:.1e}")
    if not difference <= limit:
        raise AssertionError(f"{what}: {difference} is more than {limit}")


class Case:
    """A tiny LLaVA, a batch for it, and the crayon's loss and gradients in the dense form."""

    def __init__(self, folder: str) -> None:
        self.model = tiny_llava(folder)
        self.prompt = CrayonPrompt(embed_dim=8, hidden_size=HIDDEN, zero_init=False)
        for parameter in self.prompt.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        self.images = torch.randn(2, 3, SIDE, SIDE)
        self.where = find_image_positions(self.model, IDS, self.images, attention_mask=MASK)
        self.batch = {"input_ids": IDS, "attention_mask": MASK, "images": self.images}
        with self.dense():
            expected = self.model(**self.batch, labels=LABELS)
        expected.loss.backward()
        self.logits = expected.logits.detach()
        self.loss = expected.loss.detach()
        self.gradients = gradients(self.model, self.prompt)

    def table(self) -> Tensor:
        """Return the crayon table ``[T, HIDDEN]``, a new graph each time."""
        return self.prompt.project(CLASSES, NUMBERS)

    def dense(self) -> Any:
        """Return a context in which the model has the crayon's dense form."""
        return dense_form(self.model, self.table(), ROWS, self.where.mask)

    def crayon(self) -> Any:
        """Return a context in which the model has the crayon."""
        return crayon_context(self.model, (self.table(), ROWS), self.where)

    def check_training(self, what: str) -> None:
        """Compare loss, logits and gradients with the dense form's."""
        with self.crayon():
            found = self.model(**self.batch, labels=LABELS)
        found.loss.backward()
        report(f"{what}: loss", float((found.loss - self.loss).abs()))
        report(f"{what}: logits", float((found.logits - self.logits).abs().max()))
        own = gradients(self.model, self.prompt)
        same = {name: value for name, value in own.items() if ".lora_" not in name}
        report(f"{what}: {len(same)} gradients", largest(same, self.gradients))


def check_training(case: Case) -> None:
    """Loss and gradients, plain and with both kinds of checkpointing."""
    with torch.no_grad():
        plain = case.model(**case.batch).logits
    if not float((plain - case.logits).abs().max()) > 0.1:
        raise AssertionError("the crayon changes no logit: nothing would be compared")
    case.check_training("crayon")
    case.model.train()
    for reentrant in (False, True):
        case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        case.check_training(f"checkpointing, use_reentrant={reentrant}")
    case.model.gradient_checkpointing_disable()
    case.model.eval()


def check_generation(case: Case) -> None:
    """Tokens: greedy, again in the same context, beams, and without a crayon afterwards."""
    inputs = {"inputs": IDS, "images": case.images, "attention_mask": MASK, "max_new_tokens": 6}
    ways: tuple[dict[str, Any], ...] = (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
    )
    for options in ways:
        plain = case.model.generate(**inputs, **options)
        with case.dense():
            expected = case.model.generate(**inputs, **options)
        with case.crayon():
            found = [case.model.generate(**inputs, **options) for _ in range(2)]
        if torch.equal(plain, expected):
            raise AssertionError("the crayon changes no token: nothing would be compared")
        for tokens in found:
            if not torch.equal(tokens, expected):
                raise AssertionError(f"{options}: {tokens.tolist()} is not {expected.tolist()}")
        if not torch.equal(case.model.generate(**inputs, **options), plain):
            raise AssertionError("a crayon was left behind")
        print(f"  generate, {options}: {expected.numel()} tokens equal, twice")


def check_threads(case: Case) -> None:
    """Two threads with crayons of their own give what each gives alone."""
    tables = [case.table().detach() * factor for factor in (1.0, -2.0)]

    @torch.no_grad()
    def run(table: Tensor) -> Tensor:
        with crayon_context(case.model, (table, ROWS), case.where):
            return case.model(**case.batch).logits

    alone = [run(table) for table in tables]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, tables * 20))
    for i, logits in enumerate(together):
        if not torch.equal(logits, alone[i % 2]):
            raise AssertionError("two threads give other logits")
    print("  two threads, 40 forward passes: equal to the bit")


def check_positions(case: Case) -> None:
    """Compare positions with the embeddings: padding, two images, a cut, crops with newlines."""
    model: Any = case.model
    config = model.config

    def matches(
        found: ImagePositions,
        ids: Tensor,
        images: Any,
        expected_newlines: int = 0,
        **options: Any,
    ) -> None:
        # What changes with the pixels is an image token.
        parts = [
            model.prepare_inputs_labels_for_multimodal(
                ids, None, torch.ones_like(ids) * (ids != 0), None, None, x, **options
            )[4]
            for x in (images, [-3 * each for each in images])
        ]
        changed = (parts[0] != parts[1]).any(2)
        # A newline is the same in every picture.
        newlines = int(found.mask.sum()) - int(changed.sum())
        if bool((changed & ~found.mask).any()) or newlines != expected_newlines:
            raise AssertionError(f"{found.mask.int()} is not {changed.int()}")

    for side in ("left", "right"):
        config.tokenizer_padding_side = side
        found = find_image_positions(model, IDS, case.images, attention_mask=MASK)
        matches(found, IDS, list(case.images))
    several = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX, 6]])
    found = find_image_positions(model, several, case.images)
    matches(found, several, list(case.images))
    config.tokenizer_model_max_length = 9
    cut = find_image_positions(model, several, case.images)
    if cut.mask.sum() != 2 + PATCHES - 1 + 2 or cut.whole.tolist() != [1]:
        raise AssertionError(f"cut at 9 tokens: {cut}")
    with torch.no_grad(), crayon_context(model, (case.table(), ROWS), cut):
        model(several, images=case.images)
    config.tokenizer_model_max_length = None
    config.mm_patch_merge_type, config.image_aspect_ratio = "spatial_unpad", "anyres"
    model.model.image_newline = torch.nn.Parameter(torch.randn(HIDDEN))
    config.image_grid_pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    crops = [torch.randn(3, 3, SIDE, SIDE)] * 2
    sizes = [(SIDE, 2 * SIDE), (2 * SIDE, SIDE)]
    found = find_image_positions(model, IDS, crops, attention_mask=MASK, image_sizes=sizes)
    # A newline ends each row of patches: two rows in one picture, four in the other.
    matches(found, IDS, crops, 6, image_sizes=sizes)
    counts = found.mask.sum(1).tolist()
    rows = [torch.arange(count, dtype=torch.int32) % 4 for count in counts]
    with torch.no_grad(), crayon_context(model, (case.table(), rows), found):
        model(IDS, attention_mask=MASK, images=crops, image_sizes=sizes)
    config.mm_patch_merge_type = "flat"
    print(f"  positions: padding, two images, a cut, crops with newlines ({counts} tokens)")


def check_linears(case: Case) -> None:
    """DualQLoRALinear in every linear place of the decoder; dense, then in 4 bits."""
    case.model.requires_grad_(True)
    old = swap_linears(case.model, quantized=False, rank=4)
    if len(old) != 14 or swap_linears(case.model):
        raise AssertionError(f"{len(old)} linear layers were swapped")
    case.check_training("DualQLoRALinear, dense")
    for name, layer in old.items():
        parent, _, attribute = name.rpartition(".")
        setattr(case.model.get_submodule(parent), attribute, layer)
    swap_linears(case.model, rank=4)
    layers = [m for m in case.model.modules() if isinstance(m, DualQLoRALinear)]
    with case.dense(), torch.no_grad():
        expected = case.model(**case.batch).logits
    with case.crayon():
        found = case.model(**case.batch, labels=LABELS)
    found.loss.backward()
    report("DualQLoRALinear, NF4: logits", float((found.logits - expected).abs().max()))
    if not all(bool(layer.adapter("vl").b.grad.any()) for layer in layers):
        raise AssertionError("an adapter got no gradient")


def check_refusals(case: Case) -> None:
    """Refuse a crayon of another grid, and a forward pass of other sequences."""
    wrong = ROWS.repeat(1, 2)
    try:
        with crayon_context(case.model, (case.table(), wrong), case.where):
            pass
    except ValueError as error:
        print(f"  refused: {error}")
    else:
        raise AssertionError("a crayon of another grid was taken")
    try:
        with case.crayon():
            case.model(IDS[:, :-1], attention_mask=MASK[:, :-1], images=case.images)
    except ValueError as error:
        print(f"  refused: {error}")
    else:
        raise AssertionError("a forward pass of other sequences was taken")


def main() -> int:
    """Run the checks; returns the exit status."""
    names = ("llava-torch", "transformers", "torch")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    checks = (
        check_training,
        check_generation,
        check_threads,
        check_positions,
        check_refusals,
        check_linears,
    )
    with tempfile.TemporaryDirectory() as folder:
        case = Case(folder)
        for check in checks:
            check(case)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
