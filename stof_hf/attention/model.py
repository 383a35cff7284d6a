"""The analytical model of the block-wise GPU kernels, which `select.py` chooses by.

Four times bound a launch from below: the products on the tensor cores, the exponentials, the
traffic from L2 to shared memory, and device memory, each input and output once. Above them stand
what thread blocks take: their share of all steps and items, or the longest item, whichever is more,
and a part of the other, since items do not divide evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..masks.sparse_mask import SparseMask
from .granules import work_of
from .plan import run_share

#: Of each multiprocessor of an H200: scores per us whose products of head size 64 are computed, and
#: whose exponentials are; and bytes per us of the whole device from L2 and from memory.
_TENSOR, _EXP, _L2, _MEMORY = 6.0e6 / 256, 2.8e4, 5.2e6, 4.3e6
_SCORES = 64 * 64
_UNEVEN = 0.2
#: Items longer than an even share, of at least 8 steps, by 8 (12 where the head size is above 64)
#: are split; combining them takes 3 us.
_LEAST_SHARE, _SLACK, _MERGE = 8.0, {False: 8.0, True: 12.0}, 3.0
#: From this share of tiles in long runs of full ones on, the Triton kernel uses wider blocks.
_RUNS = 0.6


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


#: By the layout of the CUDA kernel, "triton", or "runs" for the Triton kernel of masks with long
#: runs of full tiles; and whether the head size is above 64.
KERNELS = {
    ("rows", False): Kernel(3.27, 1.30, 1.38, 0.72, 2),
    ("rows", True): Kernel(1.00, 1.00, 1.69, 1.73, 1),
    ("paired", False): Kernel(3.10, 1.43, 0.86, 0.81, 2),
    ("paired", True): Kernel(2.03, 1.49, 0.53, 2.08, 1),
    ("heads", True): Kernel(1.00, 1.00, 1.77, 1.16, 1),
    ("triton", False): Kernel(2.36, 1.68, 2.00, 0.67, 4),
    ("triton", True): Kernel(2.64, 1.14, 3.57, 0.30, 2),
    ("runs", False): Kernel(1.00, 0.99, 3.20, 0.62, 3),
    ("runs", True): Kernel(1.00, 1.05, 5.20, 0.62, 2),
}
# Two heads a block were measured with a head size of 128 only; with 64 a block does what one of two
# row tiles does.
KERNELS["heads", False] = KERNELS["rows", False]


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
        mask.plans["work"] = work_of(mask)
    work, large = mask.plans["work"][name], dim > 64
    runs = name == "triton" and run_share(mask) > _RUNS
    kernel = KERNELS["runs" if runs else name, large]
    copies = copies / 2 if name == "heads" else copies
    workers = kernel.blocks * processors
    items, steps = work.items * copies / workers, work.steps * copies / workers
    full = steps * kernel.step + items * kernel.item
    whole = max(steps, _LEAST_SHARE) + _SLACK[large]
    chain = min(work.longest, whole) * kernel.alone + min(items, 1) * kernel.item
    merge = _MERGE if work.longest > whole else 0.0
    scores = mask.plans["work"]["triton"].steps * copies * _SCORES * (1 + (name == "heads"))
    rows = (mask.q_len + mask.kv_len) * 2 * dim * itemsize * copies * (1 + (name == "heads"))
    # Wider blocks load the keys of two row tiles once.
    loads = work.loads / (1 + runs) * copies * 2 * 64 * dim * itemsize
    bounds = (
        scores * (dim / 64) / (_TENSOR * processors * 4), scores / (_EXP * processors),
        loads / _L2, rows / _MEMORY,
    )  # fmt: skip
    return kernel.start + max(full, chain, *bounds) + _UNEVEN * min(full, chain) + merge


class BandForm(NamedTuple):
    """How the band kernel divides its work: query rows of a block, and heads that share keys which
    as many blocks compute side by side."""

    rows: int
    heads: int = 1


#: Of the band kernel, by whether the head size is above 64: what a launch, an item, and a step of
#: 128 keys take, in us.
BAND = {
    False: {BandForm(192): (1.9, 1.40, 1.59), BandForm(128): (2.0, 1.05, 1.29)},
    True: {BandForm(128): (0.5, 2.0, 1.705), BandForm(128, 2): (0.8, 2.2, 1.66)},
}
_BAND_STEP = 128
#: The part of a step's time that it takes where no warpgroup computes, and what it takes besides,
#: in us, where not all of its rows see all of its keys.
_BAND_PASSED, _BAND_CUT = 0.3, 0.25


@lru_cache(maxsize=256)
def band_us(
    form: BandForm, copies: int, q_len: int, kv_len: int, band: tuple[int, int], offset: int,
    together: int, dim: int, processors: int,
) -> float:  # fmt: skip
    """Predicted time of csrc/cuda/band.cu in us: what the busiest block takes of the items, which
    are dealt out in turns of alternating direction.

    Args:
        form: of its blocks.
        band: keys that a query sees before and behind its own position.
        offset: of the first query against the first key.
        together: heads whose items follow each other, the longest first.
    """
    start, item, step = BAND[dim > 64][form]
    rows, copies, together = form.rows, copies // form.heads, max(1, together // form.heads)
    processors //= form.heads
    tile = np.arange(-(-q_len // rows))[:, None]
    first = -(-q_len // 64) * 64 - (tile + 1) * rows + np.arange(0, rows, 64)
    last = np.minimum(first + 64, q_len) - 1
    begin = np.maximum(0, np.maximum(0, first) + offset - band[0]) // _BAND_STEP
    end = -(-np.clip(last + offset + band[1] + 1, 0, kv_len) // _BAND_STEP)
    own = np.where(last < 0, 0, np.maximum(0, end - begin))
    whole_begin = -(-np.maximum(0, last + offset - band[0]) // _BAND_STEP)
    whole_end = np.clip(first + offset + band[1] + 1, 0, kv_len) // _BAND_STEP
    cut = np.where(last < 0, 0, own - np.maximum(0, whole_end - whole_begin))
    passed = np.maximum(0, end.max(1) - begin.min(1))
    shares = _BAND_PASSED * passed + (1 - _BAND_PASSED) * own.mean(1)
    times = item + step * shares + _BAND_CUT * cut.mean(1)
    sections = [together] * (copies // together) + [copies % together]
    dealt = np.concatenate([np.repeat(times, heads) for heads in sections])
    dealt = np.pad(dealt, (0, -len(dealt) % processors)).reshape(-1, processors)
    dealt[1::2] = dealt[1::2, ::-1]
    return start + float(dealt.sum(0).max())


def cudnn_us(copies: int, q_len: int, kv_len: int, dim: int, processors: int) -> float:
    """Predicted time of cuDNN's attention without a mask in us: blocks of 128 queries, one to a
    multiprocessor, in steps of 128 keys; fitted to an H200, whose clocks sink in long launches."""
    waves = math.ceil(copies * math.ceil(q_len / 128) / processors)
    us = 3.5 + waves * (1.22 + math.ceil(kv_len / 128) * (0.592 + 0.0085 * dim))
    return us * (1 + 0.065 * min(us / 800, 1))
