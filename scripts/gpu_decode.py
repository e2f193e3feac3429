#!/usr/bin/env python3
"""Time per token of a few layers of a 7B model that decodes, and what it launches.

  scripts/gpu_decode.py [--layers N] [--tokens N] [--dry-run]

Three ways: as transformers decodes by default, with a static cache, and that as a CUDA graph; where
one does not go, the line says why. --dry-run takes one layer to a stand-in for a GPU and measures
nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def main() -> int:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--tokens", type=int, default=30, help="tokens to time")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in, without timing")
    given = parser.parse_args()
    layers = 1 if given.dry_run else given.layers
    if given.dry_run:
        os.environ["COLLAVO_BACKEND"] = "triton"
    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in

    with gpu_stand_in() if given.dry_run else nullcontext() as gpu:
        model, inputs = prepared(layers, dry=given.dry_run)
        ways = [("eager", dynamic), ("static cache", static), ("graph", graph)]
        for name, make in ways[:2] if given.dry_run else ways:
            try:
                step = make(model, inputs)
                report(f"{name}, {layers} of 32 layers", step, given.tokens, gpu)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                print(f"{name}: does not go: {type(error).__name__}: {str(error).splitlines()[0]}")
    return 0


def prepared(layers: int, *, dry: bool) -> tuple[Any, dict[str, Any]]:
    """Return the model, in bfloat16 over 4-bit weights, and a prompt with an image."""
    import torch

    from benchmarks.ops.end_to_end_cases import Case, batch
    from benchmarks.ops.end_to_end_providers import ours, stock_model

    torch.manual_seed(0)
    case = Case(4096, layers, 24, 32, batch=1, rank=64, head_dim=128)
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.bfloat16
    with torch.device(device):
        stock = stock_model(case)
    model = ours(stock.to(device, dtype), case).to(device).eval()
    if dry:
        # Weights in shared memory stay in the order that the GPU's kernels read.
        model.share_memory()
    inputs = batch(case, device, dtype)
    del inputs["labels"]
    return model, inputs


def dynamic(model: Any, inputs: dict[str, Any]) -> Callable[[], object]:
    """Return a step that appends a token to a cache that grows."""
    from transformers import DynamicCache

    return after_prefill(model, inputs, DynamicCache(config=model.config.text_config))


def static(model: Any, inputs: dict[str, Any]) -> Callable[[], object]:
    """Return a step on a cache of fixed size."""
    from transformers import StaticCache

    length = inputs["input_ids"].shape[1] + 256
    cache = StaticCache(config=model.config.text_config, max_cache_len=length)
    return after_prefill(model, inputs, cache)


def graph(model: Any, inputs: dict[str, Any]) -> Callable[[], object]:
    """Return the replay of one step on a static cache; it writes one place of the cache again."""
    import torch

    step = static(model, inputs)
    for _ in range(3):
        step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def after_prefill(model: Any, inputs: dict[str, Any], cache: Any) -> Callable[[], object]:
    """Run the prompt; return a call that decodes a token after it."""
    import torch

    token = inputs["input_ids"].new_full((1, 1), 5)

    def run(**given: Any) -> object:
        with torch.no_grad():
            return model(**given, past_key_values=cache, use_cache=True).logits

    run(**inputs)
    return lambda: run(input_ids=token)


def report(name: str, step: Callable[[], object], tokens: int, gpu: Any) -> None:
    """Print milliseconds per token by the host's clock, and launches per token."""
    import torch

    if gpu is not None:
        before = len(gpu.launches)
        step()
        print(f"{name}: dry run: {len(gpu.launches) - before} launches of Triton kernels per token")
        return
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        step()
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / tokens
    with torch.profiler.profile() as profiler:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiler.key_averages() if event.key in LAUNCHES)
    print(f"{name}: {1e3 * each:.3f} ms per token, {launches} launches per token", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
