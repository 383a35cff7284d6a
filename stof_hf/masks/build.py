"""Builders: from patterns, dense tensors, BlockMasks and COO tensors to a SparseMask.

Closed-form patterns are settled on the host, from interval sets and a few distinct tiles, and
copied to the device without waiting for it. Functions and tensors are evaluated tile by tile on
their own device: by CUDA kernels (tiles.py), or by PyTorch where those cannot be built and on the
CPU, with one synchronisation for every 16,384 tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from ..errors import MaskError
from . import bits, closed_form, tiles
from .bits import TILE
from .blocks import BlockMaskPattern
from .device import upload
from .evaluate import Grid, evaluate_words
from .given import check_dense
from .intervals import Intervals
from .pattern import Pattern, Rows, whole
from .sparse_mask import EMPTY, FULL, PLANS, SparseMask

_GROUP = 16384
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@dataclass
class _Tiles:
    """Evaluated tiles of one mask: where they are and what they hold."""

    row: np.ndarray
    tile: np.ndarray
    #: -1 full, -2 empty, else the index of the words
    content: np.ndarray
    words: torch.Tensor
    #: of each of `words`, how many of the tile's 16 x 16 blocks hold a True
    occupied: np.ndarray


def build(
    pattern: Pattern,
    q_len: int,
    kv_len: int | None,
    q_offset: int,
    kv_offset: int,
    padding: torch.Tensor | None,
    device: torch.device,
) -> SparseMask:
    """See `SparseMask.from_pattern`."""
    if not isinstance(pattern, Pattern):
        raise MaskError(f"expected a Pattern such as stof_hf.patterns.Causal(), not {pattern!r}")
    kv_len = q_len if kv_len is None else kv_len
    _check_lengths(q_len, kv_len)
    whole("q_offset", q_offset)
    whole("kv_offset", kv_offset)
    bound = pattern.bind(kv_offset + kv_len)
    mask = closed_form.build(pattern, bound, q_len, kv_len, q_offset, kv_offset, device)
    if mask is not None:
        return mask if padding is None else mask.with_padding(padding)
    grid = Grid(bound.batch or 1, bound.heads or 1, q_len, kv_len, q_offset, kv_offset)
    rows = _rows(grid)
    touched, full = rows.structure_of(bound)
    full = full.below(kv_len // TILE)
    row, tile = touched.minus(full).tiles()
    if not bound.serializable and tiles.serves(device, grid):
        mask = tiles.from_function(bound, grid, full, row, tile, device)
        mask = replace(mask, pattern=pattern)
    else:
        found = _evaluate(bound, grid, rows, row, tile, device)
        mask = _assemble(grid, rows, full, found, device, pattern)
    return mask if padding is None else mask.with_padding(padding)


def build_dense(mask: torch.Tensor, padding: torch.Tensor | None) -> SparseMask:
    """See `SparseMask.from_dense`."""
    check_dense(mask)
    made = _dense(mask)
    return made if padding is None else made.with_padding(padding)


def build_additive(mask: torch.Tensor) -> tuple[SparseMask | None, bool]:
    """What an additive mask [B or 1, H or 1, Sq, Sk] forbids, and whether it does nothing else.

    Values up to half of the type's least one forbid; None where no element does.
    """
    if mask.dtype in tiles.DTYPES and tiles.serves(mask.device, Grid(*mask.shape)):
        made, flags = tiles.from_dense(mask)
        return made if flags & tiles.FORBIDS else None, not flags & tiles.ADDS
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    only = not bool(mask.masked_fill(forbidden, 0).any())
    return _dense(~forbidden) if bool(forbidden.any()) else None, only


def _dense(mask: torch.Tensor) -> SparseMask:
    grid = Grid(*(mask.shape if mask.ndim == 4 else (1, 1, *mask.shape)))
    if tiles.serves(mask.device, grid):
        return tiles.from_dense(mask)[0]
    rows = _rows(grid)
    if grid.q_len % TILE:
        mask = F.pad(mask, (0, 0, 0, -grid.q_len % TILE))
    flat = mask.reshape(-1, grid.kv_len)
    collector = _Collector()
    step = max(1, _GROUP // rows.tiles)
    for first in range(0, rows.count, step):
        words = bits.pack(flat[first * TILE : (first + step) * TILE])
        words = words.view(-1, TILE, rows.tiles).transpose(1, 2).contiguous().view(-1, TILE)
        index = first * rows.tiles + np.arange(len(words))
        row, tile = index // rows.tiles, index % rows.tiles
        collector.add(row, tile, words, rows.last[row] - rows.first[row] + 1)
    return _assemble(grid, rows, rows.none(), collector.finish(mask.device), mask.device)


def build_coo(coo: torch.Tensor) -> SparseMask:
    """See `SparseMask.from_coo`."""
    if coo.layout != torch.sparse_coo or coo.dtype != torch.bool or coo.ndim not in (2, 4):
        raise MaskError(
            "expected a sparse COO tensor of booleans, [Sq, Sk] or [B, H, Sq, Sk], not "
            f"{list(coo.shape)} of {coo.dtype}, {coo.layout}: use dense.to_sparse() or from_dense"
        )
    coo = coo.coalesce()
    index = coo.indices()[:, coo.values()]
    shape = (1, 1, *coo.shape) if coo.ndim == 2 else tuple(coo.shape)
    q, k = index[-2], index[-1]
    p = index[0] * shape[1] + index[1] if coo.ndim == 4 else torch.zeros_like(q)
    batch, heads, q_len, kv_len = shape
    _check_lengths(q_len, kv_len)
    grid = Grid(batch, heads, q_len, kv_len)
    rows = _rows(grid)
    place = (p * grid.rows + q // TILE) * rows.tiles + k // TILE
    distinct, inverse = torch.unique(place, return_inverse=True)
    words = torch.zeros(len(distinct) * TILE, dtype=torch.int64, device=q.device)
    # Each element sets a bit of its own, so the sum is the union.
    words.index_add_(0, inverse * TILE + q % TILE, torch.ones_like(k) << (k % TILE))
    words = words.view(-1, TILE)
    at = distinct.cpu().numpy()
    collector = _Collector()
    for i in range(0, len(at), _GROUP):
        row, tile = at[i : i + _GROUP] // rows.tiles, at[i : i + _GROUP] % rows.tiles
        collector.add(row, tile, words[i : i + _GROUP], rows.last[row] - rows.first[row] + 1)
    return _assemble(grid, rows, rows.none(), collector.finish(q.device), q.device)


def build_block_mask(block_mask: BlockMask) -> SparseMask:
    """See `SparseMask.from_block_mask`."""
    if not isinstance(block_mask, BlockMask):
        raise MaskError(
            f"expected a BlockMask of torch.nn.attention.flex_attention, not {block_mask!r}"
        )
    q_len, kv_len = block_mask.seq_lengths
    pattern, device = BlockMaskPattern(block_mask), block_mask.kv_num_blocks.device
    grid = Grid(*block_mask.kv_num_blocks.shape[:2], q_len, kv_len)
    if tiles.serves(device, grid):
        return tiles.from_block_mask(pattern, grid)
    mask = build(pattern, q_len, kv_len, 0, 0, None, device)
    return replace(mask, pattern=None)


def _check_lengths(q_len: int, kv_len: int) -> None:
    whole("the number of queries", q_len, 1)
    whole("the number of keys", kv_len, 1)


def _rows(grid: Grid) -> Rows:
    n = np.arange(grid.batch * grid.heads * grid.rows)
    first = grid.q_offset + n % grid.rows * TILE
    return Rows(
        batch=n // (grid.heads * grid.rows),
        head=n // grid.rows % grid.heads,
        first=first,
        last=np.minimum(first + TILE, grid.q_offset + grid.q_len) - 1,
        k0=grid.kv_offset,
        kv_len=grid.kv_len,
    )


def _evaluate(
    pattern: Pattern,
    grid: Grid,
    rows: Rows,
    row: np.ndarray,
    tile: np.ndarray,
    device: torch.device,
) -> _Tiles:
    """Evaluate the given tiles; of a closed-form pattern only one of each kind, on the host."""
    inverse = None
    if pattern.serializable:
        device = torch.device("cpu")
        ragged = (rows.last - rows.first)[row] * 2 + (tile == rows.tiles - 1)
        key = pattern.exact_key(rows, row, tile)
        key = (key - key.min(initial=0)) * (2 * TILE) + ragged
        _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
        all_row, all_tile = row, tile
        row, tile = row[index], tile[index]
    collector = _Collector()
    # The host has no synchronisations to save, and temporaries of few tiles stay in its cache.
    group, step = (1024, 128) if device.type == "cpu" else (_GROUP, 4096)
    for i in range(0, len(row), group):
        r, t = row[i : i + group], tile[i : i + group]
        words = torch.empty(len(r), TILE, dtype=torch.int64, device=device)
        for j in range(0, len(r), step):
            ids = r[j : j + step] * rows.tiles + t[j : j + step]
            words[j : j + step] = evaluate_words(pattern, grid, torch.from_numpy(ids).to(device))
        collector.add(r, t, words, rows.last[r] - rows.first[r] + 1)
    found = collector.finish(device)
    if inverse is not None:
        found.row, found.tile, found.content = all_row, all_tile, found.content[inverse]
    return found


class _Collector:
    """Takes evaluated tiles, keeps each distinct partial one once."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.tiles: list[np.ndarray] = []
        self.contents: list[np.ndarray] = []
        self.words: list[torch.Tensor] = []
        self.occupied: list[np.ndarray] = []
        self.known: dict[tuple[int, int], int] = {}

    def add(self, row: np.ndarray, tile: np.ndarray, words: torch.Tensor, used: np.ndarray) -> None:
        """Add tiles; `used` is the number of in-range query rows of each. Synchronises once."""
        lane = torch.arange(TILE, device=words.device)
        unused = lane >= torch.from_numpy(used).to(words.device)[:, None]
        full = ((words == -1) | unused).all(1)
        empty = (words == 0).all(1)
        facts = [full.long(), empty.long(), _occupied(words), *_hashes(words)]
        summary = torch.stack(facts).cpu().numpy()
        content = np.where(summary[0] == 1, FULL, EMPTY)
        partial = np.flatnonzero((summary[0] == 0) & (summary[1] == 0))
        pairs = np.ascontiguousarray(summary[3:, partial].T)
        distinct, index, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        place = np.empty(len(distinct), np.int64)
        fresh = []
        for i, pair in enumerate(map(tuple, distinct.tolist())):
            if pair not in self.known:
                self.known[pair] = len(self.known)
                fresh.append(partial[index[i]])
            place[i] = self.known[pair]
        content[partial] = place[inverse.reshape(-1)]
        if fresh:
            self.words.append(words[torch.from_numpy(np.array(fresh)).to(words.device)])
            self.occupied.append(summary[2, fresh])
        self.rows.append(row)
        self.tiles.append(tile)
        self.contents.append(content)

    def finish(self, device: torch.device) -> _Tiles:
        none = np.zeros(0, np.int64)
        words = torch.cat([torch.zeros(0, TILE, dtype=torch.int64, device=device), *self.words])
        return _Tiles(
            np.concatenate([none, *self.rows]),
            np.concatenate([none, *self.tiles]),
            np.concatenate([none, *self.contents]),
            words,
            np.concatenate([none, *self.occupied]),
        )


