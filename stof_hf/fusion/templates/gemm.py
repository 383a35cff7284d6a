"""Linear layer with a norm in front, bias, activation and residual behind, in one kernel.

A block computes one tile of the result. It reads both operands by plain pointers: the strides of
the weight decide which of its dimensions is loaded in vectors, so that nn.Linear's [N, K] and
GPT-2's Conv1D [K, N] need no copy. Everything after the product is in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from . import common
from .common import (
    SPACE,
    activate,
    check_rows,
    dot,
    fetch_weights,
    tile_of,
    weight_pointers,
)
from .launch import launch
from .overflow import clamp as clamp_flagged
from .overflow import flags_for, overflowed
from .prologue import arguments, check_norm, normalised, statistics

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["SPACE", "default", "fits", "gemm"]


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, flag_ptr, norm_ptr, shift_ptr, eps,
    m, n, k, x_m, w_n, w_k, residual_m,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    CLAMP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    NORM: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of act(norm(x) @ w^T + bias) + residual, and whether it overflowed."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP_M)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    fetch_weights(w_ptr, columns, n, k, w_n, w_k, BN, DEPENDENT)
    await_kernels_before(DEPENDENT)
    rows_in = rows < m
    columns_in = columns < n
    rows = rows.to(tl.int64)
    x_rows = x_ptr + rows * x_m
    x_ptrs = x_rows[:, None] + tl.arange(0, BK)[None, :]
    w_ptrs = weight_pointers(w_ptr, columns, w_n, w_k, BK)
    w_step = tl.full([], BK, tl.int64) * w_k
    # Else ptxas 12.8 serialises wgmma: a loop of no steps would be a second source of acc.
    tl.assume(k > 0)
    if NORM != "none":
        mean, scale = statistics(x_rows, rows_in, k, eps, BM, CHUNK, NORM)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        x_in = rows_in[:, None]
        w_in = columns_in[None, :]
        if not EVEN_K:
            k_in = tl.arange(0, BK) < k - start
            x_in = x_in & k_in[None, :]
            w_in = w_in & k_in[:, None]
        x = tl.load(x_ptrs, mask=x_in, other=0.0)
        w = tl.load(w_ptrs, mask=w_in, other=0.0)
        if NORM != "none":
            at = start + tl.arange(0, BK)
            x = normalised(x, mean, scale, norm_ptr, shift_ptr, at, k, NORM)
        acc = dot(x, w, acc)
        x_ptrs += BK
        w_ptrs += w_step
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns_in, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    inside = rows_in[:, None] & columns_in[None, :]
    if RESIDUAL:
        residual = residual_ptr + (rows * residual_m)[:, None] + columns[None, :]
        acc += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + (rows * n)[:, None] + columns[None, :]
    acc = acc.to(out_ptr.dtype.element_ty)
    tl.store(out, acc, mask=inside)
    if CLAMP:
        tl.store(flag_ptr + tl.program_id(0), tl.max(overflowed(acc, inside), 0))


def default(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, norm: bool = False
) -> dict[str, int]:
    """Parameters for a product [m, k] x [k, n] that nobody tuned, with a norm in front or none."""
    return common.default(m, n, dtype, device, norm=norm)


def fits(
    params: dict[str, int], dtype: torch.dtype, *, shared_memory: int, norm: bool = False
) -> bool:
    """Whether the kernel compiles with these parameters and fits into this many bytes."""
    return common.fits(params, params["block_n"], dtype, shared_memory, norm)


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    norm: Norm | None = None,
    clamp: bool = False,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """act(norm(x) @ w^T + bias) + residual, accumulated in fp32 and rounded once.

    Args:
        x: [M, K], fp16, bf16 or fp32, last stride 1.
        w: [N, K], any strides; a Conv1D weight [K, N] is passed as `weight.t()`.
        bias: [N] or None.
        residual: [M, N] or None, last stride 1; added after the activation.
        activation: "none", "relu", "gelu" (exact), "gelu_new" and "gelu_pytorch_tanh" (tanh),
            "quick_gelu" or "silu".
        norm: of the rows of x, [K]; its result is rounded to x's dtype, as it is by itself.
        clamp: clamp all of the result, fp16, to the largest number less 1000 if an element is
            infinite, as `overflow` does; a second kernel.
        params: one value of SPACE each; None takes `default`.

    Returns:
        [M, N], contiguous, x's dtype.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other, an unknown
            activation, a last stride other than 1, or tensors that require grad.

    Example:
        >>> linear = torch.nn.Linear(64, 256, dtype=torch.float16, device="cuda") # doctest: +SKIP
        >>> x = torch.randn(8, 64, dtype=torch.float16, device="cuda")            # doctest: +SKIP
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = gemm(x, linear.weight, linear.bias, activation="gelu")
    """
    m, k = x.shape if x.ndim == 2 else (0, 0)
    n = w.shape[0]
    common.check(
        x, {"w": (w, (n, k)), "bias": (bias, (n,)), "residual": (residual, (m, n))}, activation,
        clamp,
    )  # fmt: skip
    check_rows("x", x)
    check_norm(x, norm)
    if residual is not None:
        check_rows("residual", residual)
    params = params or default(m, n, k, x.dtype, x.device, norm=norm is not None)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(m, params["block_m"]) * triton.cdiv(n, params["block_n"])
    if blocks == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    of_norm, prologue = arguments(norm, params)
    flags = flags_for(x, blocks) if clamp else None
    with common.on_device_of(x):
        launch(
            gemm_kernel, (blocks,),
            x, w, bias, residual, out, flags, *of_norm, m, n, k, x.stride(0), *w.stride(),
            0 if residual is None else residual.stride(0), activation, bias is not None,
            residual is not None, k % params["block_k"] == 0, clamp, params["block_m"],
            params["block_n"], params["block_k"], params["group_m"], *prologue,
            num_warps=params["warps"], num_stages=params["stages"], **dependent.options(x.device),
        )  # fmt: skip
        if clamp:
            clamp_flagged(out, flags)
    return out
