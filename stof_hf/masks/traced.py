"""Masks made while torch.compile or torch.export traces a model.

Building a SparseMask runs host code on concrete numbers, which a graph cannot hold. A TracedMask
holds what a graph can: the pattern as text, from which the op finds or builds the SparseMask when
the graph runs, or the allowed pairs as a tensor computed in the graph.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F

from . import bits
from .bits import TILE
from .pattern import Pattern


class TracedMask:
    """A mask [B, 1, Sq, Sk] inside a graph; immutable.

    Args:
        shape: (B, Hm, Sq, Sk).
        pattern: `Pattern.to_json()` as text, or None where `allowed` says it all.
        allowed: bool [Bm, Hm, Sq, Sk], or None. Padding is in `kv_valid` alone.
        kv_valid: int64 [B, ceil(Sk/64)], the padding's bits, or None.
        q_offset: absolute position of the first query: an int, or an int64 tensor [1].
        kv_offset: absolute position of the first key.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        pattern: str | None,
        allowed: torch.Tensor | None = None,
        kv_valid: torch.Tensor | None = None,
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
    ):
        self.shape, self.pattern, self.allowed, self.kv_valid = shape, pattern, allowed, kv_valid
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self._structure: list[torch.Tensor] | None = None

    def contiguous(self) -> TracedMask:
        return self

    def to(self, *args: object, **kwargs: object) -> TracedMask:
        return self

    def op_arguments(self) -> tuple[Any, ...]:
        """The mask as the op takes it: (pattern, tensors, geometry, kv_valid, row_start,
        col_start)."""
        q_len, kv_len = self.shape[2:]
        if self.allowed is not None:
            if self._structure is None:
                self._structure = structure_of(self.allowed)
            return "", self._structure, [q_len, kv_len, 0, 0], self.kv_valid, None, None
        if isinstance(self.q_offset, torch.Tensor):
            geometry, start = [q_len, kv_len, 0, self.kv_offset], self.q_offset
        else:
            geometry, start = [q_len, kv_len, self.q_offset, self.kv_offset], None
        return self.pattern, [], geometry, self.kv_valid, start, None


def structure_of(allowed: torch.Tensor) -> list[torch.Tensor]:
    """The canonical tensors of a dense mask, computed without reading it.

    Takes bool [Bm, Hm, Sq, Sk]. Returns pattern_id, row_ptr, run_col, run_len, run_bits, tile_bits
    as in `SparseMask`, with every tile stored as a partial one, empty tiles included: which tiles
    are empty or full is not known before the graph runs.
    """
    batch, heads, q_len, kv_len = allowed.shape
    device = allowed.device
    words = bits.pack(F.pad(allowed, (0, -kv_len % TILE, 0, -q_len % TILE)))
    tile_rows, tile_cols = words.shape[2] // TILE, words.shape[3]
    words = words.view(-1, TILE, tile_cols).transpose(1, 2).contiguous().view(-1, TILE)
    patterns = batch * heads
    runs = patterns * tile_rows * tile_cols
    int32 = {"dtype": torch.int32, "device": device}
    row = torch.arange(patterns, **int32)[:, None] * tile_rows + torch.arange(
        tile_rows + 1, **int32
    )
    return [
        torch.arange(patterns, **int32).view(batch, heads),
        row * tile_cols,
        torch.arange(runs, **int32) % tile_cols,
        torch.ones(runs, **int32),
        torch.arange(runs, **int32),
        words,
    ]


def both(a: str, b: str) -> str:
    """The JSON text of the conjunction of two patterns given as JSON text."""
    return f'{{"type": "And", "patterns": [{a}, {b}]}}'


def text_of(pattern: Pattern) -> str:
    """`pattern.to_json()` as text; MaskError for a pattern that has no JSON form."""
    return json.dumps(pattern.to_json(), sort_keys=True)
