"""What the CUDA tensor-core kernels stream: query rows and granules of 16 keys, packed densely.

The keys that a tile of 64 query rows sees come as thin stripes: a global column, a band, a random
block. Granules of 16 keys that hold something are put together to steps of 64. Rows that see far
more than their neighbours (global tokens) are taken out of their tiles and share tiles of their
own. csrc/cuda/problem.h describes the arrays.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch

from ..masks import native
from ..masks.bits import TILE
from ..masks.device import upload
from ..masks.sparse_mask import SparseMask

NONE = -(2**31)
# Mirrors stof::PlanRequest in csrc/plan/plan.h.
_REQUEST = struct.Struct("18q2d")


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
    merge_cost: float = 8.0


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


@dataclass(frozen=True)
class Work:
    """What a kernel has to do for a head, on average over the mask's patterns: items, what their
    steps cost (a full one 1), that of the longest, and steps that are loaded."""

    items: float
    steps: float
    longest: float
    loads: float


def work_of(mask: SparseMask) -> dict[str, Work]:
    """By the name of the layout, or "triton" for the Triton kernel, which visits whole tiles."""
    numbers = (ctypes.c_double * 16)()
    if not native.library().stof_work(_request(mask, Layout(1, False), 1, 1, 1), numbers):
        raise MemoryError("what a mask's plan takes does not fit into the host's memory")
    names = ("triton", "heads", "paired", "rows")
    return {name: Work(*numbers[4 * i : 4 * i + 4]) for i, name in enumerate(names)}


def _request(mask: SparseMask, layout: Layout, copies: int, workers: int, together: int) -> bytes:
    arrays = mask.host_arrays()
    patterns, tile_rows = arrays[0].shape[0], arrays[0].shape[1] - 1
    # The arrays live as long as the mask.
    return _REQUEST.pack(
        *(x.ctypes.data for x in arrays),
        patterns, tile_rows, len(arrays[4]), mask.q_len, mask.kv_len,
        layout.tiles, layout.paired, copies, workers, together, *native.threads(),
        layout.item_cost, layout.merge_cost,
    )  # fmt: skip


def _granule_plan(
    mask: SparseMask, layout: Layout, copies: int, workers: int, together: int
) -> GranulePlan:
    patterns = len(mask.row_ptr)
    info = (ctypes.c_int64 * 14)()
    result = native.library().stof_plan(_request(mask, layout, copies, workers, together), info)
    items, steps, contents, rows, merges, queue, slots, *at, size = info
    each, apart = items // patterns, merges // patterns
    part = upload(native.take(result, size, mask.device), mask.device).as_strided
    return GranulePlan(
        items=part((patterns, each, 8), (8 * each, 8, 1), at[0]),
        steps=part((steps, 8), (8, 1), at[1]),
        bits=part((contents, 128), (128, 1), at[2]),
        rows=part((rows, TILE), (TILE, 1), at[3]),
        merges=part((patterns, apart, 4), (4 * apart, 4, 1), at[4]),
        queue=part((queue,), (1,), at[5]),
        slots=slots,
    )
