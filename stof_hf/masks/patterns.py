"""The patterns: who may attend to whom.

Every pattern takes absolute positions and combines with `&`, `|` and `~`. "Window" and "size" count
tokens. Example:

>>> from stof_hf.masks.patterns import Causal, Longformer
>>> sparse = Longformer(window=256, global_tokens=(0,)) & Causal()
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import MaskError
from .bits import TILE, words_per
from .intervals import Intervals
from .pattern import And, Index, Not, Or, Pattern, Rows, positions, whole
from .random_blocks import RandomBlocks

__all__ = [
    "And", "BigBird", "Causal", "Chunked", "Custom", "Dense", "Dilated", "Documents", "Full",
    "GlobalTokens", "Longformer", "Not", "Or", "Pattern", "PrefixLM", "RandomBlocks",
    "SlidingWindow",
]  # fmt: skip


_serial = itertools.count()


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
class GlobalTokens(Pattern):
    """A token of `tokens` attends to all keys and is attended to by all queries."""

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

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return self._holds(q) | self._holds(k)

    def _rows(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(holds a global query, holds only global queries) of each tile row."""
        some, every = np.zeros(rows.count, bool), np.zeros(rows.count, bool)
        for a, b in self.ranges:
            some |= (rows.first < b) & (rows.last >= a)
            every |= (rows.first >= a) & (rows.last < b)
        return some, every

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        some, every = self._rows(rows)
        touched = Intervals(np.zeros(rows.count, np.int64), some * rows.tiles, rows.tiles)
        full = Intervals(np.zeros(rows.count, np.int64), every * rows.tiles, rows.tiles)
        if self.ranges:
            a, b = np.array(self.ranges).T
            shape = (rows.count, len(a))
            lo, hi = np.broadcast_to(a, shape), np.broadcast_to(b, shape)
            touched, full = touched | rows.touched(lo, hi), full | rows.inside(lo, hi)
        return touched, full

    def tile_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        some, _ = self._rows(rows)
        column = np.zeros(rows.tiles, np.int64)
        for a, b in self.ranges:
            lo, hi = max(a - rows.k0, 0) // TILE, words_per(min(b - rows.k0, rows.kv_len))
            if lo < hi:
                column[lo:hi] = np.arange(lo, hi) + 1
        return np.where(some[row], row + 1, 0) * (rows.tiles + 1) + column[tile]


class _Composed(Pattern):
    """A pattern that is a combination of others under a name of its own."""

    def parts(self) -> Pattern:
        raise NotImplementedError

    @cached_property
    def _parts(self) -> Pattern:
        return self.parts()

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        return self._parts(b, h, q, k)

    def bind(self, kv_len: int) -> Pattern:
        bound = self._parts.bind(kv_len)
        return self if bound is self._parts else bound

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        return rows.structure_of(self._parts)

    def exact_key(self, rows: Rows, row: np.ndarray, tile: np.ndarray) -> np.ndarray:
        return self._parts.exact_key(rows, row, tile)


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
        object.__setattr__(self, "length_free", self._parts.length_free)

    def parts(self) -> Pattern:
        local = SlidingWindow(self.window, self.window) | GlobalTokens(self.global_tokens)
        return local | RandomBlocks(self.random_blocks, self.block_size, self.seed)


