"""GEMM + bias + residual + norm, for outputs whose whole row fits into one program.

A program multiplies BLOCK_M rows of x with all of the weight (BLOCK_N is the power of two that
holds N), adds bias and residual to the accumulators and normalises them where they are. Each
program reads the weight from L2, and accumulators limit BLOCK_M, so this pays for small M and N.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from ...attention import select
from ...attention.triton import INTERPRETED
from ...attention.triton_kernels import _dot
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

MAX_COLUMNS = 1024

SPACE: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64),
    "block_k": (16, 32, 64, 128),
    "warps": (4, 8, 16),
    "stages": (1, 2, 3, 4),
}


def default(m: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Parameters of an untuned call with m rows of n outputs.

    As many rows a program as keep every multiprocessor busy, then as many tiles in flight as fit.
    """
    memory, busy = select.shared_memory(device), select.multiprocessors(device)
    for block_m in [b for b in (64, 32) if m >= b * busy] + [16]:
        warps = (4, 8, 16) if block_m * width(n) <= 8192 else (8, 16, 4)
        for choice in product((4, 3, 2, 1), (64, 32, 16), warps):
            params = dict(zip(("stages", "block_k", "warps"), choice, strict=True))
            params["block_m"] = block_m
            if fits(params, n, dtype, shared_memory=memory):
                return params
    raise UnsupportedError(
        f"rows of {n} outputs do not fit into one program: run the projection and `norm` apart"
    )


def fits(params: dict[str, int], n: int, dtype: torch.dtype, *, shared_memory: int) -> bool:
    """Whether accumulators and addresses stay in registers and the tiles in shared memory."""
    block_m, block_k, stages = params["block_m"], params["block_k"], params["stages"]
    block_n, threads = width(n), 32 * params["warps"]
    tile = (block_m + block_n) * block_k * dtype.itemsize
    # A thread copies 16 bytes at a time, to and from 64-bit addresses.
    registers = block_m * block_n / threads + 2 * tile / 16 / threads
    # fp32 operands are split into two parts, which stay in registers too.
    share = 0.4 if dtype == torch.float32 else 0.7
    # wgmma reads a tile where it was copied to, smaller products are loaded a step ahead.
    tiles = tile * (stages if block_m >= 64 else max(1, stages - 1))
    # Results change threads before they are stored, 64 KB at a time.
    results = min(64 << 10, 4 * block_m * block_n)
    return (
        n <= MAX_COLUMNS
        and registers <= share * min(255, (64 << 10) // threads)
        and max(tiles, results) <= shared_memory
    )


@triton.jit
def gemm_norm_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, weight_ptr, shift_ptr, out_ptr, sum_ptr,
    m, x_stride, w_n, w_k, residual_stride, eps, offset,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows; out and sum are contiguous."""
    await_kernels_before(DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    rows_in, cols_in = rows < m, cols < N
    x_ptrs = x_ptr + rows[:, None] * x_stride + ks[None, :]
    # The host sees to it that 32 bits suffice within the weight.
    w_offsets = ks[:, None] * w_k + cols[None, :] * w_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_in = ks < K - start
        x = tl.load(x_ptrs + start, mask=rows_in[:, None] & k_in[None, :], other=0.0)
        w = tl.load(w_ptr + start * w_k + w_offsets, mask=k_in[:, None] & cols_in[None, :],
                    other=0.0)  # fmt: skip
        acc = _dot(x, w, acc, INTERPRETED)
    inside = rows_in[:, None] & cols_in[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols_in, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        acc = add_rows(acc, residual_ptr, residual_stride, rows, cols, inside)
    if SUM:
        store_rows(acc, sum_ptr, N, rows, cols, inside)
    y = normalise(acc, weight_ptr, shift_ptr, cols, eps, offset, N, RMS, SHIFT)
    store_rows(y, out_ptr, N, rows, cols, inside)


def gemm_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    """Normalise the rows of x @ weight.T + bias + residual.

    Args:
        x: [M, K], fp16, bf16 or fp32; rows may lie apart, a row's elements may not.
        weight: [N, K], N <= 1024, x's dtype, any strides: an nn.Linear's weight, or a Conv1D's
            transposed.
        norm_weight: [N], any float dtype.
        norm_bias: [N], any float dtype, added last.
        bias: [N], any float dtype, that of the projection.
        residual: [M, N], x's dtype, any distance between rows.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm: no mean is subtracted.
        offset: added to norm_weight, 1.0 for Gemma.
        return_sum: whether to return x @ weight.T + bias + residual too.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        [M, N] contiguous, x's dtype; with return_sum, (this, the sum, likewise).

    Raises:
        UnsupportedError: a dtype, shape, stride or device that is none of the above; a tensor
            that needs a gradient.

    Example:
        >>> y = gemm_norm(x, dense.weight, ln.weight, ln.bias, dense.bias, h, eps=ln.eps)
        ... # doctest: +SKIP
    """
    refuse_gradients(x, weight, norm_weight, norm_bias, bias, residual)
    check_matrix("x", x)
    m, k = x.shape
    check_weight(weight, x)
    n = weight.shape[0]
    check_vectors(n, x.device, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if residual is not None:
        check_matrix("residual", residual, out)
    params = params or default(m, n, x.dtype, x.device)
    total = torch.empty_like(out) if return_sum else out
    if out.numel():
        with on_device_of(x):
            launch(
                gemm_norm_kernel, (triton.cdiv(m, params["block_m"]),),
                x, weight, x if bias is None else bias, x if residual is None else residual,
                norm_weight, norm_weight if norm_bias is None else norm_bias, out, total,
                m, x.stride(0), *weight.stride(), 0 if residual is None else residual.stride(0),
                eps, offset,
                N=n, K=k, BLOCK_M=params["block_m"], BLOCK_N=width(n), BLOCK_K=params["block_k"],
                RMS=rms, BIAS=bias is not None, RESIDUAL=residual is not None,
                SHIFT=norm_bias is not None, SUM=return_sum, INTERPRETED=INTERPRETED,
                num_warps=params["warps"], num_stages=params["stages"],
                **dependent.options(x.device),
            )  # fmt: skip
    return (out, total) if return_sum else out


def check_weight(weight: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless the weight can be multiplied with x, within reach of 32-bit offsets."""
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise UnsupportedError(
            f"weight must be [N, {x.shape[1]}], not {list(weight.shape)}: a Conv1D's is passed as "
            "weight.T"
        )
    if (weight.dtype, weight.device) != (x.dtype, x.device):
        raise UnsupportedError(
            f"weight is {weight.dtype} on {weight.device}, x {x.dtype} on {x.device}: convert one"
        )
    reach = sum(
        (size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True)
    )
    if reach + 128 * max(weight.stride()) >= 1 << 31:
        raise UnsupportedError(
            f"weight {list(weight.shape)} spans more than 2^31 elements: run the projection and "
            "`norm` apart"
        )
