"""``collavo chat``: answer questions about an image with its panoptic map."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collavo.cli import expect_text
from collavo.panoptic.coco import find_panoptic_map
from collavo.panoptic.images import read_image

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", type=Path, required=True, help="model folder with its processor")
    parser.add_argument("--image", type=Path, help="the image (none: talk without one)")
    parser.add_argument("--panoptic", type=Path, help="its panoptic PNG")
    parser.add_argument("--annotations", type=Path, help="COCO panoptic JSON that lists the PNG")
    parser.add_argument("--question", help="one question (none: ask in the terminal)")
    parser.add_argument(
        "--object-text",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="name the image's objects in the prompt (default: as the processor says)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the dense weights")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Answer one question, or every line from the terminal until it is empty."""
    chat = _Chat(args)
    for question in _questions(args.question):
        chat.ask(question)
    return 0


def _questions(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input: expected text in {error.encoding}, got the byte "
                f"0x{error.object[error.start]:02x}; PYTHONIOENCODING names another encoding"
            ) from None
        if not line:
            return
        yield expect_text("standard input", line)


class _Chat:
    """A conversation about at most one image; every turn sees the turns before it."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
        if args.question is not None:
            expect_text("--question", args.question)
        if (args.panoptic is None) != (args.annotations is None):
            missing = "--annotations" if args.annotations is None else "--panoptic"
            raise ValueError(f"{missing}: --panoptic and --annotations go together")
        if args.panoptic is not None and args.image is None:
            raise ValueError("--image: expected the image that --panoptic belongs to")
        # Files are read before the model: a wrong path shows at once.
        self.image = None if args.image is None else read_image(args.image)
        self.panoptic = None
        if self.image is not None and args.panoptic is not None:
            self.panoptic = find_panoptic_map(args.panoptic, args.annotations, image=args.image)
        self.options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        self.object_text = args.object_text
        self.model, self.processor = _load(args.model, args.dtype, args.device)
        self.turns: list[dict[str, Any]] = []

    def ask(self, question: str) -> str:
        """Print the answer while it is made, and return it."""
        from transformers import TextStreamer

        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if self.image is not None and not self.turns:
            content.insert(0, {"type": "image"})
        self.turns.append({"role": "user", "content": content})
        images = {} if self.image is None else {"images": [self.image], "panoptic": [self.panoptic]}
        inputs = self.processor(
            text=[self.processor.prompt(self.turns)],
            object_text=self.object_text,
            return_tensors="pt",
            **images,
        ).to(self.model.device)
        tokenizer = self.processor.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {**self.options, **self.processor.stopping()}
        tokens = self.model.generate(**inputs, **options, streamer=streamer)
        answer: str = self.processor.answer(tokens[0, inputs["input_ids"].shape[1] :])
        self.turns.append({"role": "assistant", "content": answer})
        return answer


def _load(folder: Path, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load the model, every tensor of it, and its processor."""
    import torch

    from collavo.loading import load_folder

    model, processor = load_folder(folder, dtype=dtype)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    moved: Any = model
    return moved.to(place), processor
