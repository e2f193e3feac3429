"""A whole model: prefill, decoding and a training step, beside stock LLaVA with PEFT.

The peer is transformers' LLaVA with bitsandbytes' 4-bit layers, two PEFT adapters and the crayon as
one would add it without this package: a vector per image *token*, from two embeddings and an MLP,
added in front of every layer's q, k and v projections. Both have the same weights, and adapters in
float32, which both make unless told otherwise. ``prefill`` is the prompt without gradients,
``decode`` the next token from the cache that a prefill has left, ``train`` forward, backward and
AdamW's step. The work counted is that of the decoder's frozen linear layers, twice in training:
their weights have no gradient.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Measure
from benchmarks.end_to_end_models import Case, Models
from collavo_kernels.testing import relative_error

SMALL = Case(hidden=256, layers=2, grid=8, text=32, batch=2, rank=16)
# Two layers of LLaMA-7B, an image of CLIP's at 336 pixels and a short question.
LLAMA = Case(4096, 2, 24, 40, 1, 64, head_dim=128, intermediate=11008)
FULL = (Case(1024, 4, 24, 64, 2, 64), Case(2048, 4, 35, 64, 2, 64))
DTYPES = (torch.float32, torch.bfloat16)
PROVIDERS = ("ours", "transformers+peft+bitsandbytes")
MODES = ("train", "prefill", "decode")
LOGITS: dict[tuple[Case, torch.dtype], Tensor] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put together what shares a pair of models; nobody trains a 7B in float32 here."""
    parameters = []
    for case, dtype in itertools.product((SMALL, LLAMA, *FULL), DTYPES):
        if case == LLAMA and dtype == torch.float32:
            continue
        for mode, provider in itertools.product(MODES, PROVIDERS):
            marks = (pytest.mark.full,) if case in FULL else ()
            name = f"{case}-{str(dtype).removeprefix('torch.')}-{mode}-{provider}"
            parameters.append(pytest.param(case, dtype, mode, provider, marks=marks, id=name))
    metafunc.parametrize(("case", "dtype", "mode", "provider"), parameters)


@functools.lru_cache(maxsize=1)
def models(case: Case, dtype: torch.dtype, device: torch.device, training: bool) -> Models:
    """Return the pair of models; the former one is let go."""
    return Models(case, dtype, device)


def exact(pair: Models) -> Tensor:
    """Return a case's float64 logits, worked out from the first of its pairs before that runs."""
    key = (pair.case, pair.dtype)
    if key not in LOGITS:
        LOGITS.clear()
        LOGITS[key] = pair.exact()
    return LOGITS[key]


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return the prompt's forward."""
    model.eval()

    def forward() -> Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=True).logits

    return forward


def decode(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return one step, always the same: the last token of the batch after all before it."""
    model.eval()
    tokens = inputs["input_ids"]
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        cache = model(**{**prompt, "input_ids": tokens[:, :-1]}, use_cache=True).past_key_values

    def step() -> Tensor:
        # A layer of the cache makes new tensors, so that a copy of it leaves the old ones alone.
        past = copy.copy(cache)
        past.layers = [copy.copy(layer) for layer in cache.layers]
        with torch.no_grad():
            output = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        return output.logits

    return step


def train(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a training step; its rate is zero, so that every step is the same."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> Tensor:
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output.logits.detach()

    return step


WORK = {"train": train, "prefill": prefill, "decode": decode}


def bench_model(
    measure: Measure,
    device: torch.device,
    case: Case,
    dtype: torch.dtype,
    mode: str,
    provider: str,
) -> None:
    training = mode == "train"
    pair = models(case, dtype, device, training)
    expected = exact(pair)
    fn = WORK[mode](pair.ours if provider == "ours" else pair.peer, pair.inputs)
    passes = 2 if training else 1
    tokens = case.batch if mode == "decode" else pair.inputs["input_ids"].numel()
    measure(
        fn,
        op="end_to_end",
        provider=provider,
        case=str(case),
        mode=mode,
        dtype=dtype,
        bytes=int(passes * pair.weights * (0.5 + 1 / 64)),
        flops=passes * 2 * pair.weights * tokens,
        error=lambda: relative_error(fn(), expected[:, -1:] if mode == "decode" else expected),
        capture=False,
        config=vars(case),
    )
