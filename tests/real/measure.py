"""Numbers of a real decoder: ``python -m tests.real.measure PART OUTPUT.json``.

Parts are float32, bfloat16, llava, cpt and tune; ``README.md`` beside has what one run of each
gave.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import smollm2
import tune
import variants

from collavo import CollavoProcessor, CollavoTrainer, CollavoTrainingArguments, apply_to_llava
from collavo.demo.scenes import make_scene
from collavo.demo.storage import Scenes, write_scenes
from collavo.processing import make_image_processor
from collavo.train import CrayonCollator, CrayonInstructionDataset
from collavo_kernels import __version__

Row = dict[str, Any]


def text_rows(
    model: Any, tokenizer: Any, dtype: torch.dtype, *, questions: int = 3, length: int = 16
) -> Iterator[Row]:
    """Yield the parts of the package in the decoder beside what is stock, text alone."""
    ids = smollm2.passage(tokenizer)
    exact = smollm2.logits(smollm2.in_dtype(model, torch.float64), ids)

    def row(name: str, model: Any, base: Row | None) -> Row:
        values = smollm2.logits(model, ids)
        asked = smollm2.QUESTIONS[:questions]
        answers = [smollm2.answer(model, tokenizer, text, length) for text in asked]
        return {
            "what": name,
            "dtype": str(dtype).removeprefix("torch."),
            "perplexity": smollm2.perplexity(values, ids),
            "error against float64": float((values.double() - exact).abs().max()),
            "answers as stock": None
            if base is None
            else sum(a == b for a, b in zip(answers, base["answers"], strict=True)),
            "answers": answers,
        }

    stock = smollm2.in_dtype(model, dtype)
    base = row("stock (sdpa)", stock, None)
    yield base
    yield row("attn_implementation='crayon'", variants.with_registered_attention(stock), base)
    yield row("CrayonAttention", variants.with_crayon_attention(stock), base)
    yield row("DualQLoRALinear, dense", variants.with_linears(stock, False), base)
    theirs = variants.with_bitsandbytes(stock)
    ours = variants.from_bitsandbytes(theirs)
    same = variants.same_bytes(ours, theirs)
    same &= variants.same_bytes(variants.with_linears(stock, True), theirs)
    base = row("bitsandbytes NF4", theirs, None)
    yield base
    yield row("DualQLoRALinear, NF4", ours, base) | {"bytes of bitsandbytes": same}


def llava_rows(decoder: Any, tokenizer: Any) -> Iterator[Row]:
    """Yield a LLaVA around the decoder, stock and with a fresh crayon: logits and an answer."""
    token = tokenizer.convert_tokens_to_ids("<image>")
    llava = smollm2.make_llava(decoder, token)
    ids = smollm2.passage(tokenizer)[:, :64]
    rows = decoder.config.vocab_size
    difference = smollm2.logits(llava, ids)[:, :rows] - smollm2.logits(decoder, ids)
    yield {"what": "text: LLaVA - decoder, largest logit", "value": float(difference.abs().max())}
    inputs = image_inputs(tokenizer, token)
    with torch.no_grad():
        stock = llava(**inputs).logits
        expected = llava.generate(**inputs, max_new_tokens=12, do_sample=False)
        handle = apply_to_llava(llava)
        inputs |= crayon_inputs()
        fresh = llava(**inputs).logits
        found = llava.generate(**inputs, max_new_tokens=12, do_sample=False)
    gap = float((fresh - stock).abs().max())
    yield {"what": "image: fresh crayon - stock, largest logit", "value": gap}
    yield {"what": "image: greedy answer as stock", "value": torch.equal(found, expected)}
    prompt: Any = llava.model.crayon_prompt
    torch.nn.init.normal_(prompt.mlp[-1].weight, std=0.1)
    with torch.no_grad():
        drawn = float((llava(**inputs).logits - stock).abs().max())
    yield {"what": "image: drawn crayon - stock, largest logit", "value": drawn}
    handle.undo()


def image_inputs(tokenizer: Any, token: int) -> dict[str, Tensor]:
    """Return a question about a drawn picture."""
    asked = smollm2.prompt(tokenizer, "What is in the picture?")
    places = torch.full((1, smollm2.GRID**2), token)
    ids = torch.cat([asked["input_ids"][:, :1], places, asked["input_ids"][:, 1:]], dim=1)
    size = smollm2.IMAGE_SIZE
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def crayon_inputs() -> dict[str, Tensor]:
    """Return three segments over the picture's cells."""
    cells = torch.arange(smollm2.GRID**2, dtype=torch.int32)[None] % 4 - 1
    rows = torch.tensor([[0, 17, 62]], dtype=torch.int32)
    return {"crayon_index": cells, "crayon_class": rows, "crayon_number": rows.clamp(max=1)}


def cpt_rows(decoder: Any, tokenizer: Any, *, steps: int = 16, scenes: int = 64) -> Iterator[Row]:
    """Yield the loss of object lists of held-out scenes before and after crayon prompt tuning."""
    model = smollm2.make_llava(decoder, tokenizer.convert_tokens_to_ids("<image>"))
    apply_to_llava(model)
    processor = CollavoProcessor(
        make_image_processor(smollm2.IMAGE_SIZE, mode="squash"),
        tokenizer,
        grid=(smollm2.GRID, smollm2.GRID),
        object_text=False,
    )
    collate = CrayonCollator(processor)
    with tempfile.TemporaryDirectory() as folder:
        rng, parts = np.random.default_rng(0), []
        for name, count in (("train", scenes), ("test", 4)):
            write_scenes(Path(folder) / name, (make_scene(rng) for _ in range(count)))
            samples = Scenes(Path(folder) / name)
            parts.append(CrayonInstructionDataset(samples, templates=("names",)))
        batch = collate([parts[1][i] for i in range(4)])
        yield {"what": "held-out loss before", "value": held_out(model, batch)}
        start = time.perf_counter()
        args = CollavoTrainingArguments(
            output_dir=str(Path(folder) / "run"),
            stage="cpt",
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="no",
            logging_steps=4,
            use_cpu=True,
            report_to="none",
            seed=0,
        )
        trainer = CollavoTrainer(model, args, parts[0], data_collator=collate)
        trainer.train()
        seconds = round(time.perf_counter() - start)
        yield {"what": "held-out loss after", "value": held_out(model, batch)}
        logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        yield {"what": "training loss, means of four steps", "value": logged, "seconds": seconds}


@torch.no_grad()
def held_out(model: Any, batch: dict[str, Tensor]) -> float:
    """Return the loss of a batch; with a fresh crayon it is that without any."""
    return float(model.eval()(**batch).loss)


def main() -> None:
    """Measure one part and add its rows to a file."""
    parts: dict[str, Callable[[Any, Any], Iterator[Row]]] = {
        "float32": partial(text_rows, dtype=torch.float32),
        "bfloat16": partial(text_rows, dtype=torch.bfloat16),
        "llava": llava_rows,
        "cpt": cpt_rows,
        "tune": tune.stage_rows,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*parts])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    if (reason := smollm2.missing()) is not None:
        parser.error(reason)
    versions = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "collavo_kernels": __version__,
    }
    found: dict[str, Any] = {"versions": versions, args.part: []}
    for row in parts[args.part](*smollm2.load()):
        print(row, flush=True)
        found[args.part].append(row)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
