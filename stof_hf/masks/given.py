"""Patterns given by the caller element by element: as a function, a tensor, a table of blocks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import MaskError
from .intervals import Intervals
from .pattern import Index, Pattern, Rows, whole

_serial = itertools.count()


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


def check_dense(mask: torch.Tensor) -> None:
    """MaskError unless `mask` is a bool tensor [Sq, Sk] or [B, H, Sq, Sk], not empty."""
    if not isinstance(mask, torch.Tensor):
        raise MaskError(f"a dense mask must be a tensor, not {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise MaskError(
            f"a dense mask must hold booleans, True where attention is allowed, not {mask.dtype}: "
            "of an additive mask, give mask == 0"
        )
    if mask.ndim not in (2, 4) or mask.numel() == 0:
        raise MaskError(
            f"a dense mask must be [Sq, Sk] or [B, H, Sq, Sk] and not empty, not {list(mask.shape)}"
        )


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
        check_dense(self.mask)
        m = self.mask
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


@dataclass(frozen=True, eq=False)
class BlockTable(Pattern):
    """Blocks of queries that see whole blocks of keys, as a table says; nothing lies beyond it.

    Args:
        table: bool array [H or 1, query blocks, key blocks], True where attention is allowed.
        block_size: tokens in a block, of queries and of keys.
    """

    table: np.ndarray = field(repr=False)
    block_size: int

    def __post_init__(self) -> None:
        whole("block_size", self.block_size, 1)
        table = np.array(self.table)
        if table.ndim != 3 or table.size == 0 or table.dtype != bool:
            raise MaskError(
                "a table of blocks must hold booleans [heads or 1, query blocks, key blocks], not "
                f"{list(table.shape)} of {table.dtype}"
            )
        table.setflags(write=False)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "heads", len(table) if len(table) > 1 else None)
        object.__setattr__(self, "_on", {})

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        device = torch.as_tensor(q).device
        if device not in self._on:  # type: ignore[attr-defined]
            self._on[device] = torch.tensor(self.table, device=device)  # type: ignore[attr-defined]
        table = self._on[device]  # type: ignore[attr-defined]
        row, col = torch.as_tensor(q) // self.block_size, torch.as_tensor(k) // self.block_size
        inside = (row < table.shape[1]) & (col < table.shape[2])
        row, col = row.clamp(max=table.shape[1] - 1), col.clamp(max=table.shape[2] - 1)
        return table[h if self.heads else 0, row, col] & inside

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        size, table = self.block_size, self.table
        head = rows.head if self.heads else np.zeros_like(rows.head)
        top, bottom = rows.first // size, rows.last // size
        some = np.zeros((rows.count, table.shape[2]), bool)
        every = np.ones_like(some)
        for step in range(int((bottom - top).max(initial=0)) + 1):
            row = top + step
            held = table[head, np.minimum(row, table.shape[1] - 1)]
            held &= (row < table.shape[1])[:, None]
            used = (row <= bottom)[:, None]
            some |= held & used
            every &= held | ~used
        # Several runs may touch one tile.
        return rows.touched(*self._keys(some)).ascending(), rows.inside(*self._keys(every))

    def _keys(self, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs of True in each row of bool [N, key blocks], as key intervals [N, runs]."""
        steps = np.diff(np.pad(held, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, begin = np.nonzero(steps == 1)
        _, end = np.nonzero(steps == -1)
        count = np.bincount(row, minlength=len(held))
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        lo, hi = np.zeros((2, len(held), max(1, count.max(initial=0))), np.int64)
        lo[row, place], hi[row, place] = begin * self.block_size, end * self.block_size
        return lo, hi

    def to_json(self) -> dict[str, Any]:
        return {
            "type": type(self).__name__, "table": self.table.tolist(), "block_size": self.block_size
        }  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        text = f"BlockTable({self.table.shape},{self.block_size})".encode()
        return hashlib.sha256(text + self.table.tobytes()).hexdigest()[:24]
