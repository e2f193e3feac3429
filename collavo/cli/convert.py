"""``collavo convert``: a folder of the official CoLLaVO or of a LLaVA becomes a CoLLaVO folder.

``--to-official`` and ``--to-llava`` are the ways back. The exit status is 0 if the target was
written and 2 after an error; nothing is in the target then, nor after Ctrl-C (130) and SIGTERM
(143).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collavo.configuration import CRAYON_MODES

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", type=Path,
        help="folder to read, told by its config.json: the official CoLLaVO, or a LLaVA of "
        "transformers or of the original repository, in safetensors or weights-only torch files",
    )  # fmt: skip
    parser.add_argument("target", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--to-official", action="store_true",
        help="the way back: SOURCE is a CoLLaVO folder, TARGET gets the official layout",
    )  # fmt: skip
    parser.add_argument(
        "--to-llava", action="store_true",
        help="SOURCE is a CoLLaVO folder, TARGET gets the format of LLaVA's own repository and its "
        "mm_projector.bin; an untrained crayon is left out",
    )  # fmt: skip
    parser.add_argument(
        "--projector", type=Path, metavar="FILE",
        help="a trained projector, LLaVA's mm_projector.bin, in place of SOURCE's, which may be a "
        "CoLLaVO folder",
    )  # fmt: skip
    parser.add_argument(
        "--vision", metavar="DIR",
        help="the CLIP of a LLaVA of the original repository that does not hold it; with "
        "--to-llava, the folder or hub id that mm_vision_tower is to name",
    )  # fmt: skip
    parser.add_argument(
        "--template",
        help="the chat template's name, for a LLaVA of the original repository (default: "
        "vicuna_v1 with a LLaMA, mistral_instruct with a Mistral)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the written tensors (default: as in the files)"
    )
    parser.add_argument(
        "--quantize", choices=("nf4",),
        help="write the decoder's linear layers in bitsandbytes' 4 bits",
    )  # fmt: skip
    parser.add_argument(
        "--crayon-mode", choices=CRAYON_MODES,
        help="how the crayon joins the decoder (default: the source's own way, attention for a "
        "LLaVA)",
    )  # fmt: skip
    parser.add_argument(
        "--image-token",
        help="the image token's word or id (default: <image>, which a tokenizer without it gets as "
        "its next id)",
    )  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="show no bar")


def run(args: argparse.Namespace) -> int:
    """Convert and print what was done."""
    import torch
    from transformers.utils import logging

    from collavo.conversion import Options, convert_folder

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    options = Options(
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        quantize=args.quantize,
        crayon_mode=args.crayon_mode,
        image_token=args.image_token,
        vision_folder=args.vision,
        projector=args.projector,
        chat_template=args.template,
    )
    done = convert_folder(
        args.source,
        args.target,
        options,
        to_official=args.to_official,
        to_llava=args.to_llava,
        progress=sys.stderr.isatty() and not args.no_progress,
    )
    print(done.summary())
    return 0
