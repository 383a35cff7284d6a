"""A bias that only depends on how far a key is from a query, as T5's."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedError

__all__ = ["RelativeBias", "stored"]


class RelativeBias:
    """A bias of scores by distance, which takes Sq + Sk - 1 numbers a head instead of Sq * Sk.

    Give it to `stof_hf.attention` as `bias`. GPU kernels read the table, as a tensor whose rows
    begin one element before each other; where gradients are recorded, under torch.compile and on
    CPUs the bias is made (`dense`).

    Args:
        table: [B or 1, H or 1, Sq + Sk - 1]. Key j of query i gets table[..., q_len - 1 + j - i].
        q_len: Sq.

    Raises UnsupportedError for another shape, and where the last dimension's stride is not 1.

    >>> bias = RelativeBias(torch.arange(4.0).view(1, 1, 4), 2)
    >>> bias.dense()
    tensor([[[[1., 2., 3.],
              [0., 1., 2.]]]])
    """

    ndim = 4

    def __init__(self, table: torch.Tensor, q_len: int):
        if table.ndim != 3 or not 0 < q_len <= table.shape[2] or table.stride(2) != 1:
            raise UnsupportedError(
                f"a table {list(table.shape)} for {q_len} queries: it must be [B or 1, H or 1, "
                "Sq + Sk - 1] with adjacent elements in its rows"
            )
        self.table = table
        self.shape = torch.Size((*table.shape[:2], q_len, table.shape[2] - q_len + 1))
        self.dtype, self.device = table.dtype, table.device
        #: The table from the first key of the first query on.
        self.first = table[:, :, q_len - 1 :]

    def stride(self) -> tuple[int, int, int, int]:
        """Of `first`, for indices [b, h, i, j]."""
        return *self.table.stride()[:2], -1, 1

    def dense(self) -> torch.Tensor:
        """[B or 1, H or 1, Sq, Sk]."""
        return self.table.unfold(2, self.shape[3], 1).flip(2)

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.dense()[key]

    def __add__(self, other: torch.Tensor) -> torch.Tensor:
        return self.dense() + other


def stored(bias: torch.Tensor | RelativeBias | None) -> torch.Tensor | None:
    """The tensor behind a bias."""
    return bias.table if isinstance(bias, RelativeBias) else bias
