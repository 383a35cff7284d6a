"""The patterns: who may attend to whom.

Every pattern takes absolute positions and combines with `&`, `|` and `~`. "Window" and "size" count
tokens. Example:

>>> from stof_hf.masks.patterns import Causal, Longformer
>>> sparse = Longformer(window=256, global_tokens=(0,)) & Causal()
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .bits import TILE, words_per
from .documents import Documents
from .given import BlockTable, Custom, Dense
from .intervals import Intervals
from .pattern import And, Index, Not, Or, Pattern, Rows, positions, whole
from .random_blocks import RandomBlocks

__all__ = [
    "And", "BigBird", "BlockTable", "Causal", "Chunked", "Custom", "Dense", "Dilated", "Documents",
    "Full", "GlobalKeys", "GlobalTokens", "Longformer", "Not", "Or", "Pattern", "PrefixLM",
    "RandomBlocks", "SlidingWindow",
]  # fmt: skip


def _diagonal(rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
    return rows.first[row] - rows.k0 - TILE * tile


@dataclass(frozen=True, eq=False)
class Full(Pattern):
    """Every query may attend to every key."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return (q == q) & (k == k)

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        return rows.all(), rows.all()

    def tile_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        return np.zeros_like(row)


@dataclass(frozen=True, eq=False)
class Causal(Pattern):
    """Query q may attend to keys k <= q."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return k <= q

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        start = np.full(rows.count, rows.k0)
        return rows.touched(start, rows.last + 1), rows.inside(start, rows.first + 1)

    tile_key = staticmethod(_diagonal)


@dataclass(frozen=True, eq=False)
class SlidingWindow(Pattern):
    """Query q may attend to keys q - left <= k <= q + right.

    Args:
        left, right: tokens seen before and after the query itself, at least 0.
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        whole("left", self.left)
        whole("right", self.right)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return (k >= q - self.left) & (k <= q + self.right)

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        touched = rows.touched(rows.first - self.left, rows.last + self.right + 1)
        return touched, rows.inside(rows.last - self.left, rows.first + self.right + 1)

    tile_key = staticmethod(_diagonal)


@dataclass(frozen=True, eq=False)
class Dilated(Pattern):
    """Query q may attend to the keys q + i * dilation, |i| <= window (Longformer's dilated window).

    Args:
        window: keys seen on each side, at least 0.
        dilation: distance between them, at least 1.
    """

    window: int
    dilation: int

    def __post_init__(self) -> None:
        whole("window", self.window)
        whole("dilation", self.dilation, 1)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        reach = self.window * self.dilation
        near = (k >= q - reach) & (k <= q + reach)
        return near & ((q - k) % self.dilation == 0)

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        reach = self.window * self.dilation
        return rows.touched(rows.first - reach, rows.last + reach + 1), rows.none()

    tile_key = staticmethod(_diagonal)


@dataclass(frozen=True, eq=False)
class Chunked(Pattern):
    """Query q may attend to the keys of its own chunk of `size` tokens (Llama 4's local layers)."""

    size: int

    def __post_init__(self) -> None:
        whole("size", self.size, 1)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return q // self.size == k // self.size

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        a, b = rows.first // self.size * self.size, rows.last // self.size * self.size
        return rows.touched(a, b + self.size), rows.inside(b, a + self.size)


@dataclass(frozen=True, eq=False)
class PrefixLM(Pattern):
    """Causal, but every query also sees the first `prefix` keys."""

    prefix: int

    def __post_init__(self) -> None:
        whole("prefix", self.prefix)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return (k <= q) | (k < self.prefix)

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        start = np.full(rows.count, rows.k0)
        touched = rows.touched(start, np.maximum(rows.last + 1, self.prefix))
        return touched, rows.inside(start, np.maximum(rows.first + 1, self.prefix))


