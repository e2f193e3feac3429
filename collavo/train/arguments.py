"""Arguments of the training stages: transformers' own, with the papers' values as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import TrainingArguments

from collavo.train.parts import PARTS, Part
from collavo.train.presets import PRESETS, Settings, preset_settings
from collavo.train.stages import Stage, parts_of, stage_of
from collavo_kernels.info import require

_ALL = ", ".join(PARTS)


# Filled in from the stage's settings, or a preset's, where they are not given.
_OF_THE_STAGE = (
    "learning_rate",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "bf16",
    "adapters",
    "projector_learning_rate",
    "global_batch",
)

# What a resumed optimizer has from its checkpoint, whatever the run says.
_KEPT = (
    "learning_rate",
    "projector_learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


@dataclass
class CollavoTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the stages, and their papers' values as defaults.

    CoLLaVO (``cpt``, ``cit``; section 4, implementation details): AdamW, batch 32 over all devices,
    one epoch, cosine annealing from 1e-4 or 1e-5 to 1e-6. Where it is silent (weight decay,
    warm-up) transformers' defaults stand: none of either. LLaVA-1.5 (``align``, ``instruct``;
    table 9): batch 256 or 128, one epoch, cosine from 1e-3 or 2e-5 (adapters 2e-4, the projector
    beside them 2e-5) to 0, 3 % warm-up, no weight decay, bfloat16 autocast.

    Args:
        stage: ``"cpt"`` trains the crayon prompt, ``"cit"`` the drawn adapter and the crayon too,
            ``"align"`` the projector, ``"instruct"`` projector and decoder, or projector and
            ``adapters``.
        preset: A name of ``PRESETS``: its values stand where nothing is given.
        parts: What to train in place of the stage's own parts; some of ``PARTS``.
        adapters: Names of the adapters to train.
        global_batch: Samples of an optimizer step over all devices and micro-batches; None takes
            the stage's, in ``cpt`` and ``cit`` what the next two give.
        per_device_train_batch_size: Of a micro-batch; None takes the largest up to the stage's own
            that divides the global batch.
        gradient_accumulation_steps: Micro-batches of a step; None follows from the others.
        learning_rate: Peak learning rate; None takes the stage's.
        projector_learning_rate: Peak of the projector's; None takes ``learning_rate``.
        min_learning_rate: Where the cosine of ``cpt`` and ``cit`` ends.
        vl_probability: Probability of a VL-CIT step; the paper does not give it. Only in ``cit``.
        group: ``"length"``: samples of alike length come together (``align``, ``instruct``);
            ``"none"``: they do not. Samples with and without images are never mixed in a step.
        save_trained_only: Whether checkpoints but the last hold the trained tensors in place of the
            whole model, beside all that resuming takes; the last one, and what training leaves in
            ``output_dir``, hold the adapters for PEFT and LLaVA's ``mm_projector.bin`` too.
        export: Folder that the trained model is exported to at the end (``collavo.train.export``).

    Raises:
        ValueError: for an unknown stage, preset or part, a global batch that does not divide, a
            probability outside 0 to 1, or options under which the streams of samples could not be
            kept apart (``ignore_data_skip``, ``auto_find_batch_size``, ``split_batches``) or the
            loss would be another (``label_smoothing_factor``, ``average_tokens_across_devices``).

    Example:
        >>> args = CollavoTrainingArguments(output_dir="out", stage="cit", use_cpu=True)
        >>> args.learning_rate, round(args.lr_scheduler_kwargs["min_lr_rate"], 6)
        (1e-05, 0.1)
        >>> args = CollavoTrainingArguments(output_dir="out", stage="align", use_cpu=True)
        >>> args.learning_rate, args.per_device_train_batch_size, args.gradient_accumulation_steps
        (0.001, 32, 8)
    """

    stage: Literal["cpt", "cit", "align", "instruct"] = field(
        default="cpt",
        metadata={
            "help": "cpt: crayon prompt tuning; cit: instruction tuning with two adapters; align: "
            "LLaVA's projector; instruct: LLaVA's instruction tuning."
        },
    )
    preset: str | None = field(
        default=None, metadata={"help": f"Values of a paper: {', '.join(PRESETS)}."}
    )
    parts: list[str] | None = field(
        default=None, metadata={"help": f"What to train, in place of the stage's own: {_ALL}."}
    )
    adapters: list[str] | None = field(
        default=None, metadata={"help": "Names of the adapters to train (instruct)."}
    )
    global_batch: int | None = field(
        default=None, metadata={"help": "Samples of an optimizer step, over all devices."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the projector, if it is another."}
    )
    group: Literal["length", "none"] = field(
        default="length", metadata={"help": "Whether samples of alike length come together."}
    )
    vl_probability: float = field(
        default=0.5, metadata={"help": "Probability that a cit step trains on the VL data."}
    )
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate at the end of the cosine (cpt, cit)."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate (default: the stage's)."}
    )
    lr_scheduler_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Any scheduler of transformers (default: a cosine)."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Passes over the data (default: the stage's, or 1)."}
    )
    warmup_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Steps of warm-up; below 1 their share of all."}
    )
    weight_decay: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Of AdamW (default: none)."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Autocast to bfloat16 (default: in align and instruct).",
            "nargs": "?",
            "const": True,
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Samples per device and micro-batch."}
    )
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Micro-batches of a step (default: from global_batch)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep off: the collator reads the raw fields."}
    )
    save_trained_only: bool = field(
        default=False,
        metadata={"help": "Keep only trained tensors in checkpoints; the last one is whole."},
    )
    export: str | None = field(
        default=None,
        metadata={"help": "Folder for the model, PEFT's adapters and mm_projector.bin at the end."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Keep on: what a step does not train has no gradient."}
    )

    def __post_init__(self) -> None:
        """Fill in what depends on stage and preset, then let transformers check the rest."""
        require("accelerate", "1.1", "CollavoTrainer")
        stage = stage_of(self.stage)
        self._check_options(stage)
        own_rate = self.projector_learning_rate
        self._fill_in(stage)
        parts = parts_of(self.stage, self.parts, self.adapters)
        if own_rate is not None and "projector" not in parts:
            raise ValueError(
                "projector_learning_rate: expected none, since the parts to train are "
                f"{', '.join(parts)}, got {own_rate}; add projector to them (parts=, on the "
                "command line --parts)"
            )
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            # Not ``min_lr``: transformers divides that by what DeepSpeed's optimizers do not have.
            peak = self.learning_rate or 0.0
            lowest = min(self.min_learning_rate, peak)
            self.lr_scheduler_kwargs = {"min_lr_rate": lowest / peak if peak else 0.0}
        if self.max_steps <= 0 and not float(self.num_train_epochs or 0.0) > 0.0:
            raise ValueError(
                f"num_train_epochs: expected above 0, got {self.num_train_epochs}, with which "
                "nothing is trained"
            )
        self._choose_checkpointing()
        micro_batch, micro_batches = (
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
        )
        # How many devices there are is known afterwards.
        self.per_device_train_batch_size = micro_batch or 1
        self.gradient_accumulation_steps = micro_batches or 1
        super().__post_init__()  # type: ignore[no-untyped-call]
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError("accelerator_config: split_batches is not supported; leave it False")
        devices = int(self.world_size) * max(1, int(self.n_gpu))
        self._divide(stage, devices, micro_batch, micro_batches)

    def _check_options(self, stage: Stage) -> None:
        """Raise for options by which the streams or the loss would be others, and nobody see it."""
        if not 0.0 <= self.vl_probability <= 1.0:
            raise ValueError(f"vl_probability: expected 0 to 1, got {self.vl_probability}")
        if self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip: expected False; a resumed run continues its streams of samples"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size: expected False; a step's samples are counted out for one "
                "batch size"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}; "
                "transformers does not shift the labels for models of images and text, which would "
                "learn to repeat each token"
            )
        if not (stage.drawn or self.average_tokens_across_devices):
            raise ValueError(
                "average_tokens_across_devices: expected True, got False; a device without a "
                "sample of a smaller step would divide by its own number of tokens, which is 0"
            )

    def _fill_in(self, stage: Stage) -> None:
        """Take what is not given from the preset, or else the stage."""
        chosen = preset_settings(self.preset, self.stage)
        if self.parts is not None and "adapters" not in self.parts:
            chosen = {name: value for name, value in chosen.items() if name != "adapters"}
        adapters = self.adapters or chosen.get("adapters")
        values = {**stage.settings_of(adapters), **chosen}
        if self.fp16:
            values["bf16"] = False
        if self.per_device_train_batch_size and self.gradient_accumulation_steps:
            values["global_batch"] = None  # what they give
        for name in _OF_THE_STAGE:
            if getattr(self, name) is None:
                setattr(self, name, values.get(name))
        if self.adapters is not None:
            self.adapters = list(self.adapters)
        if self.weight_decay is None:
            self.weight_decay = 0.0

    def settings(self) -> Settings:
        """Return what stage and preset say: the values that stand where a run gives none."""
        chosen = preset_settings(self.preset, self.stage)
        return {**stage_of(self.stage).settings_of(self.adapters), **chosen}

    def _divide(
        self, stage: Stage, devices: int, micro_batch: int | None, micro_batches: int | None
    ) -> None:
        """Let global batch, devices, micro-batch and their number follow from each other."""
        usual = int(stage.settings["per_device_train_batch_size"])
        for name, given in (
            ("per_device_train_batch_size", micro_batch),
            ("gradient_accumulation_steps", micro_batches),
            ("global_batch", self.global_batch),
        ):
            if given is not None and given < 1:
                raise ValueError(f"{name}: expected at least 1, got {given}")
        if self.global_batch is None:
            micro_batch, micro_batches = micro_batch or usual, micro_batches or 1
            self.global_batch = devices * micro_batch * micro_batches
        share, left = divmod(self.global_batch, devices * (micro_batches or 1))
        if micro_batch is None and not left and share:
            most = share if micro_batches else min(share, usual)
            micro_batch = next(size for size in range(most, 0, -1) if share % size == 0)
        micro_batch = micro_batch or usual
        number, left = divmod(self.global_batch, devices * micro_batch)
        if left or number < 1 or number != (micro_batches or number):
            raise ValueError(
                f"global_batch: expected a multiple of {devices} devices x {micro_batch} samples "
                f"per device{f' x {micro_batches} micro-batches' if micro_batches else ''}, got "
                f"{self.global_batch}; choose global_batch and per_device_train_batch_size so that "
                "they divide"
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps = micro_batch, number

    def _choose_checkpointing(self) -> None:
        # The kind without re-entry: the other gives nothing to parameters behind an input that
        # requires no gradient. transformers renamed the option in 5.2x.
        named = ("activation_checkpointing", "gradient_checkpointing")
        present = [name for name in named if hasattr(self, name)]
        wanted = any(getattr(self, name) for name in present)
        if wanted and all(getattr(self, f"{name}_kwargs") is None for name in present):
            setattr(self, f"{present[0]}_kwargs", {"use_reentrant": False})

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step, over all devices and micro-batches."""
        micro_batch = int(self.train_batch_size) * int(self.world_size)
        return micro_batch * int(self.gradient_accumulation_steps or 1)

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """What this run trains."""
        return parts_of(self.stage, self.parts, self.adapters)

    @property
    def stream_seed(self) -> int:
        """What the draws and the order of samples follow from: ``data_seed``, else ``seed``."""
        return self.seed if self.data_seed is None else self.data_seed

    def stream_facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share with the run it continues."""
        stage = stage_of(self.stage)
        facts: dict[str, Any] = {
            "stage": self.stage,
            "vl_probability": self.vl_probability if stage.alternating else 0.0,
            "stream_seed": self.stream_seed,
            "step_size": self.step_size,
        }
        if self.trained_parts != stage.parts:
            facts["parts"] = sorted(self.trained_parts)
        if self.adapters:
            facts["adapters"] = list(self.adapters)
        if stage.drawn:  # earlier versions have sealed checkpoints of these
            return facts
        # Optimizer and schedule come back with those that they had.
        kept = {name: getattr(self, name) for name in _KEPT}
        kept["optim"] = str(getattr(self.optim, "value", self.optim))
        kept["precision"] = "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"
        return {**facts, "group": self.group, **kept}
