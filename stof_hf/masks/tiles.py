"""SparseMasks from elements that lie on a GPU, made there by CUDA kernels (csrc/cuda/tiles.cu).

The kernels also write what the host needs to know into its own memory, so that the host waits for
them once. It waits a second time for a mask with more than 131,072 distinct partial tiles, and for
a BlockMask of whose tiles more than an eighth is partial.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import BuildError, StofWarning
from .bits import TILE
from .blocks import BlockMaskPattern
from .device import staging, upload
from .evaluate import Grid, evaluate
from .intervals import Intervals
from .pattern import Pattern
from .sparse_mask import EMPTY, FULL, PLANS, SparseMask

_MEASURE, _BEGIN, _ADD, _FINISH = range(4)
#: What `from_dense` reads, in the order of TilesType in csrc/cuda/tiles.h.
DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Bits of `Counts.flags`, of additive masks: something is forbidden, something else than 0 added.
FORBIDS, ADDS = 1, 2

#: Tiles whose words are in the workspace at a time, 512 bytes each; tiles that a mask function is
#: evaluated on at a time; and distinct tiles that there is room for at first.
_CHUNK, _EVALUATED, _STORED = 1 << 16, 4096, 1 << 17
# What the host gets at once. What exceeds it (of which the words are for plans alone) is fetched.
_HOST_COUNTS, _HOST_INTS, _HOST_TILES = 8, 1 << 19, 12_000
_MOST_TILES = 1 << 28


class Problem(ctypes.Structure):
    """`stof::TilesProblem` of csrc/cuda/tiles.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("stage", "patterns", "q_len", "kv_len")),
        ("source", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "type", "heads", "batch_stride", "head_stride", "row_stride", "col_stride",
                "source_rows", "source_cols",
            )
        ),
        ("tiles", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "rows", "chunk")),
        *(
            (name, ctypes.c_void_p)
            for name in ("content", "found", "out", "workspace", "host", "wanted")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "chunk_tiles", "slots", "capacity", "host_ints", "host_tiles", "workspace_bytes",
            )
        ),
    ]  # fmt: skip


class Counts(NamedTuple):
    """What the device counted: see TilesCount in csrc/cuda/tiles.h."""

    runs: int
    distinct: int
    patterns: int
    occupied: int
    flags: int
    wanted: int


@lru_cache
def library(device: torch.device) -> ctypes.CDLL | None:
    """The kernels for a device; None where it is no GPU, and, with one warning, without a build."""
    if device.type != "cuda":
        return None
    from ..kernels import cuda_build

    try:
        made = cuda_build.library("tiles", None, None, device.index)
    except BuildError as error:
        warnings.warn(
            "stof_hf: masks given as tensors, functions and BlockMasks are built by PyTorch, which "
            f"takes milliseconds longer ({error})",
            StofWarning,
            stacklevel=2,
        )
        return None
    if made.stof_problem_bytes() != ctypes.sizeof(Problem):
        raise BuildError("csrc/cuda/tiles.h and stof_hf/masks/tiles.py do not agree")
    return made


def serves(device: torch.device, grid: Grid) -> bool:
    """Whether the kernels build a mask of this size on this device."""
    return grid.count <= _MOST_TILES and library(device) is not None