def _occupied(words: torch.Tensor) -> torch.Tensor:
    """How many of each tile's 16 x 16 blocks hold a True, int64 [n]."""
    return (words.view(torch.int16).view(-1, 4, 16, 4) != 0).any(2).sum((1, 2))


def _hashes(words: torch.Tensor) -> list[torch.Tensor]:
    """Two independent 64-bit hashes of each tile, which together stand for its content."""
    out = []
    for multiplier in _MULTIPLIERS:
        lane = torch.arange(1, TILE + 1, device=words.device) * multiplier
        x = words + lane
        x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * multiplier
        x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * multiplier
        out.append((x ^ ((x >> 31) & ((1 << 33) - 1))).sum(1))
    return out


def _assemble(
    grid: Grid,
    rows: Rows,
    full: Intervals,
    found: _Tiles,
    device: torch.device,
    pattern: Pattern | None = None,
) -> SparseMask:
    held = found.content != EMPTY
    full_row, full_lo, full_len = full.pieces()
    row = np.concatenate([full_row, found.row[held]])
    col = np.concatenate([full_lo, found.tile[held]])
    length = np.concatenate([full_len, np.ones(int(held.sum()), np.int64)])
    content = np.concatenate([np.full(len(full_row), FULL), found.content[held]])
    order = np.argsort(row * (rows.tiles + 1) + col, kind="stable")
    row, col, length, content = row[order], col[order], length[order], content[order]
    begins = np.ones(len(row), bool)
    begins[1:] = ~(
        (row[1:] == row[:-1])
        & (content[1:] == FULL)
        & (content[:-1] == FULL)
        & (col[1:] == col[:-1] + length[:-1])
    )
    at = np.flatnonzero(begins)
    length = np.add.reduceat(length, at) if len(at) else length
    row, col, content = row[at], col[at], content[at]
    counts = np.bincount(row, minlength=rows.count)
    shape = (grid.batch, grid.heads)
    ids, row_ptr, kept = _distinct(counts.reshape(-1, grid.rows), col, length, content)
    runs = tuple(x.astype(np.int32) for x in (row_ptr, col[kept], length[kept], content[kept]))
    host = (ids.reshape(shape), *runs)
    in_column = -(-(rows.last - rows.first + 1)[row] // 16)
    blocks = np.where(content == FULL, in_column * length * (TILE // 16), 0)
    blocks[content >= 0] = found.occupied[content[content >= 0]]
    of_all = ids.size * -(-grid.q_len // 16) * -(-grid.kv_len // 16)
    plans: dict[Any, Any] = {"host_runs": runs, "valid_share": float(blocks.sum() / of_all)}
    if found.words.device.type == "cpu":
        plans["host_words"] = found.words.numpy().view(np.uint64)
    arrays = _upload_together(host, device)
    mask = SparseMask(
        grid.q_len, grid.kv_len, *arrays, tile_bits=upload(found.words, device),
        q_offset=grid.q_offset, kv_offset=grid.kv_offset, pattern=pattern, plans=plans,
    )  # fmt: skip
    PLANS[mask.tile_bits] = plans
    return mask


def _upload_together(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int32 tensors on `device`: one copy, of which they are aligned parts."""
    sizes = [-(-a.size // 16) * 16 for a in arrays]
    joined = np.zeros(sum(sizes), np.int32)
    ends = np.cumsum(sizes)
    for a, size, end in zip(arrays, sizes, ends, strict=True):
        joined[end - size : end - size + a.size] = a.reshape(-1)
    parts = upload(torch.from_numpy(joined), device).split(sizes)
    return [p[: a.size].view(a.shape) for p, a in zip(parts, arrays, strict=True)]


def _distinct(
    counts: np.ndarray, col: np.ndarray, length: np.ndarray, content: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep equal patterns once: pattern id of each mask, row_ptr, and which runs are kept."""
    ends = np.cumsum(counts.sum(1))
    starts = ends - counts.sum(1)
    seen: dict[tuple[bytes, ...], int] = {}
    ids = np.empty(len(counts), np.int64)
    first: list[int] = []
    for p, (a, b) in enumerate(zip(starts, ends, strict=True)):
        key = tuple(x.tobytes() for x in (counts[p], col[a:b], length[a:b], content[a:b]))
        if key not in seen:
            seen[key] = len(first)
            first.append(p)
        ids[p] = seen[key]
    kept = np.concatenate([np.arange(starts[p], ends[p]) for p in first])
    flat = np.cumsum(counts[first].reshape(-1)).reshape(len(first), -1)
    lead = np.concatenate([[0], flat[:-1, -1]])
    return ids, np.concatenate([lead[:, None], flat], axis=1), kept
