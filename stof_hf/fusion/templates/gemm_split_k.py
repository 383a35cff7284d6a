"""Linear layers of few rows on Hopper GPUs, by a CUDA kernel (csrc/cuda/gemm_split_k.cu).

The blocks of a cluster share the depth of a tile, and weights are loaded while the kernel in front
still runs: a product of 128 rows takes little longer than its rows need to be read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...attention.select import multiprocessors
from ...errors import UnsupportedError
from ...kernels.constant import weights_are_constant
from . import gemm_cuda
from .overflow import clamp as clamp_flagged
from .overflow import flags_for

__all__ = ["ROWS", "SPACE", "ClampedGemm", "Gemm", "default", "fits"]

#: Tiles, blocks that share the depth of one, and steps of 64 of it that are loaded ahead.
SPACE: dict[str, tuple[int, ...]] = {
    "block_m": (64, 128), "block_n": (64, 128), "split": (1, 2, 4, 8), "stages": (2, 3, 4, 6, 8),
}  # fmt: skip
#: More rows have tiles for all multiprocessors without that.
ROWS = 1024
_STEP = 64


@lru_cache(maxsize=4096)
def default(m: int, n: int, k: int, device: torch.device, *, gated: bool = False) -> dict[str, int]:
    """Parameters for a product [m, k] x [k, n] that nobody tuned.

    As many blocks share a tile as there are multiprocessors for, and steps.
    """
    params = {"block_m": 64 if m <= 64 else 128, "block_n": 64, "split": 1, "stages": 4}
    tiles = -(-m // params["block_m"]) * -(-n * (1 + gated) // params["block_n"])
    for split in SPACE["split"]:
        if split <= -(-k // _STEP) and 2 * tiles * split <= 3 * multiprocessors(device):
            params["split"] = split
    return params


def fits(params: dict[str, int], k: int, *, shared_memory: int) -> bool:
    """Whether the kernel was compiled for these parameters, and a block fits into so many bytes."""
    known = all(params[name] in values for name, values in SPACE.items())
    steps, (block_m, block_n) = -(-k // _STEP), (params["block_m"], params["block_n"])
    stages = min(params["stages"], -(-steps // params["split"]))
    memory = 2 * stages * _STEP * (block_m + block_n) + 4 * block_m * block_n + 2048
    return known and params["split"] <= steps and memory <= shared_memory


class Gemm(gemm_cuda.Gemm):
    """See `gemm_cuda.Gemm`; equal calls give equal bits."""

    family, space = "gemm_split_k", SPACE

    def default(self, m: int) -> dict[str, int]:
        gated = bool(self._problem.gated)
        return default(m, self.columns, self.w.shape[1], self.w.device, gated=gated)

    def before(self, problem: gemm_cuda.Problem, x: torch.Tensor) -> Any:
        problem.constant = weights_are_constant()


class ClampedGemm(Gemm):
    """The same for fp16, clamped as `overflow` does where an element is infinite; a second kernel.

    Raises UnsupportedError for another dtype.
    """

    def __init__(self, w: torch.Tensor, *args: Any, **options: Any):
        if w.dtype != torch.float16:
            raise UnsupportedError(f"only float16 is clamped, a weight is {w.dtype}: take Gemm")
        super().__init__(w, *args, **options)

    def before(self, problem: gemm_cuda.Problem, x: torch.Tensor) -> torch.Tensor:
        super().before(problem, x)
        down = -(-problem.rows // problem.block_m)
        tiles = down * -(-problem.columns // problem.block_n)
        # Each warp with 16 rows of a tile leaves one.
        flags = flags_for(x, tiles * problem.split * problem.block_m // 16)
        problem.overflow = flags.data_ptr()
        return flags

    def behind(self, out: torch.Tensor, kept: torch.Tensor) -> None:
        clamp_flagged(out, kept)
