"""What ``collavo train`` trains in CoLLaVO's own stages: crayon instructions and VL data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import collavo._requirements  # noqa: F401  (before what it checks)

from torch.utils.data import Dataset
from transformers import set_seed

from collavo.panoptic.coco import CocoPanopticDataset
from collavo.panoptic.coco_index import Skipped
from collavo.prepared.read import PreparedDataset
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.schedule import STEP_KINDS
from collavo.train.stages import stage_of

Samples: TypeAlias = CocoPanopticDataset | PreparedDataset


class Opened(NamedTuple):
    """A model and what it is trained on.

    Attributes:
        model: With the adapters that are trained.
        processor: Its processor.
        data: Data sets and collator, by the trainer's names.
        skipped: Records that were left out.
    """

    model: Any
    processor: Any
    data: dict[str, Any]
    skipped: list[Skipped]


def open_crayon(args: argparse.Namespace, training: CollavoTrainingArguments) -> Opened:
    """Open the data of a drawn stage, and the model with its adapters.

    Args:
        args: Of the command line.
        training: Made of them.

    Raises:
        ValueError: naming the option, file or record that does not fit.
    """
    from collavo.loading import load_folder
    from collavo.train.collator import CrayonCollator

    for name in ("data", "eval_data", "images", "template", "segmenter"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected with --stage align or instruct, got {args.stage}")
    samples = coco_samples(args)
    model, processor = load_folder(args.model)
    if isinstance(samples, PreparedDataset):
        samples.check_processor(processor)
    skipped = list(samples.skipped) if isinstance(samples, CocoPanopticDataset) else []
    image_data, vl_data = datasets(args, training, samples, processor.max_number, skipped.append)
    if stage_of(training.stage).alternating:
        add_adapters(model, STEP_KINDS, args, training, quantize=not args.no_quantize)
    data = {
        "train_dataset": image_data,
        "vl_dataset": vl_data,
        "data_collator": CrayonCollator(processor, max_length=args.max_length),
    }
    return Opened(model, processor, data, skipped)


def add_adapters(
    model: Any,
    names: tuple[str, ...] | list[str],
    args: argparse.Namespace,
    training: CollavoTrainingArguments,
    *,
    quantize: bool,
) -> None:
    """Give a model the adapters of these names that it lacks.

    Args:
        model: Changed in place.
        names: Of adapters.
        args: Of the command line: rank, alpha and dropout.
        training: Gives what the command line does not, and the seed.
        quantize: Whether a decoder that gets adapters is brought to 4 bits; with ``--quantize``
            any is.

    Raises:
        ValueError: naming the option of a size that an adapter, which is there, does not have.
    """
    settings = model.decoder_settings()
    missing = [name for name in names if name not in settings.adapters]
    given = {name: getattr(args, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    for name in names:
        if name not in missing:
            rank, alpha = settings.adapter_size(name)
            own = {"rank": rank, "alpha": alpha, "dropout": settings.lora_dropout}
            _expect_own(name, given, own if not missing else {"rank": rank, "alpha": alpha})
    if not missing and args.quantize is None:
        return
    chosen = training.settings()
    options = {
        name: chosen[f"lora_{name}"] if value is None else value for name, value in given.items()
    }
    set_seed(training.seed)  # new adapters are drawn before the trainer sets it
    model.add_dual_qlora(missing, quantize=quantize or args.quantize is not None, **options)


def _expect_own(name: str, given: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise for sizes on the command line that an adapter, which is there, does not have."""
    for option, value in own.items():
        if given[option] not in (None, value):
            raise ValueError(
                f"--lora-{option}: the model has an adapter {name!r} already, with {value:g}, got "
                f"{given[option]:g}; leave the option out, or name another adapter"
            )


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

    alternating = stage_of(training.stage).alternating
    if samples is None and (not alternating or training.vl_probability < 1.0):
        raise ValueError(
            f"--coco-images: stage {training.stage} trains on crayon instructions; name "
            "--coco-images and either --panoptic and --annotations or --prepared"
        )
    if alternating and training.vl_probability > 0.0 and not args.vl_data:
        raise ValueError(
            f"--vl-data: stage {training.stage} draws visual instructions; name a JSON file, or "
            "set --vl_probability 0"
        )
    image_data = None
    if samples is not None:
        image_data = CrayonInstructionDataset(
            samples, seed=training.stream_seed, max_number=max_number
        )
    if not alternating or not args.vl_data:
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
