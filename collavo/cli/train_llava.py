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

# Pictures of which one at least has to have a map in a cache.
_LOOKED_AT = 16


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
    _check(args, training)
    name = chosen.get("template") if args.template is None else args.template
    template = chat_template(str(name))
    max_length = chosen.get("max_length") if args.max_length is None else args.max_length
    model, processor = load_folder(args.model)
    notes = _take_template(model, processor, template, str(name), given=args.template is not None)
    notes += _take_image_mode(processor, model, chosen)
    if training.process_index == 0:
        for note in notes:
            print(note)
    _take_parts(model, args, training)
    data, skipped = _conversations(args, training, processor, max_length)
    collator = CrayonCollator(processor, max_length=max_length)
    return Opened(model, processor, {**data, "data_collator": collator}, skipped)


def sources(words: list[str], option: str = "--data") -> list[Path | tuple[Path, float]]:
    """Read files with weights behind a colon.

    Args:
        words: Of the command line.
        option: Which has them, for messages.

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
                f"{option}: expected FILE or FILE:WEIGHT with a weight above 0, got {word!r}"
            )
        found.append((Path(path), number))
    for one in found:
        file = one[0] if isinstance(one, tuple) else one
        if not file.is_file():
            raise FileNotFoundError(f"{option}: {file}: there is no such file")
    return found


def _check(args: argparse.Namespace, training: CollavoTrainingArguments) -> None:
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
    for name in ("rank", "alpha", "dropout"):
        if getattr(args, f"lora_{name}") is not None and not training.adapters:
            raise ValueError(
                f"--lora-{name}: expected with adapters to train, which --adapters names, got none"
            )
    sources(args.data)
    sources(args.eval_data or [], "--eval-data")


def _take_parts(model: Any, args: argparse.Namespace, training: CollavoTrainingArguments) -> None:
    """Give the model the adapters to train, and raise if it lacks what is trained."""
    add_adapters(model, training.adapters or [], args, training, quantize=False)
    trainable_parameters(model, training.stage, training.trained_parts, training.adapters)


def _take_template(
    model: Any, processor: Any, template: str, name: str, *, given: bool
) -> list[str]:
    """Let all that is saved follow a chat template: what is asked later is what was trained.

    Returns what to say where another goes that nobody has named.
    """
    own = processor.chat_template
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.object_text = False
    settings, stop = model.generation_config, processor.stop_token()
    stops = settings.eos_token_id
    stops = list(stops) if isinstance(stops, list) else [] if stops is None else [stops]
    if stop is not None and stop not in stops:
        settings.eos_token_id = [*stops, stop] if stops else stop
    if given or own in (None, template):
        return []
    return [f"template: {name}, the stage's, in the place of the model's own (--template)"]


def _take_image_mode(processor: Any, model: Any, chosen: Any) -> list[str]:
    """Let images be cropped or padded as the preset has it; return what to say of the rest."""
    from collavo.processing.region import frame, make_image_processor

    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    own = {
        "image_size": side,
        "projector_type": getattr(model.config, "projector_type", "mlp2x_gelu"),
    }
    notes = [
        f"preset: {name} is {chosen[name]} there, and {value} in the model; it stays"
        for name, value in own.items()
        if name in chosen and chosen[name] != value
    ]
    if "image_mode" not in chosen or side is None:
        return notes
    mode, before = chosen["image_mode"], processor.image_processor
    if not processor.one_grid:
        return [*notes, f"preset: image_mode is {mode} there; the model's own processor stays"]
    if mode == "crop" and processor.box_frame != "image":
        raise ValueError(
            f"--preset: crops images, whose boxes the model's processor tells in the frame "
            f"{processor.box_frame!r}; save it with box_frame='image', or give no preset"
        )
    made = make_image_processor(side, mode=mode)
    for name in ("image_mean", "image_std", "rescale_factor"):
        setattr(made, name, getattr(before, name))
    # A processor of transformers inside makes the pixels where there is one.
    for one in (processor, getattr(processor, "processor", processor)):
        one.image_processor = made
    if frame(made, 1, 2) != frame(before, 1, 2):
        notes.append(f"preset: image_mode is {mode} from now on, which is saved with the model")
    return notes


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
    maps = _maps(args, training, processor, list(opened.values()))
    for data in opened.values():
        data.panoptic = maps
    return opened, skipped


def _maps(
    args: argparse.Namespace, training: CollavoTrainingArguments, processor: Any, data: list[Any]
) -> Callable[[Path], Any] | None:
    """Return what gives a picture its panoptic map, if anything was named."""
    from collavo.train.picture_maps import PictureMaps

    first = training.process_index == 0
    pictures = [path for one in data for path in one.pictures()]
    alone = args.prepared is not None and args.coco_images is None and args.panoptic is None
    samples = PreparedDataset(args.prepared) if alone else coco_samples(args)
    if samples is None:
        if args.vl_coco_images is not None:
            raise ValueError("--vl-coco-images: expected with panoptic maps, which it is about")
        return None if args.segmenter is None else _cached_maps(args.segmenter, pictures, first)
    if isinstance(samples, PreparedDataset):
        samples.check_processor(processor)
    if args.segmenter is not None:
        raise ValueError("--segmenter: expected without --panoptic and --prepared, got both")
    folder = args.vl_coco_images
    if folder is not None and args.images is not None:
        folder = args.images / folder
    maps = PictureMaps(samples, pictures, folder=folder, sizes=first)
    if first:
        print(maps.summary())
    return maps


def _cached_maps(folder: Path, pictures: list[Path], first: bool) -> Callable[[Path], Any]:
    """Open a segmenter's cache, and see by some of the pictures that it is of these."""
    from collavo.panoptic.segmenter_cache import CachedMaps

    maps = CachedMaps(folder)
    some = pictures[:: max(1, len(pictures) // _LOOKED_AT)][:_LOOKED_AT]
    found = sum(maps(path) is not None for path in some)
    if some and not found:
        raise ValueError(
            f"--segmenter: {folder} has a map of none of {len(some)} pictures looked at, such as "
            f"{some[0]}; it knows a picture by its pixels: let the segmenter see these files"
        )
    if first:
        print(f"{found} of {len(some)} pictures looked at have a map in {folder}")
    return maps
