"""The loss on held-out records: the mean over their tokens, whatever the batches."""

from __future__ import annotations

from typing import Any, cast

import collavo._requirements  # noqa: F401  (before what it checks)

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

_IGNORED = -100


class HeldOutLoss(Trainer):
    r"""``transformers.Trainer`` whose ``eval_loss`` is the mean over all held-out tokens.

    .. math:: L = \sum_i \sum_{t \in i} -\log p_t \; / \; \sum_i |i|

    over every record :math:`i` once and its targets :math:`t`. transformers averages the means of
    batches, so that its value follows from the batch size and from the ranks, whose last batches
    hold records twice. Where a loss function of one's own is in use, or the model returns no
    logits, its value stands.
    """

    _held_out: list[Tensor] | None = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate one batch, and keep the loss and the number of targets of each record.

        Args:
            model: As in transformers.
            inputs: A batch.
            prediction_loss_only: Whether logits and labels are returned too.
            ignore_keys: As in transformers.
        """
        labels = inputs.get("labels")
        plain = self.compute_loss_func is None and self.label_smoother is None
        plain = plain and isinstance(labels, Tensor)
        step: Any = super().prediction_step(
            model, inputs, prediction_loss_only and not plain, ignore_keys
        )
        loss, outputs, targets = step
        logits = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
        if self._held_out is not None and plain and isinstance(logits, Tensor):
            labels = cast(Tensor, labels)
            record = sums_of_records(logits, labels.to(logits.device))
            self._held_out.append(self.accelerator.gather_for_metrics(record).cpu())
        return (loss, None, None) if prediction_loss_only else (loss, outputs, targets)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as transformers does, and put the mean over tokens in the place of its loss.

        Args:
            dataloader: As in transformers.
            description: As in transformers.
            prediction_loss_only: As in transformers.
            ignore_keys: As in transformers.
            metric_key_prefix: As in transformers.
        """
        self._held_out = []
        # A data loader draws a seed: a run that is resumed behind an evaluation would go on with
        # other dropout than the one that it continues.
        with torch.random.fork_rng(devices=()):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        records, self._held_out = self._held_out, None
        if records and output.metrics is not None:
            loss, targets = torch.cat(records).sum(0).tolist()
            if targets:
                output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        return output


def sums_of_records(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each record's summed loss and number of targets, float64 ``[B, 2]``.

    Args:
        logits: ``[B, S, V]``.
        labels: int64 ``[B, S]``, of the same tokens, so a target is predicted one place earlier.

    Example:
        >>> sums_of_records(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, -100]])).tolist()
        [[1.3862943649291992, 1.0]]
    """
    targets = labels[:, 1:]
    # A record at a time: float32 logits of a whole batch can take more than the model.
    losses = [
        F.cross_entropy(one[:-1].float(), own, ignore_index=_IGNORED, reduction="sum")
        for one, own in zip(logits, targets, strict=True)
    ]
    counts = (targets != _IGNORED).sum(1)
    return torch.stack([torch.stack(losses).double(), counts.double()], 1)
