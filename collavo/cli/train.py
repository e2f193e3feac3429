"""``collavo train``: one stage of training of a model folder.

Beside the options of this file, every option of ``transformers.TrainingArguments`` is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import HfArgumentParser

from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.stages import stage_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``collavo train`` that are not transformers'."""
    parser.usage = (
        "collavo train --model DIR --stage {cpt,cit} --coco-images DIR (--panoptic DIR "
        "--annotations JSON | --prepared DIR) [--vl-data JSON ...] "
        "[option of transformers.TrainingArguments ...]\n"
        "       collavo train --model DIR --stage {align,instruct} --data JSON[:WEIGHT] ... "
        "--images DIR [--preset NAME] [--adapters NAME ...] [option ...]"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="model folder: weights and processor")
    group.add_argument("--max-length", type=int, help="longest sequence, in tokens")
    group.add_argument("--lora-rank", type=int, help="rank of new adapters (64; instruct: 128)")
    group.add_argument("--lora-alpha", type=float, help="alpha of new adapters (64; instruct: 256)")
    group.add_argument("--lora-dropout", type=float, help="dropout of new adapters (0; 0.05)")
    group.add_argument(
        "--quantize", choices=["nf4"], help="bring the decoder to 4 bits (align, instruct)"
    )
    group.add_argument(
        "--no-quantize", action="store_true", help="keep the decoder's weights dense (cit)"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output_dir"
    )
    _add_crayon(parser.add_argument_group("crayon instructions (cpt, cit) and panoptic maps"))
    _add_conversations(parser.add_argument_group("conversations (align, instruct)"))


def _add_crayon(group: Any) -> None:
    group.add_argument("--coco-images", type=Path, help="folder of the images")
    group.add_argument("--panoptic", type=Path, help="folder of the panoptic PNGs")
    group.add_argument("--annotations", type=Path, help="COCO panoptic JSON")
    group.add_argument(
        "--prepared", type=Path, help="what collavo prepare made of the last two, in their place"
    )
    group.add_argument(
        "--vl-data", type=Path, nargs="*", default=[], help="JSON files in LLaVA's format (cit)"
    )
    group.add_argument("--vl-images", type=Path, help="folder that their image paths start from")
    group.add_argument(
        "--vl-coco-images",
        type=Path,
        help="folder among --vl-images (--images) whose pictures have COCO's maps, such as "
        "coco/train2017 (default: wherever one picture alone ends in a name that COCO lists)",
    )


def _add_conversations(group: Any) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        help="JSON, JSON lines or LLaVA-NeXT's YAML, each with :WEIGHT behind it or not",
    )
    group.add_argument("--eval-data", nargs="+", help="held-out records, for a loss meanwhile")
    group.add_argument("--images", type=Path, help="folder that their image paths start from")
    group.add_argument("--template", help="chat template, saved with the model (default: stage's)")
    group.add_argument(
        "--image-order", default="first", help="where images stand: first, random or keep"
    )
    group.add_argument("--on-fault", default="skip", help="faulty records: skip or raise")
    group.add_argument("--overlong", default="cut", help="longer records: cut, skip or raise")
    group.add_argument(
        "--segmenter", type=Path, help="folder of a CachedSegmenter's maps, for images without one"
    )


def parents() -> list[argparse.ArgumentParser]:
    """Return the parser of transformers' training arguments, whose options are this command's."""
    return [HfArgumentParser(cast(Any, CollavoTrainingArguments), add_help=False)]


def run(args: argparse.Namespace) -> int:
    """Train, with transformers' progress bars, and save the model in ``--output_dir``."""
    from collavo.cli.train_crayon import open_crayon
    from collavo.cli.train_llava import open_llava
    from collavo.loading import expect_model_folder
    from collavo.train.trainer import CollavoTrainer

    training = training_arguments(args)
    _check_workers(args, training)
    expect_model_folder(args.model)  # before files that take minutes
    drawn = stage_of(training.stage).drawn
    opened = (open_crayon if drawn else open_llava)(args, training)
    trainer = CollavoTrainer(
        opened.model, training, processing_class=opened.processor, **opened.data
    )
    resume = args.resume or training.resume_from_checkpoint
    if trainer.is_world_process_zero():
        if not resume:
            trainer.unusable.begin()  # train() would forget what is added now
        for one in opened.skipped:
            trainer.unusable(one)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model saved in {training.output_dir}")
        if trainer.unusable.summary():
            print(trainer.unusable.summary())
    trainer.save_state()
    return 0


def _check_workers(args: argparse.Namespace, training: CollavoTrainingArguments) -> None:
    """Raise if there will be workers that do not know of ``--max-pixels``: only a fork does."""
    context = getattr(training, "dataloader_multiprocessing_context", None)
    kind = context or multiprocessing.get_start_method()
    if args.max_pixels is not None and training.dataloader_num_workers and kind != "fork":
        raise ValueError(
            "--max-pixels: expected with --dataloader_num_workers 0, or with "
            f"--dataloader_multiprocessing_context fork, got {training.dataloader_num_workers} "
            f"workers of kind {kind!r}, which start with Pillow's own limit"
        )


def training_arguments(args: argparse.Namespace) -> CollavoTrainingArguments:
    """Return the training arguments among the parsed ones; the output folder has a default."""
    names = [field.name for field in dataclasses.fields(CollavoTrainingArguments) if field.init]
    values = {name: getattr(args, name) for name in names}
    if values["output_dir"] is None:
        values["output_dir"] = f"collavo-{args.stage}"
    if args.eval_data and values["eval_strategy"] == "no":
        values["eval_strategy"] = "epoch"
    return CollavoTrainingArguments(**values)
