"""What the tensor-core kernels stream: a work list derived from a SparseMask.

A work item is a block of query rows against some of its key tiles: one contiguous run of full
tiles, then partial tiles with their bitmaps. Items are sorted heaviest first; an item that would
outlast the rest of the launch is split over its keys, and its pieces are combined in fixed order.
Derived on the host from a mask's runs, in vectorised numpy, and kept with the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import MaskError
from ..masks import bits
from ..masks.bits import TILE
from ..masks.device import upload
from ..masks.sparse_mask import FULL, SparseMask

EMPTY = -2
#: A full tile's cost is 1; a partial one applies its bitmap; an item loads queries, stores rows.
_PARTIAL_COST, _ITEM_COST = 1.3, 2.0
#: An item is split only if that saves more than combining costs; no piece is meant to be smaller.
_MERGE_COST, _LEAST_PIECE = 12.0, 8.0


@dataclass(frozen=True)
class BlockPlan:
    """Work list for blocks of `rows` query rows.

    items: int32 [P, N, 6]: query block (-1: none), first tile and length of the full run, first
        entry and number of partial steps, slot of the piece (-1: the item is whole).
    steps: int32 [S, 1 + rows / 64]: key tile, then what the bitmap of each 64 rows is: an index of
        tile_bits, -1 all ones, -2 all zeros.
    merges: int32 [P, C, 3]: query block (-1: none), first slot, number of pieces.
    slots: pieces of the pattern that has most.
    unevenness: cost of the heaviest item over the sum of all, of the pattern where that is largest.
    """

    rows: int
    items: torch.Tensor
    steps: torch.Tensor
    merges: torch.Tensor
    slots: int
    unevenness: float


def block_plan(mask: SparseMask, rows: int, copies: int, workers: int, unit: int) -> BlockPlan:
    """The plan of `mask` for blocks of `rows` (64 or 128) query rows.

    Args:
        copies: number of (batch, head) pairs that the launch computes.
        workers: blocks that the device runs at once.
        unit: key tiles that a step of the full run covers; 0: there is no such run.
    """
    key = ("block", rows, copies, workers, unit)
    if key not in mask.plans:
        mask.plans[key] = _block_plan(mask, rows, copies, workers, unit)
    return mask.plans[key]


def _block_plan(mask: SparseMask, rows: int, copies: int, workers: int, unit: int) -> BlockPlan:
    blocks = split_into_blocks(mask.host_runs(), bits.words_per(mask.kv_len), rows, unit)
    cost = blocks.cost()
    share = cost.sum() * copies / blocks.patterns / workers
    return work_list(blocks, cost, share, unit, mask.device)


@dataclass(frozen=True)
class Blocks:
    """The tiles of blocks of tile rows: entry p * per_pattern + b of an array is block b of p.

    run_col, run_len: the full run. first_part, n_part: which of the steps [S, 1 + rows / 64], key
    tile and contents, are the block's others.
    """

    rows: int
    patterns: int
    per_pattern: int
    run_col: np.ndarray
    run_len: np.ndarray
    first_part: np.ndarray
    n_part: np.ndarray
    steps: np.ndarray

    def cost(self) -> np.ndarray:
        """Of each block, in full tiles."""
        return self.run_len + _PARTIAL_COST * self.n_part + _ITEM_COST


def split_into_blocks(runs: tuple[np.ndarray, ...], columns: int, rows: int, unit: int) -> Blocks:
    """Blocks of `rows` rows of (ptr, col, length, content), as `SparseMask.host_runs` has them."""
    ptr, col, length, content = runs
    patterns, tile_rows = ptr.shape[0], ptr.shape[1] - 1
    per = rows // TILE
    blocks = -(-tile_rows // per)
    count = np.diff(ptr, axis=1).reshape(-1)
    row = np.repeat(np.arange(len(count)), count)
    pattern, tile_row = row // tile_rows, row % tile_rows
    block = pattern * blocks + tile_row // per
    if per > 1:
        block, col, length, content = _joined(
            block, tile_row % per, col, length, content, columns, per, tile_rows, blocks
        )
    else:
        content = content[:, None]
    total = patterns * blocks
    full = (content == FULL).all(1)
    run_col, run_len = _longest_runs(block, col, length, full, total, unit)
    step_block, steps = _partial_steps(block, col, length, content, full, run_col, run_len)
    n_part = np.bincount(step_block, minlength=total)
    first_part = np.cumsum(n_part) - n_part
    return Blocks(rows, patterns, blocks, run_col, run_len, first_part, n_part, steps)


def work_list(
    blocks: Blocks, cost: np.ndarray, share: float, unit: int, device: torch.device
) -> BlockPlan:
    """Items of blocks with these costs, those split that far outlast a worker's even share."""
    pieces = _pieces(cost, share)
    items, merges, slots = _items(pieces, cost, blocks, max(unit, 1))
    tensors = (_upload(x, device) for x in (items, blocks.steps, merges))
    by_pattern = (cost / pieces).reshape(blocks.patterns, -1)
    total = cost.reshape(blocks.patterns, -1).sum(1)
    return BlockPlan(blocks.rows, *tensors, slots, float((by_pattern.max(1) / total).max()))


