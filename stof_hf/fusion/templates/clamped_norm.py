"""Residual + clamp + LayerNorm or RMSNorm: what stands between the parts of T5's blocks in fp16.

One kernel adds and normalises as if nothing overflowed, and leaves a flag a program. The other
reads all flags and, as good as always, ends; else it clamps the sums and normalises them again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...attention import select
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from .launch import launch
from .norm import SPACE, check_columns, default, fits
from .norm_common import (
    add_rows,
    check_matrix,
    check_vectors,
    normalise,
    on_device_of,
    refuse_gradients,
    store_rows,
    width,
)
from .overflow import FLAGS, LIMIT, between, check_half, flagged, flags_for, overflowed

__all__ = ["SPACE", "clamped_norm", "default", "fits"]


@triton.jit
def add_kernel(
    x_ptr, residual_ptr, weight_ptr, shift_ptr, out_ptr, sum_ptr, flag_ptr, m, each, eps,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    SHIFT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`each` times ROWS rows: their sums, these normalised, and whether one overflowed."""
    await_kernels_before(DEPENDENT)
    cols = tl.arange(0, BLOCK_N)
    found = tl.zeros([ROWS], tl.int32)
    for i in range(0, each):
        rows = (tl.program_id(0) * each + i) * ROWS + tl.arange(0, ROWS)
        inside = (rows < m)[:, None] & (cols < N)[None, :]
        x = add_rows(tl.zeros([ROWS, BLOCK_N], tl.float32), x_ptr, N, rows, cols, inside)
        x = add_rows(x, residual_ptr, N, rows, cols, inside)
        store_rows(x, sum_ptr, N, rows, cols, inside)
        found |= overflowed(x.to(sum_ptr.dtype.element_ty), inside)
        y = normalise(x, weight_ptr, shift_ptr, cols, eps, 0.0, N, RMS, SHIFT)
        store_rows(y, out_ptr, N, rows, cols, inside)
    tl.store(flag_ptr + tl.program_id(0), tl.max(found, 0))


@triton.jit
def clamp_kernel(
    sum_ptr, weight_ptr, shift_ptr, out_ptr, flag_ptr, flags, m, each, eps, limit,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    SHIFT: tl.constexpr, FLAGS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`each` times ROWS rows: sums between -limit and limit, and these normalised, if there is a
    flag."""
    await_kernels_before(DEPENDENT)
    if flagged(flag_ptr, flags, FLAGS):
        cols = tl.arange(0, BLOCK_N)
        for i in range(0, each):
            rows = (tl.program_id(0) * each + i) * ROWS + tl.arange(0, ROWS)
            inside = (rows < m)[:, None] & (cols < N)[None, :]
            x = add_rows(tl.zeros([ROWS, BLOCK_N], tl.float32), sum_ptr, N, rows, cols, inside)
            x = between(x, limit)
            store_rows(x, sum_ptr, N, rows, cols, inside)
            y = normalise(x, weight_ptr, shift_ptr, cols, eps, 0.0, N, RMS, SHIFT)
            store_rows(y, out_ptr, N, rows, cols, inside)


def clamped_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    *,
    eps: float,
    rms: bool = False,
    params: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the rows of x + residual, of which all elements are clamped to the largest number
    less 1000 if one is infinite.

    Args:
        x: [M, N], N <= 16384, fp16, contiguous.
        residual: likewise.
        norm_weight: [N], any float dtype.
        norm_bias: [N], any float dtype, added last.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm: no mean is subtracted.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        ([M, N] normalised, [M, N] the clamped sum), fp16, contiguous.

    Raises:
        UnsupportedError: a dtype, shape, stride or device that is none of the above; a tensor
            that needs a gradient.

    Example:
        >>> y, h = clamped_norm(x, h, ln.weight, eps=ln.variance_epsilon, rms=True)
        ... # doctest: +SKIP
    """
    refuse_gradients(norm_weight, norm_bias)
    check_half(x)
    check_half(residual, x)
    check_matrix("x", x)
    m, n = x.shape
    check_columns(n)
    check_vectors(n, x.device, norm_weight=norm_weight, norm_bias=norm_bias)
    params = params or default(m, n, x.device)
    out, total = torch.empty_like(x), torch.empty_like(x)
    if out.numel():
        shift = norm_weight if norm_bias is None else norm_bias
        blocks = triton.cdiv(m, params["rows"])
        each = triton.cdiv(blocks, FLAGS)
        # Where nothing overflows a program of the second kernel only costs its launch.
        each_again = triton.cdiv(blocks, 2 * select.multiprocessors(x.device))
        flags = flags_for(x, triton.cdiv(blocks, each))
        shared = {
            "N": n, "BLOCK_N": width(n), "ROWS": params["rows"], "RMS": rms,
            "SHIFT": norm_bias is not None, "num_warps": params["warps"],
            **dependent.options(x.device),
        }  # fmt: skip
        with on_device_of(x):
            launch(
                add_kernel, (len(flags),), x, residual, norm_weight, shift, out, total, flags, m,
                each, eps, **shared,
            )  # fmt: skip
            launch(
                clamp_kernel, (triton.cdiv(blocks, each_again),), total, norm_weight, shift, out,
                flags, len(flags), m, each_again, eps, LIMIT, FLAGS=FLAGS, **shared,
            )  # fmt: skip
    return out, total
