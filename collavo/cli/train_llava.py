"""What ``collavo train`` trains in LLaVA's stages: conversations with and without images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collavo._requirements  # noqa: F401  (before what it checks)

from collavo.cli.train_crayon import Opened, add_adapters, coco_samples
from collavo.panoptic.coco_index import Skipped
from collavo.prepared.read import PreparedDataset
from collavo.train.arguments import CollavoTrainingArguments
from collavo.train.stages import learns_from_text, trainable_parameters, without_text


def open_llava(args: argparse.Namespace, training: CollavoTrainingArguments) -> Opened:
    """Open the conversations of a stage, and the model with what it trains.

    Args:
        args: Of the command line.
        training: Made of them.

    Raises:
        FileNotFoundError: naming the file or folder.
        ValueError: naming the option, file or record that does not fit.
    """
    from collavo.loading import load_folder
    from collavo.processing.chat_templates import chat_template
    from collavo.train.collator import CrayonCollator

    chosen = training.settings()
    _check(args)
    name = chosen.get("template") if args.template is None else args.template
    template = chat_template(str(name))
    max_length = args.max_length or chosen.get("max_length")
    model, processor = load_folder(args.model)
    processor.chat_template = template
    _take_image_mode(processor, model, chosen)
    _take_parts(model, args, training)
    data, skipped = _conversations(args, training, processor, max_length)
    collator = CrayonCollator(processor, object_text=False, max_length=max_length)
    return Opened(model, processor, {**data, "data_collator": collator}, skipped)


def sources(words: list[str]) -> list[Path | tuple[Path, float]]:
    """Read files with weights behind a colon.

    Args:
        words: Of the command line.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: naming the weight that is none.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
        ...     [(path, weight)] = sources([f"{file.name}:0.5"])
        >>> weight
        0.5
    """
    found: list[Path | tuple[Path, float]] = []
    for word in words:
        path, colon, weight = word.rpartition(":")
        if not colon or Path(word).exists():
            found.append(Path(word))
            continue
        try:
            number = float(weight)
        except ValueError:
            number = -1.0
        if not 0.0 < number < float("inf"):
            raise ValueError(
                f"--data: expected FILE or FILE:WEIGHT with a weight above 0, got {word!r}"
            )
        found.append((Path(path), number))
    for one in found:
        file = one[0] if isinstance(one, tuple) else one
        if not file.is_file():
            raise FileNotFoundError(f"--data: {file}: there is no such file")
    return found


def _check(args: argparse.Namespace) -> None:
    """Raise for options that a look at the command line and the folders shows to be wrong."""
    if args.vl_data or args.vl_images is not None:
        raise ValueError(f"--vl-data: expected with --stage cit; {args.stage} takes --data")
    if not args.data:
        raise ValueError(f"--data: stage {args.stage} trains on conversations; name a JSON file")
    if args.images is not None and not args.images.is_dir():
        raise FileNotFoundError(f"--images: there is no folder {args.images}")
    if args.segmenter is not None and not args.segmenter.is_dir():
        raise FileNotFoundError(f"--segmenter: there is no folder {args.segmenter}")
    if args.no_quantize and args.quantize is not None:
        raise ValueError("--no-quantize: expected without --quantize, got both")
    sources([*args.data, *(args.eval_data or [])])


def _take_parts(model: Any, args: argparse.Namespace, training: CollavoTrainingArguments) -> None:
    """Give the model the adapters to train, and raise if it lacks what is trained."""
    add_adapters(model, training.adapters or [], args, training, quantize=False)
    trainable_parameters(model, training.stage, training.trained_parts, training.adapters)


def _take_image_mode(processor: Any, model: Any, chosen: Any) -> None:
    """Let images be cropped or padded as the preset has it, and say what else it has otherwise."""
    from collavo.processing.region import make_image_processor

    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    own = {
        "image_size": side,
        "projector_type": getattr(model.config, "projector_type", "mlp2x_gelu"),
    }
    for name, value in own.items():
        if name in chosen and chosen[name] != value:
            print(f"preset: {name} is {chosen[name]} there, and {value} in the model; it stays")
    if "image_mode" in chosen and side is not None and processor.one_grid:
        made = make_image_processor(side, mode=chosen["image_mode"])
        for name in ("image_mean", "image_std", "rescale_factor"):
            setattr(made, name, getattr(processor.image_processor, name))
        processor.image_processor = made


def _conversations(
    args: argparse.Namespace,
    training: CollavoTrainingArguments,
    processor: Any,
    max_length: int | None,
) -> tuple[dict[str, Any], list[Skipped]]:
    """Open the records, the first process before the others."""
    from collavo.conversations.dataset import ConversationDataset
    from collavo.train.streams import expect_images

    skipped: list[Skipped] = []
    names = {"train_dataset": args.data, "eval_dataset": args.eval_data}
    opened: dict[str, Any] = {}
    with training.main_process_first(desc="reading the conversations"):
        for name, words in names.items():
            if words:
                opened[name] = ConversationDataset.from_llava_json(
                    sources(words),
                    images=args.images,
                    image_order=args.image_order,
                    seed=training.stream_seed,
                    on_fault=args.on_fault,
                    on_skip=skipped.append,
                    processor=processor,
                    max_length=max_length,
                    overlong=args.overlong,
                    progress=training.process_index == 0 and not training.disable_tqdm,
                )
    if not learns_from_text(training.trained_parts):
        expect_images(opened["train_dataset"], without_text(training.trained_parts), "--data")
    maps = _maps(args, training, list(opened.values()))
    for data in opened.values():
        data.panoptic = maps
    return opened, skipped


def _maps(
    args: argparse.Namespace, training: CollavoTrainingArguments, data: list[Any]
) -> Callable[[Path], Any] | None:
    """Return what gives a picture its panoptic map, if anything was named."""
    from collavo.panoptic.segmenter_cache import CachedMaps
    from collavo.train.picture_maps import PictureMaps

    alone = args.prepared is not None and args.coco_images is None and args.panoptic is None
    samples = PreparedDataset(args.prepared) if alone else coco_samples(args)
    if samples is None:
        if args.vl_coco_images is not None:
            raise ValueError("--vl-coco-images: expected with panoptic maps, which it is about")
        return None if args.segmenter is None else CachedMaps(args.segmenter)
    if args.segmenter is not None:
        raise ValueError("--segmenter: expected without --panoptic and --prepared, got both")
    folder = args.vl_coco_images
    if folder is not None and args.images is not None:
        folder = args.images / folder
    pictures = [path for one in data for path in one.pictures()]
    first = training.process_index == 0
    maps = PictureMaps(samples, pictures, folder=folder, sizes=first)
    if first:
        print(maps.summary())
    return maps
