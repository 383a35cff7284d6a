"""A bias that only depends on how far a key is from a query, as T5's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedError

__all__ = ["Bias", "RelativeBias", "stored"]

#: A query's row of a table begins anywhere: so many copies, each moved by one more element, let it
#: begin at a multiple of them in one of the copies.
COPIES = 8
#: Elements that the length of a copy is a multiple of.
_STEP = 16


class RelativeBias:
    """A bias of scores by distance, which takes 8 (Sq + Sk) numbers a head instead of Sq * Sk.

    Give it to `stof_hf.attention` as `bias`. GPU kernels read a table, of which they hold eight
    copies, so that each row of keys begins at a multiple of eight elements in one of them; where
    gradients are recorded, under torch.compile and on CPUs the bias is made (`dense`).

    Args:
        table: [B or 1, H or 1, Sq + Sk - 1]. Key j of query i gets table[..., q_len - 1 + j - i].
            It is copied: what is written to it later does not count.
        q_len: Sq.

    Raises UnsupportedError for another shape.

    >>> bias = RelativeBias(torch.arange(4.0).view(1, 1, 4), 2)
    >>> bias.dense()
    tensor([[[[1., 2., 3.],
              [0., 1., 2.]]]])
    """

    ndim = 4

    def __init__(self, table: torch.Tensor, q_len: int):
        if table.ndim != 3 or not 0 < q_len <= table.shape[2]:
            raise UnsupportedError(
                f"a table {list(table.shape)} for {q_len} queries: it must be [B or 1, H or 1, "
                "Sq + Sk - 1]"
            )
        width = _width(table.shape[2])
        wide = F.pad(table, (0, width + COPIES - 1 - table.shape[2]))
        self._set(wide.unfold(2, width, 1).contiguous(), q_len, table.shape[2])

    @classmethod
    def of_distances(
        cls, function: Callable[[torch.Tensor], torch.Tensor], q_len: int, kv_len: int,
        device: torch.device,
    ) -> RelativeBias:  # fmt: skip
        """The bias function(k - q), the same for all sequences.

        Args:
            function: int64 [8, n] distances -> [8, n, H]; also of distances that do not occur.

        >>> slopes = torch.tensor([0.5, 2.0])
        >>> bias = RelativeBias.of_distances(lambda d: d[..., None] * slopes, 2, 2, slopes.device)
        >>> bias.dense()[0, 1]
        tensor([[ 0.,  2.],
                [-2.,  0.]])
        """
        width = _width(q_len + kv_len - 1)
        distances = torch.arange(1 - q_len, 1 - q_len + width + COPIES - 1, device=device)
        copies = function(distances.unfold(0, width, 1)).permute(2, 0, 1)[None].contiguous()
        out = cls.__new__(cls)
        out._set(copies, q_len, q_len + kv_len - 1)
        return out

    def _set(self, copies: torch.Tensor, q_len: int, most: int) -> None:
        #: [B or 1, H or 1, 8, n]: element t of copy r is element r + t of the table.
        self.copies = copies
        self.table = copies[:, :, 0, :most]
        self.shape = torch.Size((*copies.shape[:2], q_len, most - q_len + 1))
        self.dtype, self.device = copies.dtype, copies.device
        #: The table from the first key of the first query on, for kernels that read `stride`.
        self.first = self.table[:, :, q_len - 1 :]

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


Bias = torch.Tensor | RelativeBias


def _width(most: int) -> int:
    """The length of a copy of a table of so many elements."""
    return -(-most // _STEP) * _STEP


def stored(bias: Bias | None) -> torch.Tensor | None:
    """The tensor behind a bias."""
    return bias.table if isinstance(bias, RelativeBias) else bias
