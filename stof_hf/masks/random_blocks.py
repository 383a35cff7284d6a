"""The random part of BigBird: key blocks drawn for each block of queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import MaskError
from .intervals import Intervals
from .pattern import Index, Pattern, Rows, whole

# splitmix64 (Steele, Lea and Flood, 2014): equal numbers on every device, whatever is evaluated.
_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x * _signed(_GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)


@dataclass(frozen=True, eq=False)
class RandomBlocks(Pattern):
    """Each block of `block_size` queries may attend to `blocks` key blocks drawn at random.

    Args:
        blocks: key blocks drawn for each block of queries, without repetition.
        block_size: tokens in a block.
        seed: of the draw; equal seeds draw equal blocks on every device.
        fill: share of the drawn blocks' elements that is allowed, in (0, 1]; each element is drawn.
        causal: draw from the blocks up to the query's own (all of them where there are fewer than
            `blocks`), so that the draw does not depend on the number of keys, as generation needs.
        kv_len: number of keys drawn from; set when a mask is built.

    Raises MaskError, when a mask is built, if there are fewer than `blocks` key blocks.
    """

    blocks: int
    block_size: int = 64
    seed: int = 0
    fill: float = 1.0
    causal: bool = False
    kv_len: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("blocks", 0), ("block_size", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if not isinstance(self.fill, int | float) or not 0 < self.fill <= 1:
            raise MaskError(f"fill must lie in (0, 1], not {self.fill!r}")
        if self.kv_len is not None and not self.causal and self.blocks > self.key_blocks:
            raise MaskError(
                f"{self.blocks} random blocks were asked for, but {self.kv_len} keys make only "
                f"{self.key_blocks} blocks of {self.block_size}: ask for fewer or smaller blocks"
            )
        object.__setattr__(self, "length_free", self.causal)

    @property
    def key_blocks(self) -> int:
        """Number of key blocks that are drawn from."""
        return -(-(self.kv_len or 0) // self.block_size)

    def bind(self, kv_len: int) -> RandomBlocks:
        if self.kv_len is not None or self.causal:
            return self
        return RandomBlocks(self.blocks, self.block_size, self.seed, self.fill, False, kv_len)

    def _drawn(self, row: torch.Tensor) -> list[torch.Tensor]:
        """The key blocks drawn for the query blocks `row`, one tensor a draw; -1 is none.

        Floyd's sampling without replacement (Bentley and Floyd, 1987).
        """
        if not self.causal and self.kv_len is None:
            raise MaskError("this pattern depends on the number of keys: call pattern.bind(kv_len)")
        total = row + 1 if self.causal else torch.full_like(row, self.key_blocks)
        base = _mix(_mix(row + 1) + self.seed)
        out: list[torch.Tensor] = []
        for m in range(self.blocks):
            top = total - self.blocks + m
            pick = _shift(_mix(base + m), 1) % (top + 1).clamp(min=1)
            taken = torch.zeros_like(row, dtype=torch.bool)
            for earlier in out:
                taken = taken | (earlier == pick)
            out.append(torch.where(taken, top, pick).masked_fill(top < 0, -1))
        return out

    def __call__(self, b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        q, k = torch.as_tensor(q).long(), torch.as_tensor(k).long()
        col = k // self.block_size
        held = (q < 0) & (k < 0)
        for drawn in self._drawn(q // self.block_size):
            held = held | (drawn == col)
        if self.fill < 1:
            draw = _mix(_mix(q + 1 + self.seed) ^ k)
            held = held & ((draw & 0xFFFFFF) < int(self.fill * (1 << 24)))
        return held

    def structure(self, rows: Rows) -> tuple[Intervals, Intervals]:
        size = self.block_size
        top, bottom = rows.first // size, rows.last // size
        touched, full = rows.none(), rows.none()
        whole = ((top == bottom) & (self.fill == 1))[:, None]
        for step in range(int((bottom - top).max(initial=0)) + 1):
            drawn = self._drawn(torch.from_numpy(top + step))
            if not drawn:
                break
            col = torch.stack(drawn, 1).numpy()
            held = (col >= 0) & (top + step <= bottom)[:, None]
            lo, hi = np.where(held, col * size, 0), np.where(held, (col + 1) * size, 0)
            touched = touched | rows.touched(lo, hi)
            full = full | rows.inside(lo, np.where(whole, hi, 0))
        return touched, full
