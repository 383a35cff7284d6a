"""Patterns on sequences of a batch, for their real tokens side by side in one row."""

from __future__ import annotations

import numpy as np
import torch

from . import patterns
from .pattern import And, Not, Or, Pattern
from .patterns import Documents

__all__ = ["documents", "is_packable", "packed"]


def packed(pattern: Pattern, sequence: np.ndarray, column: np.ndarray, rows: int) -> Pattern | None:
    """A pattern on positions in sequences, for rows that are the real tokens of these.

    Between rows of different sequences it says nothing: combine it with `documents`.

    Args:
        sequence, column: of each row, in order, the sequence and its position there.
        rows: how many there are, with those at the end that are nobody's.

    Returns None for a pattern that draws, or holds a tensor or function, and where padding in the
    middle of a sequence changes distances that matter.

    >>> packed(patterns.Longformer(2), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 4).patterns
    (SlidingWindow(left=2, right=2), GlobalTokens(tokens=(0, 2)))
    """
    # By the very class: what a subclass changes is not known here.
    kind = type(pattern)
    if kind is Not:
        part = packed(pattern.pattern, sequence, column, rows)
        return None if part is None else Not(part)
    if kind is patterns.Longformer:
        return packed(pattern.composed, sequence, column, rows)
    if kind in (And, Or):
        parts = [packed(part, sequence, column, rows) for part in pattern.patterns]
        return None if any(part is None for part in parts) else kind(tuple(parts))
    if kind in (patterns.Full, patterns.Causal):
        return pattern
    if kind in (patterns.SlidingWindow, patterns.Dilated):
        gaps = (np.diff(column) != 1) & (np.diff(sequence) == 0)
        return None if gaps.any() else pattern
    if kind is patterns.Chunked:
        chunk = column // pattern.size
        begins = (np.diff(sequence, prepend=-1) != 0) | (np.diff(chunk, prepend=-1) != 0)
        return documents(np.cumsum(begins), rows)
    if kind in (patterns.GlobalKeys, patterns.GlobalTokens):
        return kind(tuple(np.flatnonzero(np.isin(column, pattern.tokens)).tolist()))
    return None


def is_packable(pattern: Pattern) -> bool:
    """Whether `packed` knows a pattern where no padding lies in the middle of a sequence."""
    first = np.zeros(1, np.int64)
    return packed(pattern, first, first, 1) is not None


def documents(sequence: np.ndarray, rows: int) -> Documents:
    """Rows of a sequence see each other; those up to `rows`, behind the last, are nobody's."""
    ids = np.full(rows, -1, np.int64)
    ids[: len(sequence)] = sequence
    return Documents(torch.from_numpy(ids))
