"""``collavo build``: a LLaVA folder from a language model's folder and a CLIP tower's.

The exit status is 0 if the target was written and 2 after an error; nothing is in the target then,
nor after Ctrl-C (130) and SIGTERM (143).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collavo.configuration import CRAYON_MODES, PROJECTOR_TYPES

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--llm", type=Path, required=True, metavar="DIR",
        help="language model with its tokenizer: of LLaMA's shape (gives a CoLLaVO), or another "
        "decoder that carries the crayon, such as Mistral or Qwen2 (gives a LLaVA of transformers)",
    )  # fmt: skip
    parser.add_argument(
        "--vision", type=Path, required=True, metavar="DIR", help="CLIP, or its vision tower alone"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty"
    )
    parser.add_argument(
        "--projector", choices=PROJECTOR_TYPES,
        help="LLaVA-1.5's (default: mlp2x_gelu), or LLaVA-1's single layer",
    )  # fmt: skip
    parser.add_argument(
        "--projector-weights", type=Path, metavar="FILE",
        help="a trained projector, LLaVA's mm_projector.bin (default: a new one is drawn)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=("nf4",),
        help="write the decoder's linear layers in bitsandbytes' 4 bits",
    )  # fmt: skip
    parser.add_argument(
        "--image-mode", default="pad",
        help="how pictures become squares: pad (default, LLaVA-1.5), crop (LLaVA-1) or squash",
    )  # fmt: skip
    parser.add_argument(
        "--template", default="vicuna_v1", help="chat template's name (default: vicuna_v1)"
    )
    parser.add_argument(
        "--crayon-mode", choices=CRAYON_MODES, default="attention",
        help="how the crayon joins the decoder (default: attention)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the written tensors (default: as in the files)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the new projector and crayon (default: 0)"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no bar")


def run(args: argparse.Namespace) -> int:
    """Build and print what was done."""
    import torch
    from transformers.utils import logging

    from collavo.conversion import build_llava

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    done = build_llava(
        args.llm,
        args.vision,
        args.out,
        projector_type=args.projector,
        projector=args.projector_weights,
        quantize=args.quantize,
        image_mode=args.image_mode,
        chat_template=args.template,
        crayon_mode=args.crayon_mode,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        seed=args.seed,
        progress=sys.stderr.isatty() and not args.no_progress,
    )
    print(done.summary())
    return 0
