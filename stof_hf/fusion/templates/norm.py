"""Bias + residual + LayerNorm or RMSNorm.

A program holds whole rows in registers: it reads each element once and writes it once, twice where
the sum is asked for too. Statistics are fp32, of the sum before it is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...attention import select
from ...errors import UnsupportedError
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from .launch import launch
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

MAX_COLUMNS = 16384
SPACE: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4, 8, 16, 32),
    "warps": (1, 2, 4, 8, 16, 32),
}


def default(m: int, n: int, device: torch.device) -> dict[str, int]:
    """Parameters of an untuned call on [m, n]: 8 elements a thread; several short rows a program.

    More rows than one are taken only while every multiprocessor still gets several programs.
    """
    block, rows = width(n), 1
    enough = 8 * select.multiprocessors(device)
    while rows * block < 1024 and m // (2 * rows) >= enough:
        rows *= 2
    warps = min(32, max(1, rows * block // 256))
    return {"rows": rows, "warps": warps}


def fits(params: dict[str, int], n: int, *, shared_memory: int) -> bool:
    """Whether rows of n elements stay in registers with these parameters, half of a thread's."""
    threads = 32 * params["warps"]
    per_thread = params["rows"] * width(n) / threads
    # Vectors change threads, and warps that share a row exchange their sums.
    taken = 4 * width(n) + 4 * params["rows"] * params["warps"]
    return (
        n <= MAX_COLUMNS
        and 1 <= per_thread <= min(64, (32 << 10) // threads)
        and taken <= shared_memory
    )


def check_columns(n: int) -> None:
    """Raise where rows of n elements are too long for a program."""
    if n > MAX_COLUMNS:
        raise UnsupportedError(
            f"rows of {n} elements do not fit into registers, the longest has {MAX_COLUMNS}: "
            "leave this norm unfused"
        )


@triton.jit
def norm_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, shift_ptr, out_ptr, sum_ptr,
    m, x_stride, residual_stride, eps, offset,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ROWS rows; out and sum are contiguous."""
    await_kernels_before(DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < N)[None, :]
    x = add_rows(tl.zeros([ROWS, BLOCK_N], tl.float32), x_ptr, x_stride, rows, cols, inside)
    if BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        x = add_rows(x, residual_ptr, residual_stride, rows, cols, inside)
    if SUM:
        store_rows(x, sum_ptr, N, rows, cols, inside)
    y = normalise(x, weight_ptr, shift_ptr, cols, eps, offset, N, RMS, SHIFT)
    store_rows(y, out_ptr, N, rows, cols, inside)


def norm(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    eps: float,
    rms: bool = False,
    offset: float = 0.0,
    return_sum: bool = False,
    params: dict[str, int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the rows of x + bias + residual.

    Args:
        x: [M, N], N <= 16384, fp16, bf16 or fp32; rows may lie apart, a row's elements may not.
        norm_weight: [N], any float dtype.
        norm_bias: [N], any float dtype, added last.
        bias: [N], any float dtype, added to x: that of the projection before.
        residual: [M, N], x's dtype, any distance between rows.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm: no mean is subtracted.
        offset: added to norm_weight, 1.0 for Gemma.
        return_sum: whether to return x + bias + residual too, the residual of what comes next.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        [M, N] contiguous, x's dtype; with return_sum, (this, the sum, likewise).

    Raises:
        UnsupportedError: a dtype, shape, stride or device that is none of the above; a tensor
            that needs a gradient.

    Example:
        >>> y, h = norm(x, ln.weight, ln.bias, residual=h, eps=ln.eps, return_sum=True)
        ... # doctest: +SKIP
    """
    refuse_gradients(x, norm_weight, norm_bias, bias, residual)
    check_matrix("x", x)
    m, n = x.shape
    check_columns(n)
    check_vectors(n, x.device, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias)
    if residual is not None:
        check_matrix("residual", residual, x)
    params = params or default(m, n, x.device)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if return_sum else out
    if out.numel():
        with on_device_of(x):
            launch(
                norm_kernel, (triton.cdiv(m, params["rows"]),),
                x, x if bias is None else bias, x if residual is None else residual,
                norm_weight, norm_weight if norm_bias is None else norm_bias, out, total,
                m, x.stride(0), 0 if residual is None else residual.stride(0), eps, offset,
                N=n, BLOCK_N=width(n), ROWS=params["rows"], RMS=rms, BIAS=bias is not None,
                RESIDUAL=residual is not None, SHIFT=norm_bias is not None, SUM=return_sum,
                num_warps=params["warps"], **dependent.options(x.device),
            )  # fmt: skip
    return (out, total) if return_sum else out
