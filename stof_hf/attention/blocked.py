"""Attention under a SparseMask in plain torch operations, a few tile rows of queries at a time.

The cpu backend's path for dropout, and where no C++ compiler is found. Only keys that some of these
queries attend to are gathered, and at most a block of them is scored at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..masks import bits
from ..masks.bits import TILE
from ..masks.sparse_mask import FULL, SparseMask
from .dropout import Dropout

_ROWS = 2 * TILE
_KEYS = 512
_NO_KEY = float("-inf")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SparseMask | None,
    *,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cpu.forward`, which checks the arguments."""
    batch, heads, q_len, _ = q.shape
    kv_len, value_dim = v.shape[2:]
    out = q.new_empty(batch, q_len, heads, value_dim)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    if bias is not None:
        bias = bias.expand(batch, heads, q_len, kv_len)
    valid = None
    if mask is not None and mask.kv_valid is not None:
        valid = bits.unpack(mask.kv_valid, kv_len)[:, None, None]
    # A weight of 0 does not silence NaN or infinity: such values take a slower product.
    finite = bool(v.isfinite().all())

    copies = torch.arange(batch * heads, device="cpu").view(batch, heads)
    for b, h in _groups(mask, batch, heads):
        kv_heads = torch.arange(heads, device="cpu")[h] // (heads // k.shape[1])
        keys, values = k[b, kv_heads], v[b, kv_heads]
        for start in range(0, q_len, _ROWS):
            rows = slice(start, min(start + _ROWS, q_len))
            queries = q[b, h, rows].float() * scale
            state = _Softmax(queries, value_dim)
            index, allowed = _row_keys(mask, b.start, h.start, rows, kv_len)
            for part in range(0, len(index), _KEYS):
                cols = _as_slice(index[part : part + _KEYS])
                keep = allowed[:, part : part + _KEYS]
                if valid is not None:
                    keep = keep & valid[b if len(valid) > 1 else slice(None), :, :, cols]
                scores = queries @ keys[:, :, cols].float().mT
                if softcap > 0:
                    scores.div_(softcap).tanh_().mul_(softcap)
                if bias is not None:
                    scores += bias[b, h, rows][..., cols]
                if not keep.all():
                    scores.masked_fill_(~keep, _NO_KEY)
                kept = None
                if dropout is not None:
                    here = torch.arange(rows.start, rows.stop, device="cpu")
                    kept = _kept(dropout, copies[b, h], here, index[part : part + _KEYS])
                state.add(scores, values[:, :, cols].float(), finite, kept)
            if sinks is not None:
                state.add_sink(sinks[h].float())
            result, lse[b, h, rows] = state.result()
            out.transpose(1, 2)[b, h, rows] = result if dropout is None else dropout.scale * result
    return out, lse


class _Softmax:
    """Online softmax of [b, h, rows] queries: running maximum, denominator, weighted values."""

    def __init__(self, queries: torch.Tensor, value_dim: int):
        shape = queries.shape[:-1]
        self.top = queries.new_full(shape, _NO_KEY)
        self.sum = queries.new_zeros(shape)
        self.out = queries.new_zeros(*shape, value_dim)

    def _raise(self, top: torch.Tensor) -> torch.Tensor:
        """Rescale to a new maximum; returns what to subtract from scores."""
        base = top.masked_fill(top == _NO_KEY, 0)
        factor = (self.top - base).exp()
        self.top, self.sum, self.out = top, self.sum * factor, self.out * factor[..., None]
        return base

    def add(
        self, scores: torch.Tensor, values: torch.Tensor, finite: bool, kept: torch.Tensor | None
    ) -> None:
        """Take in a block of scores, which are overwritten.

        Values that are not kept count in the denominator alone.
        """
        seen = None if finite else scores != _NO_KEY
        base = self._raise(torch.maximum(self.top, scores.amax(-1)))
        weights = scores.sub_(base[..., None]).exp_()
        self.sum += weights.sum(-1)
        if kept is not None:
            weights.mul_(kept)
        if seen is None:
            self.out += weights @ values
            return
        for part in torch.arange(weights.shape[-1], device="cpu").split(16):
            terms = weights[..., part, None] * values[:, :, None, part]
            self.out += torch.where(seen[..., part, None], terms, 0).sum(-2)

    def add_sink(self, sinks: torch.Tensor) -> None:
        sinks = sinks[:, None].expand_as(self.top)
        base = self._raise(torch.maximum(self.top, sinks))
        self.sum = self.sum + (sinks - base).exp()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        none = self.sum == 0
        return self.out / self.sum.masked_fill(none, 1)[..., None], self.top + self.sum.log()


def _kept(
    dropout: Dropout, copies: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """What dropout keeps of ascending keys: bool [*copies.shape, rows, keys]."""
    words, place = torch.unique_consecutive(keys >> 5, return_inverse=True)
    return dropout.kept(copies, rows, words)[..., _as_slice(place * 32 + keys % 32)]


def _groups(mask: SparseMask | None, batch: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """(batch, head) ranges that share one pattern."""
    shape = (1, 1) if mask is None else mask.pattern_id.shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            b = slice(0, batch) if shape[0] == 1 else slice(i, i + 1)
            yield b, slice(0, heads) if shape[1] == 1 else slice(j, j + 1)


def _as_slice(index: torch.Tensor) -> torch.Tensor | slice:
    """An ascending index as a slice where it has no gap: a slice copies nothing."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _row_keys(
    mask: SparseMask | None, b: int, h: int, rows: slice, kv_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that some of the query rows attend to, int64 [n], and which ones, bool [rows, n]."""
    n = rows.stop - rows.start
    if mask is None:
        keys = torch.arange(kv_len, device="cpu")
        return keys, torch.ones_like(keys, dtype=torch.bool).expand(n, -1)
    pattern = int(mask.pattern_id[b, h])
    first, col_start = int(mask.row_start) + rows.start, int(mask.col_start)
    tile_rows = range(first // TILE, (first + n - 1) // TILE + 1)
    runs = [_tiles(mask, pattern, t) for t in tile_rows]
    tiles = torch.cat([cols for cols, _ in runs]).unique()
    allowed = tiles.new_zeros(len(runs), TILE, len(tiles), TILE, dtype=torch.bool)
    for i, (cols, content) in enumerate(runs):
        place = torch.searchsorted(tiles, cols)
        full = content == FULL
        allowed[i][:, place[full]] = True
        words = bits.unpack(mask.tile_bits[content[~full], :, None], TILE)
        allowed[i][:, place[~full]] = words.transpose(0, 1)
    keys = (tiles[:, None] * TILE + torch.arange(TILE, device="cpu")).flatten() - col_start
    allowed = allowed.flatten(2).flatten(0, 1)[first % TILE : first % TILE + n]
    used = (keys >= 0) & (keys < kv_len) & allowed.any(0)
    return keys[used], allowed[:, used]


def _tiles(mask: SparseMask, pattern: int, tile_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile columns of a stored tile row, ascending, and what each holds: FULL or a bitmap."""
    begin, end = mask.row_ptr[pattern, tile_row : tile_row + 2].tolist()
    length = mask.run_len[begin:end].long()
    before = (length.cumsum(0) - length).repeat_interleave(length)
    cols = mask.run_col[begin:end].long().repeat_interleave(length)
    cols = cols + torch.arange(len(cols), device="cpu") - before
    return cols, mask.run_bits[begin:end].long().repeat_interleave(length)
