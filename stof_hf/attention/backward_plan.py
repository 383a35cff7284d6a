"""What the backward kernel walks: a mask's tiles by rows, and transposed, by columns.

A block of keys visits the query tiles that see it: the same work list as the forward's
(`plan.py`), made of the mask's columns, with the bitmaps transposed. Columns that far outlast the
others (global keys) are split as such rows are. Kept with the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..masks import bits
from ..masks.sparse_mask import EMPTY, FULL, SparseMask
from .plan import (
    BlockPlan,
    device_block_plan,
    device_tile_table,
    device_work_list,
    split_into_blocks,
    work_list,
)

#: A step of a key block is four products, one of a query block three.
_KEYS_COST = 4 / 3


@dataclass(frozen=True)
class BackwardPlan:
    """Work lists of blocks of queries and of keys, and the bitmaps that the latter index:
    `tile_bits` transposed, int64 [U, 64], word c of a tile for its key c."""

    queries: BlockPlan
    keys: BlockPlan
    words: torch.Tensor


def backward_plan(
    mask: SparseMask, rows: int, copies: int, shared: int, workers: int, unit: int
) -> BackwardPlan:
    """The plan of `mask` for blocks of `rows` (64 or 128) queries or keys.

    Args:
        copies: number of (batch, query head) pairs.
        shared: query heads whose gradients a block of keys adds up.
        workers: blocks that the device runs at once.
        unit: 1: runs of full tiles are not listed as steps; 0: they are.
    """
    key = ("backward", rows, copies, shared, workers, unit)
    if key not in mask.plans:
        runs, columns = mask.host_runs(), bits.words_per(mask.kv_len)
        queries = split_into_blocks(runs, columns, rows, unit)
        tile_rows = runs[0].shape[1] - 1
        keys = split_into_blocks(transposed(runs, columns), tile_rows, rows, unit)
        costs = queries.cost(), keys.cost() * (_KEYS_COST * shared)
        launches = copies / queries.patterns
        share = (costs[0].sum() + costs[1].sum() / shared) * launches / workers
        mask.plans[key] = BackwardPlan(
            work_list(queries, costs[0], share, unit, mask.device),
            work_list(keys, costs[1], share, unit, mask.device),
            _transposed_bits(mask),
        )
    return mask.plans[key]


def device_backward_plan(mask: SparseMask) -> BackwardPlan:
    """A plan for blocks of 64, made on the device without synchronising, with no block split."""
    table = device_tile_table(mask)
    keys = device_work_list(table.transpose(1, 2).contiguous())
    return BackwardPlan(device_block_plan(mask), keys, bits.transpose(mask.tile_bits))


def _transposed_bits(mask: SparseMask) -> torch.Tensor:
    if "transposed_bits" not in mask.plans:
        mask.plans["transposed_bits"] = bits.transpose(mask.tile_bits)
    return mask.plans["transposed_bits"]


def transposed(runs: tuple[np.ndarray, ...], columns: int) -> tuple[np.ndarray, ...]:
    """(ptr, row, length, content) of the columns of (ptr, col, length, content).

    Through a table of all tiles, of one pattern at a time: 16 MiB at 131,072 tokens.
    """
    ptr, col, length, content = runs
    patterns, tile_rows = ptr.shape[0], ptr.shape[1] - 1
    counts, found = [], []
    for p in range(patterns):
        mine = slice(ptr[p, 0], ptr[p, -1])
        first_cell = np.repeat(np.arange(tile_rows) * columns, np.diff(ptr[p])) + col[mine]
        before = np.cumsum(length[mine]) - length[mine]
        cell = np.repeat(first_cell - before, length[mine]) + np.arange(length[mine].sum())
        table = np.full(tile_rows * columns, EMPTY, np.int32)
        table[cell] = np.repeat(content[mine], length[mine])
        table = np.ascontiguousarray(table.reshape(tile_rows, columns).T)
        full = table == FULL
        joins = full[:, 1:] & full[:, :-1]
        begins = table != EMPTY
        ends = begins.copy()
        begins[:, 1:] &= ~joins
        ends[:, :-1] &= ~joins
        first, last = np.flatnonzero(begins), np.flatnonzero(ends)
        counts.append(begins.sum(1))
        found.append((first % tile_rows, last - first + 1, table.reshape(-1)[first]))
    row, length, content = (np.concatenate(x).astype(np.int64) for x in zip(*found, strict=True))
    ends = np.cumsum(np.stack(counts)).reshape(patterns, columns)
    begins = np.concatenate([[0], ends[:-1, -1]])[:, None]
    return np.concatenate([begins, ends], 1), row, length, content
