"""What LLaVA's data are measured on: a conversation of four questions, and a photograph's size."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.registry import Row

OP = "llava_data"
TEXT, IMAGE = "4turns/i576", "640x427/336"
NAMES = {
    ("text", TEXT): ("ours", "ours-batch", "transformers"),
    ("image", IMAGE): ("ours", "transformers"),
}
QUESTIONS = {
    "Describe the image in detail.": "A small lantern hangs over the bank of a quiet river.",
    "Is it raining?": "No, the sky is clear and the ground is dry.",
    "What colour is the boat?": "The boat is blue, with a white stripe along its side.",
    "How many people are there?": "There are 3 people: two on the bank and one in the boat.",
}


def rows(kind: str) -> Iterator[Row]:
    """Yield the rows, the same on any device: all of it is the CPU's work."""
    for (mode, case), providers in NAMES.items():
        for provider in providers:
            yield Row(OP, mode, case, provider)