@dataclass(frozen=True, eq=False)
class _Tokens(Pattern):
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct = sorted(set(positions("tokens", self.tokens)))
        object.__setattr__(self, "tokens", tuple(distinct))

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The tokens as maximal half-open ranges."""
        out: list[list[int]] = []
        for t in self.tokens:
            if out and out[-1][1] == t:
                out[-1][1] = t + 1
            else:
                out.append([t, t + 1])
        return tuple((a, b) for a, b in out)

    def _holds(self, x: Index) -> torch.Tensor:
        held = x < 0
        for a, b in self.ranges:
            held = held | ((x >= a) & (x < b))
        return held

    def _rows(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(tile rows with a query that sees all keys, tile rows with only such queries)."""
        raise NotImplementedError

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        some, every = self._rows(rows)
        lo, hi = np.array(self.ranges or ((0, 0),)).T[:, None]
        return rows.touched(lo, hi).or_all(some), rows.inside(lo, hi).or_all(every)

    def tile_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        some, _ = self._rows(rows)
        column = np.zeros(rows.tiles, np.int64)
        for a, b in self.ranges:
            lo, hi = max(a - rows.k0, 0) // TILE, words_per(min(b - rows.k0, rows.kv_len))
            if lo < hi:
                column[lo:hi] = np.arange(lo, hi) + 1
        return np.where(some[row], row + 1, 0) * (rows.tiles + 1) + column[tile]


class GlobalTokens(_Tokens):
    """A token of `tokens` attends to all keys and is attended to by all queries."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return self._holds(q) | self._holds(k)

    def _rows(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        some, every = np.zeros(rows.count, bool), np.zeros(rows.count, bool)
        for a, b in self.ranges:
            some |= (rows.first < b) & (rows.last >= a)
            every |= (rows.first >= a) & (rows.last < b)
        return some, every


class GlobalKeys(_Tokens):
    """Every query may attend to the keys at `tokens`."""

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return self._holds(k) & (q == q)

    def _rows(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(rows.count, bool), np.zeros(rows.count, bool)


class _Composed(Pattern):
    """A pattern that is a combination of others under a name of its own."""

    def parts(self) -> Pattern:
        raise NotImplementedError

    @cached_property
    def composed(self) -> Pattern:
        return self.parts()

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return self.composed(b, h, q, k)

    def bind(self, kv_len: int) -> Pattern:
        bound = self.composed.bind(kv_len)
        return self if bound is self.composed else bound

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        return rows.structure_of(self.composed)

    def exact_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        return self.composed.exact_key(rows, row, tile)


@dataclass(frozen=True, eq=False)
class Longformer(_Composed):
    """A sliding window and global tokens (Beltagy et al., 2020, arXiv 2004.05150).

    Args:
        window: tokens seen on each side, at least 0 (half of Longformer's `attention_window`).
        global_tokens: positions that see all and are seen by all.
    """

    window: int
    global_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        tokens = positions("global_tokens", self.global_tokens)
        object.__setattr__(self, "global_tokens", tokens)
        whole("window", self.window)

    def parts(self) -> Pattern:
        return SlidingWindow(self.window, self.window) | GlobalTokens(self.global_tokens)


@dataclass(frozen=True, eq=False)
class BigBird(_Composed):
    """Window, global tokens and random blocks (Zaheer et al., 2020, arXiv 2007.14062).

    Args:
        window: tokens seen on each side, at least 0.
        global_tokens: positions that see all and are seen by all.
        random_blocks: key blocks drawn for each block of queries, without repetition.
        block_size: tokens in such a block.
        seed: of the draw; equal seeds draw equal blocks on every device.

    Which blocks are drawn depends on the number of keys, as in the paper. For generation, where the
    number grows, combine `RandomBlocks(..., causal=True)` with the other parts instead.
    """

    window: int
    global_tokens: tuple[int, ...] = (0,)
    random_blocks: int = 3
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        tokens = positions("global_tokens", self.global_tokens)
        object.__setattr__(self, "global_tokens", tokens)
        whole("window", self.window)
        object.__setattr__(self, "length_free", self.composed.length_free)

    def parts(self) -> Pattern:
        local = SlidingWindow(self.window, self.window) | GlobalTokens(self.global_tokens)
        return local | RandomBlocks(self.random_blocks, self.block_size, self.seed)
