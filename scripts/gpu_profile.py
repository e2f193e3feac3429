#!/usr/bin/env python3
"""Makes each call whose speed is claimed once, for a profiler to watch.

ncu --set basic scripts/gpu_profile.py
scripts/gpu_profile.py --dry-run        # on a stand-in for a GPU: lists the launches
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run the calls; a backend that declines one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in")
    dry = parser.parse_args().dry_run
    import torch

    from collavo_kernels.testing.gpu_stand_in import gpu_stand_in
    from collavo_kernels.testing.headline import attend, look_up, multiply

    device = "cpu" if dry else "cuda"

    def run(name: str, call: Callable[..., None], *given: object, **options: object) -> None:
        try:
            call(*given, **options, device=device)
            print(f"{name} {given}: called", flush=True)
        except ValueError as reason:
            print(f"{name} {given}: {reason}")

    with gpu_stand_in() if dry else nullcontext() as gpu:
        for backend in ("triton",) if dry else ("triton", "library"):
            run(f"crayon_attention:{backend}", attend, 1325, 8, backend=backend)
        for backend in ("triton",) if dry else ("triton", "cuda"):
            for tokens in (1, 16, 128, 2048):
                options = {"backend": backend, "backward": tokens == 2048}
                run(f"qlora_linear:{backend}", multiply, tokens, **options)
        run("panoptic_lookup:triton", look_up, 64)
        if not dry:
            torch.cuda.synchronize()
    for launch in gpu.launches if gpu else ():
        print(f"{launch.kernel}{launch.grid}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
