"""The analytical model of the block-wise GPU kernels, which `select.py` chooses by.

Four times bound a launch from below: the products on the tensor cores, the exponentials, the
traffic from L2 to shared memory, and device memory, each input and output once. Above them stand
what thread blocks take: their share of all steps and items, or the longest item, whichever is more,
and a part of the other, since items do not divide evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..masks.sparse_mask import SparseMask

#: Of each multiprocessor of an H200: scores per us whose products of head size 64 are computed, and
#: whose exponentials are; and bytes per us of the whole device from L2 and from memory.
_TENSOR, _EXP, _L2, _MEMORY = 6.0e6 / 256, 2.8e4, 5.2e6, 4.3e6
_SCORES = 64 * 64
_UNEVEN = 0.2
#: Items longer than an even share, of at least 8 steps, by 12 are split; combining them takes 3 us.
_LEAST_SHARE, _SLACK, _MERGE = 8.0, 12.0, 3.0


@dataclass(frozen=True)
class Kernel:
    """Times in us, fitted to measurements on an H200, and thread blocks of a multiprocessor.

    start: a launch. step, item: 64 keys for 64 queries, and what an item costs besides, where the
    device is full. alone: a step of a block whose multiprocessor does little else.
    """

    start: float
    step: float
    item: float
    alone: float
    blocks: int


#: By the layout of the CUDA kernel, or "triton", and whether the head size is above 64.
KERNELS = {
    ("rows", False): Kernel(3.31, 1.12, 1.91, 0.68, 2),
    ("rows", True): Kernel(4.62, 0.84, 2.62, 0.0, 1),
    ("paired", False): Kernel(3.21, 1.06, 1.52, 0.70, 2),
    ("paired", True): Kernel(7.43, 1.24, 1.06, 0.0, 1),
    ("heads", True): Kernel(0.91, 0.94, 2.18, 0.0, 1),
    ("triton", False): Kernel(2.44, 1.52, 2.44, 0.57, 4),
    ("triton", True): Kernel(0.0, 1.21, 3.57, 0.0, 2),
}
# Two heads a block were measured with a head size of 128 only; with 64 a block does what one of two
# row tiles does.
KERNELS["heads", False] = KERNELS["rows", False]


@dataclass(frozen=True)
class _Work:
    """Of one head: items, their steps in all, the steps of the longest, and steps loaded."""

    items: float
    steps: float
    longest: float
    loads: float


def launch_us(
    name: str, mask: SparseMask, copies: int, dim: int, itemsize: int, processors: int
) -> float:
    """Predicted time of a launch in us.

    Args:
        name: "triton", or a layout of the CUDA kernel: "rows", "paired" or "heads".
        copies: number of (batch, head) pairs.
        processors: multiprocessors of the device.
    """
    if "work" not in mask.plans:
        mask.plans["work"] = _work(mask)
    kernel, work = KERNELS[name, dim > 64], mask.plans["work"][name]
    copies = copies / 2 if name == "heads" else copies
    workers = kernel.blocks * processors
    items, steps = work.items * copies / workers, work.steps * copies / workers
    full = steps * kernel.step + items * kernel.item
    whole = max(steps, _LEAST_SHARE) + _SLACK
    chain = min(work.longest, whole) * kernel.alone + min(items, 1) * kernel.item
    merge = _MERGE if work.longest > whole else 0.0
    scores = mask.plans["work"]["triton"].steps * copies * _SCORES * (1 + (name == "heads"))
    rows = (mask.q_len + mask.kv_len) * 2 * dim * itemsize * copies * (1 + (name == "heads"))
    bounds = (
        scores * (dim / 64) / (_TENSOR * processors * 4), scores / (_EXP * processors),
        work.loads * copies * 2 * 64 * dim * itemsize / _L2, rows / _MEMORY,
    )  # fmt: skip
    return kernel.start + max(full, chain, *bounds) + _UNEVEN * min(full, chain) + merge


def _work(mask: SparseMask) -> dict[str, _Work]:
    """What each kernel does for a head, on average over the mask's patterns."""
    ptr, _, length, _ = mask.host_runs()
    before = np.concatenate([[0], np.cumsum(length)])
    visits = np.diff(before[ptr], axis=1)
    patterns, tiles = visits.shape
    total, most = visits.sum() / patterns, int(visits.max())
    odd = np.pad(visits, ((0, 0), (0, tiles % 2)))
    high, low = np.maximum(odd[:, ::2], odd[:, 1::2]), np.minimum(odd[:, ::2], odd[:, 1::2])
    # Two row tiles share a block where neither would wait long for the other.
    apart = high - low > 0.3 * (high + low) + 4
    shared = high[~apart].sum() / patterns
    alone = (high + low)[apart].sum() / patterns
    longest = float(max(high[~apart].max(initial=0), high[apart].max(initial=0) / 2))
    rows = (apart.size + apart.sum()) / patterns
    return {
        "triton": _Work(tiles, total, most, total),
        "heads": _Work(tiles, total, most, total),
        "paired": _Work(tiles, total / 2 + tiles / 2, most / 2 + 0.5, total),
        "rows": _Work(rows, shared + alone / 2, longest, 1.25 * shared + alone),
    }
