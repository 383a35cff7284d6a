"""What the CUDA tensor-core kernels stream: query rows and granules of 16 keys, packed densely.

The keys that a tile of 64 query rows sees come as thin stripes: a global column, a band, a random
block. Granules of 16 keys that hold something are put together to steps of 64. Rows that see far
more than their neighbours (global tokens) are taken out of their tiles and share tiles of their
own. csrc/cuda/problem.h describes the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..masks import bits
from ..masks.bits import TILE
from ..masks.device import upload
from ..masks.sparse_mask import EMPTY, FULL, SparseMask
from .plan import _joined, _longest_runs, _partial_steps

GRANULE = 16
NONE = -(2**31)
_PER_TILE = TILE // GRANULE


@dataclass(frozen=True)
class GranulePlan:
    """The arrays of `stof::Plan` (csrc/cuda/problem.h).

    items: int32 [P, N, 8]. steps: int32 [S, 8]. bits: int32 [U, 128]. rows: int32 [V, 64].
    merges: int32 [P, C, 4]. queue: int32 [Q], which item of which head each thread block takes.
    slots: pieces of the pattern that has most.
    """

    items: torch.Tensor
    steps: torch.Tensor
    bits: torch.Tensor
    rows: torch.Tensor
    merges: torch.Tensor
    queue: torch.Tensor
    slots: int


@dataclass(frozen=True)
class Layout:
    """How a block of two halves of 64 rows is used.

    tiles: row tiles of a block, 1 or 2. paired: the halves divide the steps of one row tile (else,
    with 1 tile, they are two heads that share their keys). item_cost, merge_cost: what an item
    costs beyond its steps, and a split one beyond its pieces, in steps without a mask.
    """

    tiles: int
    paired: bool
    item_cost: float = 1.5
    merge_cost: float = 12.0


@dataclass
class _Runs:
    """Runs of all patterns' row tiles, in order: content is FULL or an index of words."""

    row: np.ndarray
    col: np.ndarray
    length: np.ndarray
    content: np.ndarray
    words: np.ndarray  # uint64 [U, 64]
    tiles: int  # row tiles of a pattern


def granule_plan(
    mask: SparseMask, layout: Layout, copies: int, workers: int, together: int
) -> GranulePlan:
    """The plan of `mask`, kept with it.

    Args:
        copies: number of (batch, head) pairs, or of pairs of heads, that the launch computes.
        workers: blocks that the device runs at once.
        together: copies that should run at the same time, so that their keys stay in L2.
    """
    key = ("granules", layout, copies, workers, together)
    if key not in mask.plans:
        mask.plans[key] = _granule_plan(mask, layout, copies, workers, together)
    return mask.plans[key]


def _granule_plan(
    mask: SparseMask, layout: Layout, copies: int, workers: int, together: int
) -> GranulePlan:
    ptr, col, length, content = mask.host_runs()
    patterns, tile_rows = ptr.shape[0], ptr.shape[1] - 1
    row = np.repeat(np.arange(patterns * tile_rows), np.diff(ptr, axis=1).reshape(-1))
    words = mask.tile_bits.cpu().numpy().view(np.uint64).reshape(-1, TILE)
    runs = _Runs(row, col, length, content, words, tile_rows)
    columns = bits.words_per(mask.kv_len)
    runs, rows, names = _regroup(runs, patterns, mask.q_len, columns)
    block_of, part_of, halves, pattern = _blocks(runs, names, tile_rows, layout)
    total = len(halves)
    alone = halves[:, 0] == halves[:, 1]
    if layout.tiles == 2:
        block, col, length, content = _joined(
            block_of[runs.row], part_of[runs.row], runs.col, runs.length, runs.content, columns, 2,
            10**9, total,
        )  # fmt: skip
        single = (alone | (halves[:, 1] == NONE))[block]
        content[single, 1] = content[single, 0]
    else:
        block, col, length = block_of[runs.row], runs.col, runs.length
        content = np.repeat(runs.content[:, None], 2, axis=1)
    full = (content == FULL).all(1)
    run_col, run_len = _longest_runs(block, col, length, full, total, 1)
    step_block, steps = _partial_steps(block, col, length, content, full, run_col, run_len)
    step_block, steps, fragments = _pack(step_block, steps, runs.words)
    n_part = np.bincount(step_block, minlength=total)
    divided = alone & (layout.paired or layout.tiles == 2)
    cost = _cost(step_block, steps, run_len, total, divided) + layout.item_cost
    pieces = _split(cost, copies / patterns, workers, layout.merge_cost)
    items, costs, merges, slots = _items(
        pieces, cost, run_col, run_len, n_part, halves, pattern, patterns, layout, divided
    )
    queue = _queue(costs.max(0), copies, workers, together)
    device = mask.device
    arrays = (items, steps, fragments.view(np.int32), rows, merges, queue)
    tensors = (upload(torch.from_numpy(np.ascontiguousarray(x, np.int32)), device) for x in arrays)
    return GranulePlan(*tensors, slots)


