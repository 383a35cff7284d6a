"""Sets of tile intervals, one set a row, as the builder's closed-form view of a mask.

An `Intervals` holds for N rows up to K disjoint half-open intervals [lo, hi) in ascending order,
as two int64 arrays [N, K]; an empty interval has lo >= hi. Set operations are sweeps over the
sorted endpoints, vectorised over the rows.
"""

from __future__ import annotations

import numpy as np


class Intervals:
    """N interval sets over the tiles [0, limit)."""

    def __init__(self, lo: np.ndarray, hi: np.ndarray, limit: int):
        lo, hi = np.minimum(np.maximum(lo, 0), limit), np.minimum(np.maximum(hi, 0), limit)
        if lo.ndim == 1:
            lo, hi = lo[:, None], hi[:, None]
        self.lo, self.hi, self.limit = lo, hi, limit

    @classmethod
    def all(cls, rows: int, limit: int) -> Intervals:
        return cls(np.zeros(rows, np.int64), np.full(rows, limit, np.int64), limit)

    @classmethod
    def none(cls, rows: int, limit: int) -> Intervals:
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.int64), limit)

    def _covered(self, others: list[Intervals], need: int) -> Intervals:
        """Where at least `need` of the sets (self and others) hold."""
        lo = np.concatenate([s.lo for s in (self, *others)], axis=1)
        hi = np.concatenate([s.hi for s in (self, *others)], axis=1)
        # One sort of 2 * endpoint + (1 at ends) orders the endpoints and says which kind each is.
        events = np.concatenate([2 * lo, 2 * np.maximum(lo, hi) + 1], axis=1)
        events.sort(axis=1)
        points, ends = events >> 1, events & 1
        depth = np.cumsum(1 - 2 * ends, axis=1)
        keep = (depth[:, :-1] >= need) & (points[:, :-1] < points[:, 1:])
        return self._compact(points[:, :-1], points[:, 1:], keep)

    def _compact(self, lo: np.ndarray, hi: np.ndarray, keep: np.ndarray) -> Intervals:
        """Drop what is not kept of ascending intervals; the gaps end as empty ones at the limit."""
        width = max(1, int(keep.sum(axis=1).max(initial=0)))
        lo, hi = np.where(keep, lo, self.limit), np.where(keep, hi, self.limit)
        lo.sort(axis=1)
        hi.sort(axis=1)
        return Intervals(lo[:, :width], hi[:, :width], self.limit)

    def __and__(self, other: Intervals) -> Intervals:
        return self._covered([other], 2)

    def __or__(self, other: Intervals) -> Intervals:
        return self._covered([other], 1)

    def __invert__(self) -> Intervals:
        merged = self._compact(self.lo, self.hi, self.lo < self.hi)
        n = len(merged.lo)
        starts = np.concatenate([np.zeros((n, 1), np.int64), merged.hi], axis=1)
        ends = np.concatenate([merged.lo, np.full((n, 1), self.limit, np.int64)], axis=1)
        return self._compact(starts, ends, starts < ends)

    def minus(self, other: Intervals) -> Intervals:
        return self & ~other

    def contains(self, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """Whether tile[m] lies in the set of row[m]; bool [M]."""
        out = np.zeros(len(row), bool)
        for k in range(self.lo.shape[1]):
            out |= (self.lo[row, k] <= tile) & (tile < self.hi[row, k])
        return out

    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All non-empty intervals as (row, lo, length), rows ascending."""
        row, k = np.nonzero(self.lo < self.hi)
        return row, self.lo[row, k], self.hi[row, k] - self.lo[row, k]

    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """All tiles of all sets as (row, tile)."""
        row, lo, length = self.pieces()
        total = int(length.sum())
        starts = np.cumsum(length) - length
        within = np.arange(total) - np.repeat(starts, length)
        return np.repeat(row, length), np.repeat(lo, length) + within
