"""CrayonPrompt: the learned queries of classes and numbers, and their MLP; a check of its index."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from collavo_kernels._rows import checked_index
from collavo_kernels._validation import describe, expect_int, expect_tensor

_INTEGERS = (torch.int32, torch.int64)


class Rows(Protocol):
    """What has rows: a ``CrayonMap``, or any object with these two."""

    @property
    def row_class(self) -> Tensor:
        """``[T]``: as in ``CrayonPrompt.project``."""

    @property
    def row_number(self) -> Tensor:
        """``[T]``: as in ``CrayonPrompt.project``."""


class CrayonPrompt(nn.Module):
    """One crayon vector per row: ``MLP(class_embedding[class] + number_embedding[number])``.

    The MLP is ``Linear(embed_dim, hidden_size)``, exact GELU, ``Linear(hidden_size, hidden_size)``,
    with biases. It runs on the T rows of a batch, not on its image tokens: the tokens of a row
    have the same vector.

    Source: CoLLaVO, arXiv 2402.11248 section 3; sizes, sum and initialisation as in its released
    code, whose checkpoint calls the parts ``seg_prompt_embed``, ``seg_num_embed`` and
    ``vision_proj_for_seg``.

    Args:
        num_classes: Classes; query 0 is the unknown class, so there are ``num_classes + 1``.
        max_number: Last instance number; query 0 means no number, so there are ``max_number + 1``.
        embed_dim: Width of the queries.
        hidden_size: Width of the language model, K.
        zero_init: Start the MLP's last layer at zero, so that a fresh prompt adds nothing. For
            injection in attention, where no other factor on the crayon's path starts at zero;
            False in projection mode, where ``B_seg`` does. Two zeros in a row would stop every
            gradient.
        device: Where the parameters are made.
        dtype: Their dtype.

    Attributes:
        class_embedding: ``nn.Embedding``, weight ``[num_classes + 1, embed_dim]``.
        number_embedding: ``nn.Embedding``, weight ``[max_number + 1, embed_dim]``.
        mlp: ``nn.Sequential``; ``mlp.0`` and ``mlp.2`` are the linear layers.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> from collavo_kernels import panoptic_lookup
        >>> from collavo_kernels.nn import CrayonPrompt
        >>> maps = torch.tensor([[[3, 3], [0, 3]]], dtype=torch.int32)
        >>> ids, classes = torch.tensor([[3], [0]], dtype=torch.int32)
        >>> crayon = panoptic_lookup(maps, [ids], [classes], grid=(2, 2))
        >>> prompt = CrayonPrompt(embed_dim=8, hidden_size=16, zero_init=False)
        >>> prompt(crayon).shape
        torch.Size([2, 16])
    """

    # The released code's normal distribution for embeddings and linear layers alike.
    INITIALIZER_RANGE = 0.02

    def __init__(
        self,
        num_classes: int = 133,
        max_number: int = 20,
        embed_dim: int = 1024,
        hidden_size: int = 4096,
        *,
        zero_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = expect_int("num_classes", num_classes, minimum=1)
        self.max_number = expect_int("max_number", max_number, minimum=1)
        self.embed_dim = expect_int("embed_dim", embed_dim, minimum=1)
        self.hidden_size = expect_int("hidden_size", hidden_size, minimum=1)
        self.zero_init = zero_init
        self.class_embedding = nn.Embedding(num_classes + 1, embed_dim, device=device, dtype=dtype)
        self.number_embedding = nn.Embedding(max_number + 1, embed_dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_size, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; biases, and with ``zero_init`` the last layer, become zero."""
        nn.init.normal_(self.class_embedding.weight, std=self.INITIALIZER_RANGE)
        nn.init.normal_(self.number_embedding.weight, std=self.INITIALIZER_RANGE)
        for name, values in self.mlp.named_parameters():
            zero = name.endswith("bias") or (self.zero_init and name == "2.weight")
            nn.init.normal_(values, std=0.0 if zero else self.INITIALIZER_RANGE)

    def forward(self, crayon: Rows) -> Tensor:
        """Return the crayon vector of every row, ``[T, hidden_size]``; zero for dead rows.

        Args:
            crayon: A ``CrayonMap``, or what has ``row_class`` and ``row_number`` like one.

        Raises:
            TypeError: if it has not.
        """
        if not (hasattr(crayon, "row_class") and hasattr(crayon, "row_number")):
            raise TypeError(
                f"crayon: expected a CrayonMap, got {describe(crayon)}; panoptic_lookup makes one, "
                "and project() takes classes and numbers"
            )
        return self.project(crayon.row_class, crayon.row_number)

    def project(self, row_class: Tensor, row_number: Tensor) -> Tensor:
        """Return the crayon vectors of rows given by class and number.

        Args:
            row_class: ``[...]`` int32 or int64, 0 = unknown, class ``c`` is ``c + 1``, negative =
                a dead (padded) row.
            row_number: ``[...]`` int32 or int64, 0 = no number.

        Returns:
            ``[..., hidden_size]`` in the parameters' dtype (autocast's, under autocast); dead rows
            are zero and have no gradient.

        Raises:
            TypeError: if an index tensor holds no integers.
            ValueError: if shapes or devices differ, or (on the CPU, outside of compiled code) a
                class or number of a live row is out of range.
        """
        weight = self.class_embedding.weight
        # An offloaded weight is elsewhere until its module runs.
        device = getattr(row_class, "device", None) if weight.is_meta else weight.device
        expect_tensor("row_class", row_class, dtypes=_INTEGERS, device=device)
        expect_tensor(
            "row_number", row_number, shape=row_class.shape, dtypes=_INTEGERS, device=device
        )
        live = row_class >= 0
        row_class = torch.where(live, row_class, 0)
        row_number = torch.where(live, row_number, 0)
        if row_class.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range("row_class", row_class, self.num_classes)
            _check_range("row_number", row_number, self.max_number)
        queries = self.class_embedding(row_class) + self.number_embedding(row_number)
        vectors: Tensor = self.mlp(queries)
        return torch.where(live[..., None], vectors, 0)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"num_classes={self.num_classes}, max_number={self.max_number}, "
            f"embed_dim={self.embed_dim}, hidden_size={self.hidden_size}"
        )


def _check_range(name: str, values: Tensor, last: int) -> None:
    bad = values[(values < 0) | (values > last)]
    if len(bad):
        raise ValueError(f"{name}: expected values from 0 to {last}, got {int(bad[0])}")


def checked_crayon_index(crayon_index: Tensor, rows: int) -> Tensor:
    """Return a batch's crayon index with no entry that is no row of its sample.

    Args:
        crayon_index: int32 or int64 ``[B, P]``: per image token the row, local to its sample; -1 =
            none.
        rows: How many rows each sample has, padding included.

    Returns:
        ``[B, P]``: the index itself where all is well.

    Raises:
        ValueError: on the CPU, naming the first bad entry; elsewhere, where raising would wait for
            the device, a bad entry becomes -1 and ``collavo_kernels.check()`` reports it.

    Example:
        >>> import torch
        >>> checked_crayon_index(torch.tensor([[0, 1, 5]]), 2)
        Traceback (most recent call last):
            ...
        ValueError: crayon_index: expected entries from -1 to 1 (a sample has 2 rows), got 5 at ...
    """
    return checked_index(crayon_index, rows, "crayon_index")
