"""Linear layers of many rows on Hopper GPUs, by a CUDA kernel (csrc/cuda/gemm.cu).

A warpgroup computes what is behind its product while another's keeps the tensor cores busy, which
Triton's compiler does not arrange.
"""

from __future__ import annotations

import torch

from ...attention.select import multiprocessors
from . import gemm_cuda

__all__ = ["SPACE", "Gemm", "default", "fits"]

#: Tiles have so many rows of the weight; so many pairs of row tiles are walked together.
SPACE: dict[str, tuple[int, ...]] = {"block_n": (128, 192), "group": (4, 8, 16)}
#: Rows of two tiles, one below the other, which a cluster computes.
_PAIR = 256


def default(m: int, n: int, device: torch.device, *, gated: bool = False) -> dict[str, int]:
    """Parameters for m rows and n columns of the result that nobody tuned.

    The tile whose rounds over the multiprocessors cost less: a round takes as long as the tile is
    wide, and what is loaded for it.
    """
    clusters = multiprocessors(device) // 2

    def cost(block_n: int) -> int:
        across = -(-n * (1 + gated) // block_n)
        return -(-across * -(-m // _PAIR) // clusters) * (block_n + 64)

    return {"block_n": min(reversed(SPACE["block_n"]), key=cost), "group": 8}


def fits(params: dict[str, int]) -> bool:
    """Whether the kernel was compiled for these parameters."""
    return all(params[name] in values for name, values in SPACE.items())


class Gemm(gemm_cuda.Gemm):
    """See `gemm_cuda.Gemm`."""

    family, space = "gemm", SPACE

    def default(self, m: int) -> dict[str, int]:
        return default(m, self.columns, self.w.device, gated=bool(self._problem.gated))
