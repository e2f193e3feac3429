"""The low-rank branch that carries the crayon into one projection (projection mode)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrayonBranch(nn.Module):
    r"""A crayon table for one projection: :math:`\text{table} = s \, B_{seg} (A_{seg} c)`.

    It has no bias, and it runs on the crayon's rows, never on tokens. ``B`` starts at zero and
    ``A`` does not: exactly one factor on the crayon's path is zero, so the first step reaches ``B``
    and the second everything behind it.

    Args:
        hidden_size: Width of the crayon rows.
        out_features: Outputs of the projection the table is added to.
        rank: R.
        scaling: s.
        dropout: Dropout on the rows, while training.
        device: Where to make the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if ``rank`` is below one.

    Source: PLoRA of the released CoLLaVO code; arXiv 2402.11248, section 3.

    Example:
        >>> import torch
        >>> branch = CrayonBranch(64, 48, rank=8)
        >>> branch(torch.randn(5, 64)).abs().max().item()
        0.0
    """

    def __init__(
        self,
        hidden_size: int,
        out_features: int,
        *,
        rank: int,
        scaling: float = 1.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        self.scaling = scaling
        self.dropout = dropout
        self.A = nn.Linear(hidden_size, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.B.starts_at_zero = True  # type: ignore[assignment]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``A`` as ``nn.Linear`` does and set ``B`` to zero."""
        self.A.reset_parameters()
        nn.init.zeros_(self.B.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the table ``[T, out_features]``, in the parameters' dtype.

        Args:
            rows: ``[T, hidden_size]``, any floating dtype.
        """
        rows = nn.functional.dropout(rows.to(self.A.weight.dtype), self.dropout, self.training)
        table: Tensor = self.B(self.A(rows)) * self.scaling
        return table

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        return f"scaling={self.scaling}, dropout={self.dropout}"
