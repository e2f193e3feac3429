"""Arguments of the two training stages: transformers' own, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import collavo._requirements  # noqa: F401  (before what it checks)

from transformers import TrainingArguments

from collavo.train.stages import stage_of
from collavo_kernels.info import require


@dataclass
class CollavoTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with CoLLaVO's stages and the paper's hyperparameters.

    The paper (section 4, implementation details): AdamW, batch 32 over all devices, one epoch,
    cosine annealing from 1e-4 (``cpt``) or 1e-5 (``cit``) to 1e-6. Where it is silent (weight
    decay, warm-up) transformers' defaults stand: none of either.

    Args:
        stage: ``"cpt"`` trains the crayon prompt, ``"cit"`` the drawn adapter and the crayon too.
        vl_probability: Probability of a VL-CIT step; the paper does not give it. Only in ``cit``.
        learning_rate: Peak learning rate; None takes the stage's.
        min_learning_rate: Where the cosine ends.
        per_device_train_batch_size: Times devices and accumulation steps gives the paper's 32.

    Raises:
        ValueError: for an unknown stage, a probability outside 0 to 1, or options under which the
            streams of the two data sets could not be kept apart (``ignore_data_skip``,
            ``auto_find_batch_size``, ``split_batches``).

    Example:
        >>> args = CollavoTrainingArguments(output_dir="out", stage="cit", use_cpu=True)
        >>> args.learning_rate, round(args.lr_scheduler_kwargs["min_lr_rate"], 6)
        (1e-05, 0.1)
    """

    stage: Literal["cpt", "cit", "align", "instruct"] = field(
        default="cpt", metadata={"help": "cpt: crayon prompt tuning; cit: instruction tuning."}
    )
    vl_probability: float = field(
        default=0.5, metadata={"help": "Probability that a cit step trains on the VL data."}
    )
    min_learning_rate: float = field(
        default=1e-6, metadata={"help": "Learning rate at the end of the cosine."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate (default: 1e-4 for cpt, 1e-5 for cit)."}
    )
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Any scheduler of transformers."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Samples per device and micro-batch (paper: 32 in all)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep off: the collator reads the raw fields."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Keep on: the idle adapter has no gradient."}
    )

    def __post_init__(self) -> None:
        """Fill in what depends on the stage, then let transformers check the rest."""
        require("accelerate", "1.1", "CollavoTrainer")
        stage = stage_of(self.stage)
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
        if self.learning_rate is None:
            self.learning_rate = stage.learning_rate
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            # Not ``min_lr``: transformers divides that by what DeepSpeed's optimizers do not have.
            lowest = min(self.min_learning_rate, self.learning_rate)
            rate = lowest / self.learning_rate if self.learning_rate else 0.0
            self.lr_scheduler_kwargs = {"min_lr_rate": rate}
        self._choose_checkpointing()
        super().__post_init__()  # type: ignore[no-untyped-call]
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError("accelerator_config: split_batches is not supported; leave it False")

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
        return micro_batch * self.gradient_accumulation_steps

    @property
    def stream_seed(self) -> int:
        """What the draws and the order of samples follow from: ``data_seed``, else ``seed``."""
        return self.seed if self.data_seed is None else self.data_seed

    def stream_facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share with the run it continues."""
        return {
            "stage": self.stage,
            "vl_probability": self.vl_probability if self.stage == "cit" else 0.0,
            "stream_seed": self.stream_seed,
            "step_size": self.step_size,
        }
