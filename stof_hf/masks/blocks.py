"""FlexAttention's BlockMask as a Pattern."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .bits import TILE
from .intervals import Intervals
from .pattern import Index, Pattern, Rows


@dataclass(frozen=True, eq=False)
class BlockMaskPattern(Pattern):
    """The elements that a BlockMask allows: its full blocks, and its mask_mod in partial ones."""

    block_mask: Any = field(repr=False)

    serializable = False

    def __post_init__(self) -> None:
        batch, heads = self.block_mask.kv_num_blocks.shape[:2]
        object.__setattr__(self, "batch", batch if batch > 1 else None)
        object.__setattr__(self, "heads", heads if heads > 1 else None)

    @cached_property
    def _lists(self) -> list[np.ndarray]:
        """Partial and full key blocks of each block row, int64 [B, H, rows, blocks], -1: none."""
        bm = self.block_mask
        out = []
        for count, index in (
            (bm.kv_num_blocks, bm.kv_indices),
            (bm.full_kv_num_blocks, bm.full_kv_indices),
        ):
            if count is None:
                out.append(np.zeros((*bm.kv_num_blocks.shape, 0), np.int64))
                continue
            used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
            out.append(torch.where(used, index, -1).cpu().numpy().astype(np.int64))
        return out

    @cached_property
    def _kind(self) -> torch.Tensor:
        """0, 1 (partial) or 2 (full) for each block, uint8 [B, H, rows, cols]; not synchronised."""
        bm = self.block_mask
        cols = -(-bm.seq_lengths[1] // bm.BLOCK_SIZE[1])
        count = bm.kv_num_blocks
        kind = torch.zeros((*count.shape, cols + 1), dtype=torch.uint8, device=count.device)
        for value, count, index in (
            (1, bm.kv_num_blocks, bm.kv_indices),
            (2, bm.full_kv_num_blocks, bm.full_kv_indices),
        ):
            if count is not None:
                used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
                kind.scatter_(3, torch.where(used, index, cols).long(), value)
        return kind[..., :-1]

    def tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`structure` of all tiles, on the BlockMask's device and without synchronising: which may
        hold a True and which are surely full, bool [B, H, tile rows, tile columns]."""
        least = most = self._kind
        lengths = self.block_mask.seq_lengths
        for dim, size, length in zip((2, 3), self.block_mask.BLOCK_SIZE, lengths, strict=True):
            least = _over_tiles(least, dim, size, length, torch.minimum)
            most = _over_tiles(most, dim, size, length, torch.maximum)
        full = least == 2
        full[..., lengths[1] // TILE :] = False
        return most > 0, full

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        rows, cols = self.block_mask.BLOCK_SIZE
        b, h = (b if self.batch else b * 0), (h if self.heads else h * 0)
        kind = self._kind[b, h, q // rows, k // cols]
        return (kind == 2) | ((kind == 1) & self.block_mask.mask_mod(b, h, q, k))

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        size_q, size_k = self.block_mask.BLOCK_SIZE
        b = rows.batch if self.batch else np.zeros_like(rows.batch)
        h = rows.head if self.heads else np.zeros_like(rows.head)
        top, bottom = rows.first // size_q, rows.last // size_q
        touched, surely = rows.none(), rows.none()
        for step in range(int((bottom - top).max(initial=0)) + 1):
            block = np.minimum(top + step, bottom)
            for full, lists in enumerate(self._lists):
                index = lists[b, h, block]
                lo = np.where(index < 0, 0, index * size_k)
                hi = np.where(index < 0, 0, (index + 1) * size_k)
                if index.shape[1]:
                    touched = touched | rows.touched(lo, hi)
                    if full:
                        whole = (top == bottom)[:, None]
                        surely = surely | rows.inside(lo, np.where(whole, hi, 0))
        return touched, surely

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"BlockMask({id(self.block_mask)})".encode()).hexdigest()[:24]


def _over_tiles(
    kind: torch.Tensor, dim: int, size: int, length: int, combine: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Blocks of `size` combined to tiles along a dimension, up to `length` positions."""
    begin = torch.arange(0, length, TILE, device=kind.device)
    first, last = begin // size, ((begin + TILE).clamp(max=length) - 1) // size
    blocks = 1 if size % TILE == 0 else (TILE - 2) // size + 2
    out = kind.index_select(dim, first)
    for step in range(1, blocks):
        out = combine(out, kind.index_select(dim, torch.minimum(first + step, last)))
    return out
