"""A norm in front of a product: rows are normalised as their tiles are loaded.

A block first reads its rows once for their statistics, then again, out of L2, for the product. So
no normalised rows go through memory and nothing is launched for them, but each block of a row
repeats its statistics: this pays where there are few blocks, hence few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .norm_common import check_vectors, refuse_gradients

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["NORMALISING", "arguments", "check_norm", "normalised", "statistics", "statistics_bytes"]

#: What normalising a row of a tile costs, in columns of its product.
NORMALISING = 64
#: Elements that a thread reads at a time for statistics, and how many of these are in flight.
_ELEMENTS, _STAGES = 32, tl.constexpr(3)


@triton.jit
def statistics(x_rows, rows_in, k, eps, BM: tl.constexpr, CHUNK: tl.constexpr,
               NORM: tl.constexpr):  # fmt: skip
    """Means (0 for "rms") and reciprocal deviations of rows of k elements, fp32 [BM].

    Each of CHUNK columns has its own running mean and sum of squared differences (Welford), which
    are combined at the end: neither a mean far from 0 nor an outlier cancels the variance away.
    """
    at = tl.arange(0, CHUNK)
    mean = tl.zeros([BM, CHUNK], tl.float32)
    square = tl.zeros([BM, CHUNK], tl.float32)
    for start in tl.range(0, k, CHUNK, num_stages=_STAGES):
        real = (at < k - start)[None, :]
        x = tl.load(x_rows[:, None] + start + at[None, :], mask=rows_in[:, None] & real, other=0.0)
        x = x.to(tl.float32)
        if NORM == "rms":
            square += x * x
        else:
            apart = x - mean
            mean += tl.where(real, apart * (1.0 / (start // CHUNK + 1)), 0.0)
            square += tl.where(real, apart * (x - mean), 0.0)
    total = tl.zeros([BM], tl.float32)
    if NORM == "layer":
        count = (tl.maximum(k - at + CHUNK - 1, 0) // CHUNK).to(tl.float32)[None, :]
        total = tl.sum(mean * count, 1) / k
        apart = mean - total[:, None]
        square += count * apart * apart
    return total, tl.rsqrt(tl.sum(square, 1) / k + eps)


@triton.jit
def normalised(x, mean, scale, weight_ptr, shift_ptr, at, k, NORM: tl.constexpr):
    """Columns `at` of rows, normalised and rounded as the norm's own result would be."""
    y = x.to(tl.float32)
    if NORM == "layer":
        y -= mean[:, None]
    weight = tl.load(weight_ptr + at, mask=at < k, other=0.0).to(tl.float32)
    y *= scale[:, None] * weight[None, :]
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at, mask=at < k, other=0.0).to(tl.float32)[None, :]
    return y.to(x.dtype)


def _chunk(block_m: int, warps: int) -> int:
    return max(16, _ELEMENTS * 32 * warps // block_m)


def statistics_bytes(params: dict[str, int], dtype: torch.dtype) -> int:
    """Shared memory that statistics take, before the product does."""
    chunk = _chunk(params["block_m"], params["warps"])
    return _STAGES.value * params["block_m"] * chunk * dtype.itemsize


def arguments(norm: Norm | None, params: dict[str, int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A kernel's (weight, shift, eps) and (NORM, CHUNK)."""
    if norm is None:
        return (None, None, 0.0), ("none", 16)
    kind = "rms" if norm.rms else "layer"
    return (norm.weight, norm.bias, norm.eps), (kind, _chunk(params["block_m"], params["warps"]))


def check_norm(x: torch.Tensor, norm: Norm | None) -> None:
    """Raise unless x [M, K] has a norm's number of columns."""
    if norm is not None:
        refuse_gradients(norm.weight, norm.bias)
        check_vectors(x.shape[1], x.device, norm_weight=norm.weight, norm_bias=norm.bias)