class _Builder:
    """Takes tiles of one mask, then makes the mask.

    Args:
        content: int32 [tiles], FULL or EMPTY for those that are not added.
        most: how many are added at most, and in one chunk.
        capacity: how many distinct partial tiles there is room for.
        wanted: int64 [1] on the device, which `count` returns as well.
    """

    def __init__(
        self,
        grid: Grid,
        content: torch.Tensor,
        most: tuple[int, int],
        capacity: int,
        wanted: torch.Tensor | None,
    ):
        self.grid, self.device, self.capacity = grid, content.device, capacity
        self.patterns = grid.batch * grid.heads
        self.stream = torch.cuda.current_stream(self.device) if content.is_cuda else None
        self.library = library(self.device)
        ints = 2 * _HOST_COUNTS + _HOST_INTS + 2 * TILE * _HOST_TILES
        self.host = staging(ints, self.device)
        self.found = self._empty(capacity * TILE, torch.int64)
        pointers = self.patterns * (grid.rows + 1)
        arrays = (self.patterns, pointers, *(3 * [grid.count]))
        self.out = self._empty(sum(map(_aligned, arrays)), torch.int32)
        self.problem = p = Problem(
            patterns=self.patterns, q_len=grid.q_len, kv_len=grid.kv_len,
            content=content.data_ptr(), found=self.found.data_ptr(), out=self.out.data_ptr(),
            host=self.host.data_ptr(), wanted=None if wanted is None else wanted.data_ptr(),
            chunk_tiles=most[1], slots=1 << (2 * most[0]).bit_length(), capacity=capacity,
            host_ints=_HOST_INTS, host_tiles=_HOST_TILES,
        )  # fmt: skip
        self._call(_MEASURE)
        self.workspace = self._empty(p.workspace_bytes, torch.uint8)
        p.workspace = self.workspace.data_ptr()
        # The problem holds their addresses.
        self.kept = (content, wanted)
        self._call(_BEGIN)

    def _empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _call(self, stage: int) -> None:
        self.problem.stage = stage
        stream = None if self.stream is None else self.stream.cuda_stream
        message = self.library.stof_run(ctypes.addressof(self.problem), stream)
        if message:
            raise RuntimeError(f"stof_hf could not build a mask: {message.decode()}")

    def add_dense(self, mask: torch.Tensor) -> None:
        """All tiles of `mask`, [batch, heads, Sq, Sk]."""
        p, rows = self.problem, self.patterns * self.grid.rows
        self._source(mask)
        step = p.chunk_tiles // self.grid.columns
        for first in range(0, rows, step):
            p.first, p.rows = first, min(step, rows - first)
            self._add()

    def add_tiles(self, allowed: torch.Tensor, ids: torch.Tensor) -> None:
        """Tiles `ids`, int32 [n], whose values are bool [64, n, 64]; those below 0 are skipped."""
        allowed = allowed.contiguous()
        self._source(allowed.view(1, 1, TILE, -1))
        self.problem.tiles = ids.data_ptr()
        self.problem.first, self.problem.rows = 0, 1
        self._add()

    def _source(self, x: torch.Tensor) -> None:
        p = self.problem
        p.source, p.type = x.data_ptr(), DTYPES.index(x.dtype)
        _, p.heads, p.source_rows, p.source_cols = x.shape
        p.batch_stride, p.head_stride, p.row_stride, p.col_stride = (
            stride if size > 1 or i == 3 else 0
            for i, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
        )

    def _add(self) -> None:
        self._call(_ADD)
        self.problem.chunk += 1

    def count(self) -> Counts:
        """Finishes the arrays and waits for them."""
        self._call(_FINISH)
        if self.stream is not None:
            self.stream.synchronize()
        return Counts(*self.host.numpy()[: 2 * len(Counts._fields)].view(np.int64).tolist())

    def mask(self, counts: Counts) -> SparseMask:
        """The mask, whose arrays hold no more than they need."""
        grid, width = self.grid, self.grid.rows + 1
        sizes = (self.patterns, counts.patterns * width, *(3 * [counts.runs]))
        *at, total = np.cumsum([0, *map(_aligned, sizes)]).tolist()
        ints, host = self.out[:total].clone(), self.host.numpy()[2 * _HOST_COUNTS :]
        known = host[:total].copy() if total <= _HOST_INTS else ints.cpu().numpy()
        parts = [known[a : a + size] for a, size in zip(at, sizes, strict=True)]
        pairs = self.patterns * -(-grid.q_len // 16) * -(-grid.kv_len // 16)
        plans: dict[Any, Any] = {
            "host_runs": (parts[1].reshape(-1, width), *parts[2:]),
            "valid_share": counts.occupied / pairs,
        }
        if counts.distinct <= _HOST_TILES:
            words = host[_HOST_INTS:][: counts.distinct * 2 * TILE].copy()
            plans["host_words"] = words.view(np.uint64).reshape(-1, TILE)
        mask = SparseMask(
            grid.q_len,
            grid.kv_len,
            pattern_id=ints.as_strided((grid.batch, grid.heads), (grid.heads, 1), at[0]),
            row_ptr=ints.as_strided((counts.patterns, width), (width, 1), at[1]),
            run_col=ints.as_strided((counts.runs,), (1,), at[2]),
            run_len=ints.as_strided((counts.runs,), (1,), at[3]),
            run_bits=ints.as_strided((counts.runs,), (1,), at[4]),
            tile_bits=self.found[: counts.distinct * TILE].clone().view(-1, TILE),
            q_offset=grid.q_offset,
            kv_offset=grid.kv_offset,
            plans=plans,
        )
        PLANS[mask.tile_bits] = plans
        return mask


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def _built(
    grid: Grid,
    content: torch.Tensor,
    most: tuple[int, int],
    feed: Callable[[_Builder], Counts],
    wanted: torch.Tensor | None = None,
) -> tuple[SparseMask, Counts]:
    device, capacity = content.device, min(max(1, most[0]), _STORED)
    on_device = torch.cuda.device(device) if content.is_cuda else contextlib.nullcontext()
    with on_device:
        while True:
            builder = _Builder(grid, content, most, capacity, wanted)
            counts = feed(builder)
            if counts.distinct <= capacity:
                return builder.mask(counts), counts
            capacity = counts.distinct


def from_dense(mask: torch.Tensor) -> tuple[SparseMask, int]:
    """The mask of a tensor [Sq, Sk] or [batch, heads, Sq, Sk] on a device that `serves`, and flags.

    Args:
        mask: booleans, or additive floats, of which those up to half of the least value forbid.

    Dimensions expanded from one element are read once.
    """
    mask = mask[None, None] if mask.ndim == 2 else mask
    sizes = mask.shape[:2]
    for dim in (0, 1):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    grid = Grid(*mask.shape)
    content = torch.empty(grid.count, dtype=torch.int32, device=mask.device)
    rows = grid.batch * grid.heads * grid.rows
    chunk = min(rows, max(1, _CHUNK // grid.columns)) * grid.columns

    def feed(builder: _Builder) -> Counts:
        builder.add_dense(mask)
        return builder.count()

    made, counts = _built(grid, content, (grid.count, chunk), feed)
    if made.pattern_id.shape != sizes:
        object.__setattr__(made, "pattern_id", made.pattern_id.expand(sizes).contiguous())
    return made, counts.flags


def from_function(
    pattern: Pattern,
    grid: Grid,
    full: Intervals,
    row: np.ndarray,
    tile: np.ndarray,
    device: torch.device,
) -> SparseMask:
    """The mask of a pattern that is evaluated on `device`, which `serves`.

    Args:
        full: tiles of each tile row that are known to be full.
        row, tile: the tiles to evaluate; all others are empty.
    """
    content = np.full(grid.count, EMPTY, np.int32)
    known_row, known_tile = full.tiles()
    content[known_row * grid.columns + known_tile] = FULL
    ids = upload(torch.from_numpy((row * grid.columns + tile).astype(np.int32)), device)
    return _evaluated(pattern, grid, upload(torch.from_numpy(content), device), ids, None)


def from_block_mask(pattern: BlockMaskPattern, grid: Grid) -> SparseMask:
    """The mask of a BlockMask on a device that `serves`."""
    touched, full = (x.flatten() for x in pattern.tiles())
    content = torch.where(full, FULL, EMPTY).to(torch.int32)
    partial = touched & ~full
    # The tiles to evaluate come first; how many there are, only the device knows.
    place = torch.where(partial, partial.cumsum(0) - 1, grid.count)
    tile = torch.arange(grid.count, dtype=torch.int32, device=place.device)
    ids = torch.full_like(place, -1, dtype=torch.int32)
    ids = torch.nn.functional.pad(ids, (0, 1)).scatter_(0, place, tile)[:-1]
    return _evaluated(pattern, grid, content, ids, partial.sum(dtype=torch.int64))


def _evaluated(
    pattern: Pattern,
    grid: Grid,
    content: torch.Tensor,
    ids: torch.Tensor,
    wanted: torch.Tensor | None,
) -> SparseMask:
    """Evaluates tiles `ids`, int32 [n]; of those, as many as `wanted` says, where it is given."""

    def feed(builder: _Builder) -> Counts:
        done, end = 0, len(ids)
        if wanted is not None:
            end = min(end, max(2 * _EVALUATED, end // 8))
        while True:
            for first in range(done, end, _EVALUATED):
                part = ids[first : min(first + _EVALUATED, end)]
                builder.add_tiles(evaluate(pattern, grid, part.clamp(min=0).long()), part)
            counts = builder.count()
            if wanted is None or counts.wanted <= end:
                return counts
            done, end = end, counts.wanted

    chunk = min(max(1, len(ids)), _EVALUATED)
    return _built(grid, content, (max(1, len(ids)), chunk), feed, wanted)[0]
