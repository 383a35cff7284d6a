"""Sets of tile intervals, one set a row, as the builder's closed-form view of a mask.

An `Intervals` holds for N rows up to K disjoint half-open intervals [lo, hi), as two int32 arrays
[N, K]; an empty interval has lo >= hi. Set operations are sweeps over the sorted endpoints,
vectorised over the rows.
"""

from __future__ import annotations

import numpy as np

#: Up to this many pairs of intervals a row are intersected one by one rather than by a sweep.
_FEW = 32


class Intervals:
    """N interval sets over the tiles [0, limit)."""

    def __init__(self, lo: np.ndarray, hi: np.ndarray, limit: int):
        lo, hi = (
            np.minimum(np.maximum(x, 0), limit).astype(np.int32, copy=False) for x in (lo, hi)
        )
        if lo.ndim == 1:
            lo, hi = lo[:, None], hi[:, None]
        self.lo, self.hi, self.limit = lo, hi, limit
        # Whether the intervals are in order, empty ones last.
        self._ascending = False

    @classmethod
    def all(cls, rows: int, limit: int) -> Intervals:
        return cls(np.zeros(rows, np.int32), np.full(rows, limit, np.int32), limit)

    @classmethod
    def none(cls, rows: int, limit: int) -> Intervals:
        return cls(np.zeros(rows, np.int32), np.zeros(rows, np.int32), limit)

    def _covered(self, other: Intervals, need: int) -> Intervals:
        """Where at least `need` of the two sets hold."""
        lo = np.concatenate([self.lo, other.lo], axis=1)
        hi = np.concatenate([self.hi, other.hi], axis=1)
        # One sort of 2 * endpoint + (1 at ends) orders the endpoints and says which kind each is.
        events = np.concatenate([2 * lo, 2 * np.maximum(lo, hi) + 1], axis=1)
        events.sort(axis=1)
        points, ends = events >> 1, events & 1
        depth = np.cumsum(1 - 2 * ends, axis=1, dtype=np.int32)
        keep = (depth[:, :-1] >= need) & (points[:, :-1] < points[:, 1:])
        return self._compact(points[:, :-1], points[:, 1:], keep)

    def _compact(self, lo: np.ndarray, hi: np.ndarray, keep: np.ndarray) -> Intervals:
        """Drop what is not kept of ascending intervals; the gaps end as empty ones at the limit."""
        count = np.count_nonzero(keep, axis=1)
        width = max(1, int(count.max(initial=0)))
        held = np.arange(width) < count[:, None]
        out = np.full((2, len(keep), width), self.limit, np.int32)
        out[0, held], out[1, held] = lo[keep], hi[keep]
        made = Intervals(out[0], out[1], self.limit)
        made._ascending = True
        return made

    def ascending(self) -> Intervals:
        """The same sets with their intervals in order, empty ones last."""
        return self if self._ascending else self._covered(self.none(len(self.lo), self.limit), 1)

    def below(self, limit: int) -> Intervals:
        """The tiles below `limit`, in order."""
        out = self.ascending()
        cut = Intervals(np.minimum(out.lo, limit), np.minimum(out.hi, limit), self.limit)
        cut._ascending = True
        return cut

    def __and__(self, other: Intervals) -> Intervals:
        pairs = self.lo.shape[1] * other.lo.shape[1]
        if pairs > _FEW:
            return self._covered(other, 2)
        lo = np.maximum(self.lo[:, :, None], other.lo[:, None]).reshape(-1, pairs)
        hi = np.minimum(self.hi[:, :, None], other.hi[:, None]).reshape(-1, pairs)
        held = (lo < hi).any(axis=0)
        held[0] = True
        return Intervals(lo[:, held], hi[:, held], self.limit)

    def __or__(self, other: Intervals) -> Intervals:
        return self._covered(other, 1)

    def or_all(self, rows: np.ndarray) -> Intervals:
        """The one set that this holds, for each of N rows; all tiles where `rows`, bool [N]."""
        one = self.ascending()
        lo, hi = (np.repeat(x, len(rows), axis=0) for x in (one.lo, one.hi))
        lo[rows], hi[rows] = self.limit, self.limit
        lo[rows, 0] = 0
        out = Intervals(lo, hi, self.limit)
        out._ascending = True
        return out

    def __invert__(self) -> Intervals:
        merged = self.ascending()
        edge = np.zeros((len(merged.lo), 1), np.int32)
        starts = np.concatenate([edge, merged.hi], axis=1)
        ends = np.concatenate([merged.lo, edge + self.limit], axis=1)
        # A gap of length 0 is an empty interval wherever it stands.
        return Intervals(starts, ends, self.limit)

    def minus(self, other: Intervals) -> Intervals:
        return self & ~other

    def contains(self, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """Whether tile[m] lies in the set of row[m]; bool [M]."""
        out = np.zeros(len(row), bool)
        for k in range(self.lo.shape[1]):
            out |= (self.lo[row, k] <= tile) & (tile < self.hi[row, k])
        return out

    def pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All non-empty intervals as (row, lo, length) in int64, rows ascending."""
        row, k = np.nonzero(self.lo < self.hi)
        lo = self.lo[row, k].astype(np.int64)
        return row, lo, self.hi[row, k] - lo

    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """All tiles of all sets as (row, tile)."""
        row, lo, length = self.pieces()
        total = int(length.sum())
        starts = np.cumsum(length) - length
        within = np.arange(total) - np.repeat(starts, length)
        return np.repeat(row, length), np.repeat(lo, length) + within