def _blocks(
    runs: _Runs, names: np.ndarray, tile_rows: int, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which block each row tile belongs to, as which half; and of each block the names of its
    halves' row tiles [n, 2] (NONE: no such half) and the pattern."""
    patterns, tiles = names.shape
    if layout.tiles == 1:
        each = np.arange(patterns * tiles)
        halves = np.repeat(names.reshape(-1, 1), 2, axis=1)
        return each, np.zeros_like(each), halves, each // tiles
    visits = np.bincount(runs.row, runs.length, patterns * tiles).reshape(patterns, tiles)
    tile = np.arange(tiles)
    follows = np.broadcast_to((tile < tile_rows) & (tile % 2 == 1), visits.shape).copy()
    # Two tiles share a block only if one would not wait long for the other.
    one, other = visits[:, 0 : tile_rows - 1 : 2], visits[:, 1:tile_rows:2]
    uneven = np.abs(one - other) > 0.3 * (one + other) + 4
    follows[:, 1:tile_rows:2] &= ~uneven
    first = ~follows.reshape(-1)
    block_of = np.cumsum(first) - 1
    part_of = 1 - first
    halves = np.full((int(first.sum()), 2), NONE, np.int64)
    halves[block_of, part_of] = names.reshape(-1)
    # A tile without a second shares its steps between the halves.
    single = halves[:, 1] == NONE
    halves[single, 1] = halves[single, 0]
    return block_of, part_of, halves, np.flatnonzero(first) // tiles


def _regroup(
    runs: _Runs, patterns: int, q_len: int, columns: int
) -> tuple[_Runs, np.ndarray, np.ndarray]:
    """Gather rows that see far more keys than their neighbours into row tiles of their own.

    Returns the runs with those tiles behind the others of each pattern, the virtual tiles' rows
    int32 [V, 64] and the name of every row tile, int64 [P, tiles].
    """
    tiles = runs.tiles
    names = np.tile(np.arange(tiles), (patterns, 1))
    heavy, saved = _heavy_rows(runs, patterns, q_len)
    chosen = []
    for p in range(patterns):
        mine = heavy[p * tiles : (p + 1) * tiles]
        at = np.flatnonzero(mine.reshape(-1))
        spent = -(-len(at) // TILE) * columns * _PER_TILE
        worth = len(at) and saved[p * tiles : (p + 1) * tiles].sum() > 1.1 * spent
        chosen.append(at if worth else at[:0])
        if not worth:
            mine[:] = False
    most = max(-(-len(at) // TILE) for at in chosen)
    if not most:
        return runs, np.full((1, TILE), -1), names

    rows, parts = [], [_without(runs, heavy)]
    base = len(parts[0].words)
    shared = np.full((patterns, most), NONE)
    for p, at in enumerate(chosen):
        for tile in np.flatnonzero(heavy[p * tiles : (p + 1) * tiles].any(1)):
            lane = tile * TILE + np.arange(TILE)
            keep = ~heavy[p * tiles + tile] & (lane < q_len)
            names[p, tile] = -1 - len(rows)
            rows.append(np.where(keep, lane, -1))
        for k in range(-(-len(at) // TILE)):
            of = at[k * TILE : (k + 1) * TILE]
            shared[p, k] = -1 - len(rows)
            rows.append(np.concatenate([of, np.full(TILE - len(of), -1)]))
            gathered = _gather(runs, p, of, columns)
            held = gathered.any(1)
            tile = np.flatnonzero(held)
            index = base + sum(len(x.words) for x in parts[1:])
            used = np.arange(TILE) >= len(of)
            full = ((gathered == ~np.uint64(0)) | used).all(1)[held]
            content = np.where(full, FULL, index + np.arange(len(tile)))
            number = np.full(len(tile), p * (tiles + most) + tiles + k)
            parts.append(
                _Runs(number, tile, np.ones(len(tile), np.int64), content, gathered[held], 0)
            )
    first = parts[0]
    first.row = first.row // tiles * (tiles + most) + first.row % tiles
    fields = [np.concatenate([getattr(x, f) for x in parts]) for f in ("row", "col", "length")]
    content = np.concatenate([x.content for x in parts])
    words = np.concatenate([x.words for x in parts])
    out = _Runs(*fields, content, words, tiles + most)
    return out, np.stack(rows), np.concatenate([names, shared], 1)


def _heavy_rows(runs: _Runs, patterns: int, q_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows see far more granules than a quarter of their tile's rows do, bool [P * tiles,
    64], and how many granules their tile visits less without them."""
    total = patterns * runs.tiles
    held = runs.words.view(np.uint16).reshape(-1, TILE, _PER_TILE) != 0
    each = np.zeros((total, TILE), np.int64)
    full = runs.content == FULL
    each += np.bincount(runs.row[full], runs.length[full] * _PER_TILE, total).astype(np.int64)[
        :, None
    ]
    partial = ~full
    np.add.at(each, runs.row[partial], held.sum(2)[runs.content[partial]])
    lane = np.arange(runs.tiles)[:, None] * TILE + np.arange(TILE)
    each[np.tile(lane >= q_len, (patterns, 1))] = 0
    light = np.sort(each, axis=1)[:, TILE // 4]
    heavy = each > (2 * light + 8)[:, None]
    tiles = np.flatnonzero(heavy.any(1))
    saved = np.zeros(total, np.int64)
    mine = partial & np.isin(runs.row, tiles)
    of, row = held[runs.content[mine]], runs.row[mine]
    lost = of.any(1) & ~(of & ~heavy[row][:, :, None]).any(1)
    np.add.at(saved, row, lost.sum(1))
    return heavy, saved


def _without(runs: _Runs, heavy: np.ndarray) -> _Runs:
    """The runs with heavy rows blanked; what such rows of a tile see no longer matters."""
    mine = (runs.content != FULL) & heavy.any(1)[runs.row]
    gone = heavy[runs.row[mine]]
    words = np.where(gone, np.uint64(0), runs.words[runs.content[mine]])
    full = ((words == ~np.uint64(0)) | gone).all(1)
    content = runs.content.copy()
    content[mine] = np.where(full, FULL, len(runs.words) + np.arange(len(words)))
    kept = np.ones(len(content), bool)
    kept[np.flatnonzero(mine)[~words.any(1)]] = False
    words = np.concatenate([runs.words, words])
    return _Runs(
        runs.row[kept], runs.col[kept], runs.length[kept], content[kept], words, runs.tiles
    )


def _gather(runs: _Runs, pattern: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """The words of single rows of a pattern, uint64 [columns, 64]."""
    out = np.zeros((columns, TILE), np.uint64)
    tile = pattern * runs.tiles + rows // TILE
    for t in np.unique(tile):
        lanes = np.flatnonzero(tile == t)
        a, z = np.searchsorted(runs.row, [t, t + 1])
        for i in range(a, z):
            c = slice(runs.col[i], runs.col[i] + runs.length[i])
            if runs.content[i] == FULL:
                out[c, lanes] = ~np.uint64(0)
            else:
                out[c, lanes] = runs.words[runs.content[i], rows[lanes] % TILE]
    return out


def _pack(
    block: np.ndarray, steps: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles as steps of four granules: the blocks of the steps, the steps [n, 8], and the distinct
    contents in fragment order, uint32 [U, 128]."""
    granules = words.view(np.uint16).reshape(-1, TILE, _PER_TILE)
    held = np.concatenate([(granules != 0).any(1), [[False] * 4, [True] * 4]])
    whole = np.concatenate([(granules == 0xFFFF).all(1), [[False] * 4, [True] * 4]])
    # Indices from the end: FULL is the last entry of these tables, EMPTY the one before.
    content = steps[:, 1:]
    seen = held[content]  # [n, 2, 4]
    used = seen.any(1)
    n = np.broadcast_to(np.arange(len(steps))[:, None], used.shape)[used]
    lane = np.broadcast_to(np.arange(_PER_TILE), used.shape)[used]
    one, other = seen[n, 0, lane], seen[n, 1, lane]
    # Granules of the first half only, of both, of the second: each half sees a dense stretch.
    group = np.where(one & other, 1, np.where(one, 0, 2))
    key = steps[n, 0] * TILE + lane * GRANULE
    order = np.lexsort((key, group, block[n]))
    n, lane, key = n[order], lane[order], key[order]
    owner = block[n]
    counts = np.bincount(owner) if len(owner) else np.zeros(0, np.int64)
    position = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
    of_block = -(-counts // _PER_TILE)
    step = (np.cumsum(of_block) - of_block)[owner] + position // _PER_TILE
    total = int(of_block.sum())
    place = position % _PER_TILE
    packed = np.zeros((total, 8), np.int64)
    # An unused granule repeats the step's first, whose bits it does not have.
    first = place == 0
    packed[step[first], :_PER_TILE] = key[first][:, None]
    packed[step, place] = key
    # What each half sees of each granule: EMPTY, FULL or granule 4 u + g.
    code = np.full((total, 2, _PER_TILE), EMPTY, np.int64)
    for half in range(2):
        c = content[n, half]
        exact = np.where(whole[c, lane], FULL, c * _PER_TILE + lane)
        code[step, half, place] = np.where(held[c, lane], exact, EMPTY)
    flat = code.reshape(-1, _PER_TILE)
    plain = (flat == FULL).all(1) | (flat == EMPTY).all(1)
    index = flat[:, 0].copy()
    distinct, inverse = np.unique(flat[~plain], axis=0, return_inverse=True)
    index[~plain] = inverse.reshape(-1)
    packed[:, 4:6] = index.reshape(-1, 2)
    tables = np.concatenate(
        [
            granules.transpose(0, 2, 1).reshape(-1, TILE),
            np.stack([np.zeros(TILE, np.uint16), np.full(TILE, 0xFFFF, np.uint16)]),
        ]
    )
    rows = np.ascontiguousarray(tables[distinct].transpose(0, 2, 1)).view(np.uint64)[..., 0]
    owner_of_step = np.repeat(np.arange(len(of_block)), of_block)
    fragments = _fragments(rows) if len(rows) else np.zeros((1, 128), np.uint32)
    return owner_of_step, packed, fragments


def _fragments(rows: np.ndarray) -> np.ndarray:
    """Row words uint64 [U, 64] in the order of the accumulators, uint32 [U, 128]."""
    thread = np.arange(128)
    warp, lane = thread // 32, thread % 32
    out = np.zeros((len(rows), 128), np.uint32)
    for r in range(2):
        words = rows[:, warp * 16 + lane // 4 + 8 * r] >> (2 * (lane % 4)).astype(np.uint64)
        pairs = (words & np.uint64(0x0303030303030303))[..., None].view(np.uint8)
        shifts = (4 * np.arange(8) + 2 * r).astype(np.uint32)
        out |= np.bitwise_or.reduce(pairs.astype(np.uint32) << shifts, axis=2)
    return out


def _cost(
    block: np.ndarray, steps: np.ndarray, run_len: np.ndarray, total: int, divided: np.ndarray
) -> np.ndarray:
    """What the slower half of each block takes, in steps without a mask."""
    halves = [
        np.bincount(block, np.where(c == EMPTY, 0.1, np.where(c == FULL, 1, 1.25)), total)
        for c in steps[:, 4:6].T
    ]
    steps_of = np.maximum(*halves) + run_len
    return np.where(divided, steps_of / 2 + 0.5, steps_of)


def _split(cost: np.ndarray, copies: float, workers: int, merge_cost: float) -> np.ndarray:
    """Into how many pieces each block is split: none should outlast an even share by much, and
    blocks that stand out, a third of it, so that the others can fill up what they leave."""
    share = max(cost.sum() * copies / workers, 8.0)
    limit = np.where(cost > 3 * np.median(cost), max(share / 3, 8.0), share)
    pieces = np.maximum(2, np.rint(cost / limit))
    split = cost > np.maximum(limit, cost / pieces) + merge_cost
    return np.where(split, pieces, 1).astype(np.int64)


def _queue(costs: np.ndarray, copies: int, workers: int, together: int) -> np.ndarray:
    """The order of all items of all copies: thread block w takes entries w, w + workers, ...

    An entry is item * copies + copy, or -1; empty where no block takes two. Copies run in groups,
    heaviest items first; the items of a group that are far heavier than most run before the group
    in front of it, so that none starts last.
    """
    total = len(costs) * copies
    if total <= workers:  # the blocks take entry after entry
        return np.zeros(0, np.int64)
    items = np.arange(len(costs))
    heavy = costs > 3 * np.median(costs)
    order: list[tuple[int, np.ndarray]] = []
    for g, a in enumerate(range(0, copies, together)):
        group = np.arange(a, min(a + together, copies))
        for chosen, turn in ((heavy, 2 * g - 2), (~heavy, 2 * g + 1)):
            order.append((turn, (items[chosen][:, None] * copies + group).reshape(-1)))
    entries = np.concatenate([x for _, x in sorted(order, key=lambda pair: pair[0])])
    worker = _least_loaded(costs[entries // copies], workers)
    by_worker = np.argsort(worker, kind="stable")
    counts = np.bincount(worker, minlength=workers)
    turn = np.arange(total) - (np.cumsum(counts) - counts)[worker[by_worker]]
    queue = np.full((counts.max(), workers), -1)
    queue[turn, worker[by_worker]] = entries[by_worker]
    return queue.reshape(-1)


def _least_loaded(costs: np.ndarray, workers: int) -> np.ndarray:
    """Give items, in order, to whichever worker is free first; a worker for each."""
    load, out = np.zeros(workers), np.empty(len(costs), np.int64)
    starts = np.flatnonzero(np.append(True, costs[1:] != costs[:-1]))
    for a, z in zip(starts, np.append(starts[1:], len(costs)), strict=True):
        cost, n = costs[a], z - a
        # Of items that cost the same, worker w would begin its next ones at load, load + cost, ...
        deep = int(min(n, -(-n // workers) + (load.max() - load.min()) // cost + 1))
        begin = (load[:, None] + cost * np.arange(deep)).reshape(-1)
        first = np.argsort(begin, kind="stable")[:n]
        out[a:z] = first // deep
        load += cost * np.bincount(out[a:z], minlength=workers)
    return out


def _items(
    pieces: np.ndarray, cost: np.ndarray, run_col: np.ndarray, run_len: np.ndarray,
    n_part: np.ndarray, names: np.ndarray, pattern_of: np.ndarray, patterns: int, layout: Layout,
    divided: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:  # fmt: skip
    first_part = np.cumsum(n_part) - n_part
    of = np.repeat(np.arange(len(pieces)), pieces)
    index = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    n = pieces[of]
    full_a, full_b = run_len[of] * index // n, run_len[of] * (index + 1) // n
    part_a, part_b = n_part[of] * index // n, n_part[of] * (index + 1) // n
    # A piece of two row tiles takes two slots.
    width = np.where((layout.tiles == 2) & ~divided, 2, 1)[of]
    split, pattern = n > 1, pattern_of[of]
    slot, slots = np.full(len(of), -1), 0
    counts = np.bincount(pattern, minlength=patterns)
    items = np.full((patterns, counts.max(), 8), NONE, np.int64)
    costs = np.zeros(items.shape[:2])
    merges = []
    for p in range(patterns):
        mine = pattern == p
        taken = mine & split
        ends = np.cumsum(width[taken])
        slot[taken] = ends - width[taken]
        slots = max(slots, int(ends[-1]) if len(ends) else 0)
        order = np.flatnonzero(mine)
        order = order[np.argsort(-(cost[of] / n)[order], kind="stable")]
        second = names[of, 1] if layout.tiles == 2 or layout.paired else np.full(len(of), NONE)
        table = (
            names[of, 0], second, (run_col[of] + full_a) * TILE, full_b - full_a,
            first_part[of] + part_a, part_b - part_a, slot, 0 * slot,
        )  # fmt: skip
        items[p, : len(order)] = np.stack(table, 1)[order]
        costs[p, : len(order)] = (cost[of] / n)[order]
        begins = np.flatnonzero(taken & (index == 0))
        entries = [
            (names[of[i], half], slot[i] + half, n[i], width[i])
            for i in begins
            for half in range(width[i])
            if names[of[i], half] != NONE
        ]
        merges.append(entries)
    most = max(map(len, merges))
    padded = np.full((patterns, most, 4), NONE, np.int64)
    for p, entries in enumerate(merges):
        padded[p, : len(entries)] = np.array(entries).reshape(-1, 4)
    return items, costs, padded, slots