def _joined(
    block: np.ndarray, part: np.ndarray, col: np.ndarray, length: np.ndarray, content: np.ndarray,
    columns: int, per: int, tile_rows: int, blocks: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Tiles of the tile rows of a block side by side: (block, col, length 1, content [n, per])."""
    begin = np.repeat(np.cumsum(length) - length, length)
    block, part = np.repeat(block, length), np.repeat(part, length)
    col = np.repeat(col, length) + np.arange(len(block)) - begin
    keys, inverse = np.unique(block * columns + col, return_inverse=True)
    joined = np.full((len(keys), per), EMPTY, np.int64)
    block, col = keys // columns, keys % columns
    # Rows beyond the last query are never stored: they must not keep a tile from being full.
    beyond = block[:, None] % blocks * per + np.arange(per) >= tile_rows
    joined[beyond] = FULL
    joined[inverse, part] = np.repeat(content, length)
    return block, col, np.ones(len(keys), np.int64), joined


def _longest_runs(
    block: np.ndarray, col: np.ndarray, length: np.ndarray, full: np.ndarray, total: int, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """First tile and length of each block's longest run of full tiles."""
    block, col, length = block[full], col[full], length[full]
    begins = np.ones(len(block), bool)
    begins[1:] = (block[1:] != block[:-1]) | (col[1:] != col[:-1] + length[:-1])
    at = np.flatnonzero(begins)
    run_block, run_col = block[at], col[at]
    run_len = np.add.reduceat(length, at) if len(at) else length
    order = np.lexsort((run_len, run_block))
    best_col, best_len = np.zeros(total, np.int64), np.zeros(total, np.int64)
    # Ascending by length within a block: the last assignment, the longest, stays.
    best_col[run_block[order]], best_len[run_block[order]] = run_col[order], run_len[order]
    return best_col, best_len // unit * unit if unit else np.zeros_like(best_len)


def _partial_steps(
    block: np.ndarray, col: np.ndarray, length: np.ndarray, content: np.ndarray, full: np.ndarray,
    run_col: np.ndarray, run_len: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Every tile outside the blocks' full runs: its block and (key tile, contents)."""
    # Cut the full stretches at the chosen run before expanding what is left of them.
    lo, hi = run_col[block], run_col[block] + run_len[block]
    end = col + length
    before = np.where(full, np.clip(np.minimum(end, lo) - col, 0, None), length)
    after = np.where(full, np.clip(end - np.maximum(col, hi), 0, None), 0)
    whole = full & (run_len[block] == 0)
    before, after = np.where(whole, length, before), np.where(whole, 0, after)
    pieces = np.concatenate([before, after])
    start = np.concatenate([col, end - after])
    source = np.concatenate([np.arange(len(block))] * 2)
    offset = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    source = np.repeat(source, pieces)
    tile = np.repeat(start, pieces) + offset
    order = np.lexsort((tile, block[source]))
    source, tile = source[order], tile[order]
    return block[source], np.concatenate([tile[:, None], content[source]], axis=1)


def _pieces(cost: np.ndarray, share: float) -> np.ndarray:
    """Into how many pieces each block is split: no piece should outlast an even share by much."""
    share = max(share, _LEAST_PIECE)
    pieces = np.maximum(2, np.rint(cost / share))
    split = cost > np.maximum(share, cost / pieces) + _MERGE_COST
    return np.where(split, pieces, 1).astype(np.int64)


def _items(
    pieces: np.ndarray, cost: np.ndarray, made: Blocks, unit: int
) -> tuple[np.ndarray, np.ndarray, int]:
    patterns, blocks, n_part = made.patterns, made.per_pattern, made.n_part
    run_col, run_len, first_part = made.run_col, made.run_len, made.first_part
    of = np.repeat(np.arange(len(pieces)), pieces)
    index = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    n = pieces[of]

    def cut(total: np.ndarray, at: np.ndarray) -> np.ndarray:
        return total * at // n

    groups = run_len[of] // unit
    full_a, full_b = cut(groups, index) * unit, cut(groups, index + 1) * unit
    part_a, part_b = cut(n_part[of], index), cut(n_part[of], index + 1)
    split = n > 1
    pattern = of // blocks
    slot = np.full(len(of), -1)
    slots = 0
    counts = np.bincount(pattern, minlength=patterns)
    items = np.full((patterns, max(1, counts.max(initial=0)), 6), -1, np.int64)
    merged = np.bincount(np.flatnonzero(pieces > 1) // blocks, minlength=patterns)
    merges = np.full((patterns, merged.max(initial=0), 3), -1, np.int64)
    for p in range(patterns):
        mine = pattern == p
        slot[mine & split] = np.arange(int((mine & split).sum()))
        slots = max(slots, int((mine & split).sum()))
        order = np.flatnonzero(mine)
        order = order[np.argsort(-(cost[of] / n)[order], kind="stable")]
        table = (
            of % blocks, run_col[of] + full_a, full_b - full_a, first_part[of] + part_a,
            part_b - part_a, slot,
        )  # fmt: skip
        items[p, : len(order)] = np.stack(table, 1)[order]
        first = np.flatnonzero(mine & split & (index == 0))
        merges[p, : len(first)] = np.stack([of % blocks, slot, n], 1)[first]
    return items, merges, slots


def run_share(mask: SparseMask) -> float:
    """Share of the mask's tiles that lie in runs of at least 8 full ones."""
    if "run_share" not in mask.plans:
        _, _, length, content = mask.host_runs()
        in_runs = length[(content == FULL) & (length >= 8)].sum()
        mask.plans["run_share"] = float(in_runs / max(1, length.sum()))
    return mask.plans["run_share"]


def longest_row(mask: SparseMask) -> int:
    """The most key tiles that a row of tiles holds, or all of them where only the device knows."""
    if "longest_row" not in mask.plans:
        if "host_runs" not in mask.plans:
            return -(-mask.kv_len // TILE)
        ptr, _, length, _ = mask.host_runs()
        before = np.concatenate([[0], np.cumsum(length)])
        mask.plans["longest_row"] = int(np.diff(before[ptr]).max(initial=0))
    return mask.plans["longest_row"]


def tile_table(mask: SparseMask) -> torch.Tensor:
    """Content of every tile, for kernels that look tiles up: int32 [P, tile rows, tile columns]."""
    if "tile_table" not in mask.plans:
        ptr, col, length, content = mask.host_runs()
        count = np.diff(ptr, axis=1).reshape(-1)
        row = np.repeat(np.repeat(np.arange(len(count)), count), length)
        begin = np.repeat(np.cumsum(length) - length, length)
        tile = np.repeat(col, length) + np.arange(len(row)) - begin
        columns = max(int(tile.max(initial=0)) + 1, 1)
        table = np.full((len(count), columns), EMPTY, np.int32)
        table[row, tile] = np.repeat(content, length)
        table = table.reshape(ptr.shape[0], ptr.shape[1] - 1, columns)
        mask.plans["tile_table"] = _upload(table, mask.device)
    return mask.plans["tile_table"]


def device_tile_table(mask: SparseMask) -> torch.Tensor:
    """`tile_table`, computed on the device without synchronising; tiles are classified anew.

    Raises MaskError for a view, whose storage may have more columns than the view has.
    """
    if mask.is_view:
        raise MaskError(
            "a view of a mask (SparseMask.rows) that reaches the kernel as bare tensors inside a "
            "CUDA graph cannot be planned: pass the pattern instead of the SparseMask"
        )
    patterns, tile_rows = mask.row_ptr.shape[0], mask.row_ptr.shape[1] - 1
    columns, device = bits.words_per(mask.kv_len), mask.device
    shape = (patterns, tile_rows, columns)
    if len(mask.run_col) == 0:
        return torch.full(shape, EMPTY, dtype=torch.int32, device=device)
    first = mask.row_ptr[:, :-1].flatten().contiguous()
    run = torch.arange(len(mask.run_col), dtype=torch.int32, device=device)
    begin = (torch.searchsorted(first, run, right=True) - 1) * columns + mask.run_col
    cell = torch.arange(patterns * tile_rows * columns, device=device)
    at = (torch.searchsorted(begin, cell, right=True) - 1).clamp(0)
    inside = (cell >= begin[at]) & (cell < begin[at] + mask.run_len[at])
    content = mask.run_bits[at]
    if len(mask.tile_bits):
        words = mask.tile_bits[content.clamp(0)]
        content = content.masked_fill((content >= 0) & (words == 0).all(1), EMPTY)
        content = content.masked_fill((content >= 0) & (words == -1).all(1), FULL)
    return torch.where(inside, content, EMPTY).view(shape)


def tile_lists(mask: SparseMask) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles that each tile row holds: (int32 [P * tile rows, 2]: first entry and number of
    entries, int32 [S, 2]: key tile, and index of tile_bits or -1 for a full tile)."""
    if "tile_lists" not in mask.plans:
        ptr, col, length, content = mask.host_runs()
        runs = np.diff(ptr, axis=1).reshape(-1)
        before = np.concatenate([[0], np.cumsum(length)])
        last = np.cumsum(runs)
        first = before[last - runs]
        lists = np.stack([first, before[last] - first], 1)
        tile = np.repeat(col - before[:-1], length) + np.arange(before[-1])
        steps = np.stack([tile, np.repeat(content, length)], 1)
        steps = steps if len(steps) else np.zeros((1, 2))
        mask.plans["tile_lists"] = (_upload(lists, mask.device), _upload(steps, mask.device))
    return mask.plans["tile_lists"]


def device_tile_lists(mask: SparseMask) -> tuple[torch.Tensor, torch.Tensor]:
    """`tile_lists`, computed on the device without synchronising."""
    count, steps = _device_steps(device_tile_table(mask))
    first = torch.arange(count.numel(), device=count.device) * steps.shape[2]
    return torch.stack([first, count.flatten()], 1).to(torch.int32), steps.view(-1, 2)


def device_block_plan(mask: SparseMask) -> BlockPlan:
    """A plan for blocks of 64 query rows, made on the device without synchronising.

    For masks whose runs the host does not know, and for calls that a CUDA graph captures before
    they were planned. Every tile is a step of its own, and no item is split.
    """
    return device_work_list(device_tile_table(mask))


def device_work_list(table: torch.Tensor) -> BlockPlan:
    """`device_block_plan` of the rows of a tile table [P, rows, columns]."""
    count, steps = _device_steps(table)
    weight, block = torch.sort(count, dim=1, descending=True, stable=True)
    row = torch.arange(len(count), device=count.device)[:, None] * count.shape[1] + block
    none = torch.zeros_like(block)
    items = torch.stack([block, none, none, row * steps.shape[2], weight, none - 1], 2)
    merges = torch.empty(len(count), 0, 3, dtype=torch.int32, device=count.device)
    return BlockPlan(TILE, items.to(torch.int32), steps.view(-1, 2), merges, 0, 1.0)


def _device_steps(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of held tiles [P, R], and their (key tile, content) [P, R, C + 1, 2], of each row."""
    patterns, tile_rows, columns = table.shape
    held = table != EMPTY
    # Held tiles move to the front of their row, the others to a last column that nobody reads.
    place = torch.where(held, held.cumsum(2) - 1, columns)
    tile = torch.arange(columns, dtype=torch.int32, device=table.device).expand_as(table)
    steps = torch.zeros(patterns, tile_rows, columns + 1, 2, dtype=torch.int32, device=table.device)
    steps.scatter_(2, place[..., None].expand(-1, -1, -1, 2), torch.stack([tile, table], 3))
    return held.sum(2), steps


def _upload(x: np.ndarray, device: torch.device) -> torch.Tensor:
    return upload(torch.from_numpy(np.ascontiguousarray(x, np.int32)), device)