@dataclass(frozen=True, eq=False)
class Documents(Pattern):
    """Packed documents: a token attends to the tokens of its own document.

    Args:
        ids: document number of each position, a tensor or nested sequence [S] or [B, S];
            a negative number marks padding, which nobody attends to and which attends to nobody.

    Combine with `Causal()` for language models. Ids on a GPU are copied to the host once.
    """

    ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ids = torch.as_tensor(self.ids).detach().to("cpu", torch.int64)
        if ids.ndim not in (1, 2) or ids.numel() == 0:
            raise MaskError(
                f"document ids must be [S] or [B, S] and not empty, not {list(ids.shape)}"
            )
        ids = ids.reshape(-1, ids.shape[-1])
        object.__setattr__(self, "ids", tuple(map(tuple, ids.tolist())))
        object.__setattr__(self, "batch", ids.shape[0] if ids.shape[0] > 1 else None)
        object.__setattr__(self, "_table", {torch.device("cpu"): ids})

    @classmethod
    def from_position_ids(cls, position_ids: Any) -> Documents:
        """Documents of packed inputs: one begins wherever the position does not go up by one.

        >>> import torch
        >>> Documents.from_position_ids(torch.tensor([0, 1, 2, 0, 1])).ids
        ((0, 0, 0, 1, 1),)
        """
        pos = torch.as_tensor(position_ids).detach().to("cpu", torch.int64)
        begins = torch.zeros_like(pos)
        begins[..., 1:] = pos[..., 1:] != pos[..., :-1] + 1
        return cls(begins.cumsum(-1))  # type: ignore[arg-type]

    def _ids_on(self, device: torch.device) -> torch.Tensor:
        table: dict[torch.device, torch.Tensor] = self._table  # type: ignore[attr-defined]
        if device not in table:
            table[device] = table[torch.device("cpu")].to(device)
        return table[device]

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        ids = self._ids_on(q.device)
        n = ids.shape[1]
        b = b if self.batch else 0
        of_q, of_k = ids[b, q.clamp(0, n - 1)], ids[b, k.clamp(0, n - 1)]
        # Different numbers for nobody's queries and keys leave one comparison of all pairs.
        of_q = of_q.clamp(min=-1).masked_fill(q >= n, -1)
        return of_q == of_k.masked_fill((of_k < 0) | (k >= n), -2)

    @cached_property
    def fingerprint(self) -> str:
        ids = self._table[torch.device("cpu")].numpy()  # type: ignore[attr-defined]
        text = f"Documents{ids.shape}".encode() + ids.tobytes()
        return hashlib.sha256(text).hexdigest()[:24]

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First and last + 1 key that each query sees, [B, S], if documents are contiguous."""
        ids = self._table[torch.device("cpu")].numpy()  # type: ignore[attr-defined]
        batch, n = ids.shape
        change = np.ones((batch, n), bool)
        change[:, 1:] = ids[:, 1:] != ids[:, :-1]
        for row in range(batch):
            heads = ids[row][change[row] & (ids[row] >= 0)]
            if len(np.unique(heads)) != len(heads):
                return None
        at = np.arange(n)
        first = np.maximum.accumulate(np.where(change, at, 0), axis=1)
        ends = np.where(np.roll(change, -1, axis=1) | (at == n - 1), at + 1, n)
        last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
        return first, last

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        if self._bounds is None:
            return rows.all(), rows.none()
        first, last = self._bounds
        ids = self._table[torch.device("cpu")].numpy()  # type: ignore[attr-defined]
        n = ids.shape[1]
        b = rows.batch if self.batch else np.zeros_like(rows.batch)
        q0, q1 = np.clip(rows.first, 0, n - 1), np.clip(rows.last, 0, n - 1)
        padded = np.concatenate([np.zeros((len(ids), 1), np.int64), np.cumsum(ids < 0, 1)], 1)
        whole = (rows.last < n) & (padded[b, q1 + 1] == padded[b, q0])
        touched = rows.touched(first[b, q0], last[b, q1])
        return touched, rows.inside(first[b, q1], np.where(whole, last[b, q0], 0))


@dataclass(frozen=True, eq=False)
class Custom(Pattern):
    """A mask function f(b, h, q, k) -> bool of integer tensors that broadcast against each other.

    Args:
        function: the mask function; evaluated tile by tile, never on all of S x S at once.
        batch, heads: number of different masks along these dimensions if the function reads b or h.
        key: a string that identifies the function's values, for caching; by default the identity of
            the function object.

    Has no JSON form.
    """

    function: Callable[[Index, Index, Index, Index], torch.Tensor]
    batch: int | None = None
    heads: int | None = None
    key: str | None = None

    serializable = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise MaskError(f"Custom needs a mask function f(b, h, q, k), not {self.function!r}")
        for name in ("batch", "heads"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        out = self.function(b, h, q, k)
        if not isinstance(out, torch.Tensor) or out.dtype != torch.bool:
            got = out.dtype if isinstance(out, torch.Tensor) else type(out).__name__
            raise MaskError(f"a mask function must return a bool tensor, this one returned {got}")
        return out

    @cached_property
    def fingerprint(self) -> str:
        key = self.key or f"object {id(self.function)}"
        text = f"Custom({key},{self.batch},{self.heads})"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, eq=False)
class Dense(Pattern):
    """A dense bool tensor [Sq, Sk] or [B or 1, H or 1, Sq, Sk], True where attention is allowed.

    Identified by the tensor's identity and version, so that its data are read only when a mask is
    built; a tensor made under inference_mode has no version, and each pattern of it is different.
    Has no JSON form.
    """

    mask: torch.Tensor = field(repr=False)

    serializable = False

    def __post_init__(self) -> None:
        m = self.mask
        if not isinstance(m, torch.Tensor):
            raise MaskError(f"a dense mask must be a tensor, not {type(m).__name__}")
        if m.dtype != torch.bool:
            raise MaskError(
                f"a dense mask must hold booleans, True where attention is allowed, not {m.dtype}: "
                "of an additive mask, give mask == 0"
            )
        if m.ndim not in (2, 4) or m.numel() == 0:
            raise MaskError(
                "a dense mask must be [Sq, Sk] or [B, H, Sq, Sk] and not empty, not "
                f"{list(m.shape)}"
            )
        # Inference tensors do not count their versions: no two of their patterns are equal.
        version = f"inference {next(_serial)}" if m.is_inference() else m._version
        object.__setattr__(self, "_version", version)
        if m.ndim == 4:
            object.__setattr__(self, "batch", m.shape[0] if m.shape[0] > 1 else None)
            object.__setattr__(self, "heads", m.shape[1] if m.shape[1] > 1 else None)

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        mask = self.mask[None, None] if self.mask.ndim == 2 else self.mask
        sq, sk = mask.shape[-2:]
        inside = (q < sq) & (k < sk)
        # Where the devices differ, tile indices travel rather than the whole mask.
        index = [
            x.to(mask.device) if isinstance(x, torch.Tensor) else x
            for x in (
                b if self.batch else 0, h if self.heads else 0,
                q.clamp(max=sq - 1), k.clamp(max=sk - 1),
            )
        ]  # fmt: skip
        return mask[tuple(index)].to(q.device) & inside

    @cached_property
    def fingerprint(self) -> str:
        text = f"Dense({id(self.mask)},{self._version})"  # type: ignore[attr-defined]
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def ranges(*bounds: tuple[int, int]) -> Sequence[int]:
    """Positions of several half-open ranges, for `global_tokens`.

    >>> ranges((0, 2), (8, 10))
    (0, 1, 8, 9)
    """
    return tuple(t for a, b in bounds for t in range(a, b))
