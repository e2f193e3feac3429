"""``collavo train``: crayon prompt tuning or instruction tuning of a model folder.

Beside the options of this file, every option of ``transformers.TrainingArguments`` is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import collavo._requirements  # noqa: F401  (before what it checks)

from torch.utils.data import Dataset
from transformers import HfArgumentParser, set_seed

from collavo.panoptic.coco import CocoPanopticDataset
from collavo.panoptic.coco_index import Skipped
from collavo.prepared.read import PreparedDataset
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.schedule import STEP_KINDS

Samples: TypeAlias = CocoPanopticDataset | PreparedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``collavo train`` that are not transformers'."""
    parser.usage = (
        "collavo train --model DIR --stage {cpt,cit} --coco-images DIR (--panoptic DIR "
        "--annotations JSON | --prepared DIR) [--vl-data JSON ...] "
        "[option of transformers.TrainingArguments ...]"
    )
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", required=True, help="model folder: weights and processor")
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
        help="folder among --vl-images whose pictures have COCO's maps, such as coco/train2017 "
        "(default: wherever one picture alone ends in a name that COCO lists)",
    )
    group.add_argument("--max-length", type=int, help="longest sequence, in tokens")
    group.add_argument("--lora-rank", type=int, default=64, help="rank of new adapters (cit)")
    group.add_argument("--lora-alpha", type=float, default=64.0, help="alpha of new adapters (cit)")
    group.add_argument(
        "--no-quantize", action="store_true", help="keep the decoder's weights dense (cit)"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output_dir"
    )


def parents() -> list[argparse.ArgumentParser]:
    """Return the parser of transformers' training arguments, whose options are this command's."""
    return [HfArgumentParser(cast(Any, CollavoTrainingArguments), add_help=False)]


def run(args: argparse.Namespace) -> int:
    """Train, with transformers' progress bars, and save the model in ``--output_dir``."""
    from collavo.loading import expect_model_folder, load_folder
    from collavo.train.collator import CrayonCollator
    from collavo.train.trainer import CollavoTrainer

    training = training_arguments(args)
    _check_workers(args, training)
    expect_model_folder(args.model)  # before files that take minutes
    samples = coco_samples(args)
    loaded, processor = load_folder(args.model)
    model: Any = loaded
    if isinstance(samples, PreparedDataset):
        samples.check_crayon(
            grid=processor.grid, max_number=processor.max_number, reduce=processor.reduce
        )
    skipped = list(samples.skipped) if isinstance(samples, CocoPanopticDataset) else []
    image_data, vl_data = datasets(args, training, samples, processor.max_number, skipped.append)
    missing = [name for name in STEP_KINDS if name not in model.decoder_settings().adapters]
    if training.stage == "cit" and missing:
        set_seed(training.seed)  # new adapters are drawn before the trainer sets it
        model.add_dual_qlora(
            missing, rank=args.lora_rank, alpha=args.lora_alpha, quantize=not args.no_quantize
        )
    trainer = CollavoTrainer(
        model,
        training,
        image_data,
        vl_data,
        data_collator=CrayonCollator(processor, max_length=args.max_length),
        processing_class=processor,
    )
    resume = args.resume or training.resume_from_checkpoint
    if trainer.is_world_process_zero():
        if not resume:
            trainer.unusable.begin()  # train() would forget what is added now
        for one in skipped:
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
    return CollavoTrainingArguments(**values)


def coco_samples(args: argparse.Namespace) -> Samples | None:
    """Open the COCO panoptic folder or what was prepared of it, or return None if none was named.

    Raises:
        ValueError: if only some of its parts were named.
    """
    parts = {
        "--coco-images": args.coco_images,
        "--panoptic": args.panoptic,
        "--annotations": args.annotations,
    }
    if args.prepared is not None:
        if args.panoptic is not None or args.annotations is not None:
            raise ValueError("--prepared: expected without --panoptic and --annotations, got both")
        parts = {"--coco-images": args.coco_images, "--prepared": args.prepared}
    if all(path is None for path in parts.values()):
        return None
    missing = [name for name, path in parts.items() if path is None]
    if missing:
        raise ValueError(f"{missing[0]}: expected with {', '.join(parts)}, got none")
    if args.prepared is not None:
        return PreparedDataset(args.prepared, args.coco_images)
    return CocoPanopticDataset(args.coco_images, args.panoptic, args.annotations, skip_faults=True)


def datasets(
    args: argparse.Namespace,
    training: CollavoTrainingArguments,
    samples: Samples | None,
    max_number: int,
    on_skip: Callable[[Skipped], None] | None = None,
) -> tuple[Dataset[Any] | None, Dataset[Any] | None]:
    """Build the two data sets; images of the VL data have the maps that COCO has for them.

    Malformed records of the VL data are left out and handed to ``on_skip``.

    Raises:
        ValueError: if the stage needs a data set that was not named, or it is not clear which of
            the VL data's images a map is for.
    """
    from collavo.train.dataset import ConversationDataset, CrayonInstructionDataset
    from collavo.train.picture_maps import PictureMaps
    from collavo.train.sampler import JoinedDataset

    if samples is None and (training.stage == "cpt" or training.vl_probability < 1.0):
        raise ValueError(
            f"--coco-images: stage {training.stage} trains on crayon instructions; name "
            "--coco-images and either --panoptic and --annotations or --prepared"
        )
    if training.stage == "cit" and training.vl_probability > 0.0 and not args.vl_data:
        raise ValueError(
            "--vl-data: stage cit draws visual instructions; name a JSON file, or set "
            "--vl_probability 0"
        )
    image_data = None
    if samples is not None:
        image_data = CrayonInstructionDataset(
            samples, seed=training.stream_seed, max_number=max_number
        )
    if training.stage == "cpt" or not args.vl_data:
        return image_data, None

    parts = [
        ConversationDataset.from_llava_json(path, images=args.vl_images, on_skip=on_skip)
        for path in args.vl_data
    ]
    if samples is not None:
        folder = args.vl_coco_images
        if folder is not None and args.vl_images is not None:
            folder = args.vl_images / folder
        pictures = [path for part in parts for path in part.pictures()]
        first = training.process_index == 0
        maps = PictureMaps(samples, pictures, folder=folder, sizes=first)
        for part in parts:
            part.panoptic = maps
        if first:
            print(maps.summary())
    elif args.vl_coco_images is not None:
        raise ValueError("--vl-coco-images: expected with --coco-images, whose maps it is about")
    return image_data, JoinedDataset(parts)
