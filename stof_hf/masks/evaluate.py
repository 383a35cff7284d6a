"""Mask functions evaluated on single tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import MaskError
from . import bits
from .bits import TILE
from .pattern import Pattern


@dataclass(frozen=True)
class Grid:
    """The tiles of a mask, numbered along keys, then queries, then heads, then batch elements."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_offset: int = 0
    kv_offset: int = 0

    @property
    def rows(self) -> int:
        """Tile rows of a batch element's head."""
        return bits.words_per(self.q_len)

    @property
    def columns(self) -> int:
        return bits.words_per(self.kv_len)

    @property
    def count(self) -> int:
        return self.batch * self.heads * self.rows * self.columns


def evaluate(pattern: Pattern, grid: Grid, ids: torch.Tensor) -> torch.Tensor:
    """bool [64, N, 64] of tiles `ids`, int64 [N]: row, tile, column; anything beyond the edges.

    Raises MaskError for a function whose result has another shape than its arguments.
    """
    allowed = pattern(*_indices(grid, ids))
    shape = (TILE, len(ids), TILE)
    try:
        return allowed.expand(shape)
    except RuntimeError as error:
        raise MaskError(
            "a mask function must return what its arguments b, h, q, k broadcast to, here "
            f"{list(shape)}, not {list(allowed.shape)}"
        ) from error


def evaluate_words(pattern: Pattern, grid: Grid, ids: torch.Tensor) -> torch.Tensor:
    """`evaluate` as bits, zero beyond the edges: int64 [N, 64]."""
    _, _, q, k = _indices(grid, ids, clamp=False)
    inside = (q < grid.q_offset + grid.q_len) & (k < grid.kv_offset + grid.kv_len)
    return bits.pack(evaluate(pattern, grid, ids) & inside).squeeze(-1).T.contiguous()


def _indices(grid: Grid, ids: torch.Tensor, clamp: bool = True) -> tuple[torch.Tensor, ...]:
    """b, h, q, k of tiles, which broadcast to [64, N, 64]."""
    lane = torch.arange(TILE, device=ids.device)
    row, column = ids // grid.columns, ids % grid.columns
    pair = row // grid.rows
    q = (row % grid.rows * TILE)[None, :, None] + lane[:, None, None]
    k = (column * TILE)[None, :, None] + lane
    if clamp:
        # A mask function may index tensors of exactly the sequence's length: never ask beyond it.
        q, k = q.clamp(max=grid.q_len - 1), k.clamp(max=grid.kv_len - 1)
    b, h = (pair // grid.heads)[None, :, None], (pair % grid.heads)[None, :, None]
    return b, h, q + grid.q_offset, k + grid.kv_offset
