"""Linear layers of one row, as in decoding: a weight times a vector, as fast as memory gives it.

A program computes BN columns on the ordinary cores. Weights pass through registers once, and
nothing is padded to the tiles of tensor cores. With an RMSNorm in front, each program adds up the
row's squares beside its product, so that the norm costs no pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...errors import UnsupportedError
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from . import common
from .common import activate, check_rows
from .launch import launch
from .prologue import check_norm, statistics
from .qkv import check_rotary

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["SPACE", "default", "fits", "gemv"]

#: Columns of a program, elements of the depth that it reads at once, and warps.
SPACE: dict[str, tuple[int, ...]] = {
    "block_n": (1, 2, 4, 8, 64, 128),
    "block_k": (8, 16, 32, 512, 1024, 2048),
    "warps": (2, 4, 8),
}
#: Elements of a weight that a thread holds at once: 16 bytes, and what leaves it registers.
_ELEMENTS = (8, 32)
#: Columns from which on programs of four are enough for all multiprocessors.
_MANY = 4096
#: Elements of x that a warp reads at once for a LayerNorm's statistics.
_CHUNK = 256


@triton.jit
def gemv_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, cos_ptr, sin_ptr, out_ptr, norm_ptr, shift_ptr, eps,
    k, count, w_n, w_k, rotated_heads,
    PAIR: tl.constexpr, HALF: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN of `count` columns, or pairs of columns: gate and up, or halves of heads."""
    unit = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = unit < count
    if PAIR == "rotary":
        head, dim = unit // HALF, unit % HALF
        first = head * (2 * HALF) + dim
        second = first + HALF
    else:
        first = unit
        second = unit + count
    await_kernels_before(DEPENDENT)
    at = tl.arange(0, BK)
    w_ptrs = w_ptr + (first.to(tl.int64) * w_n)[:, None] + (at.to(tl.int64) * w_k)[None, :]
    apart = (second - first).to(tl.int64) * w_n
    w_step = tl.full([], BK, tl.int64) * w_k
    if NORM == "layer":
        mean, scale = statistics(
            x_ptr + tl.arange(0, 1), tl.arange(0, 1) < 1, k, eps, 1, CHUNK, NORM
        )  # fmt: skip
    squares = tl.zeros([BK], tl.float32)
    low = tl.zeros([BN, BK], tl.float32)
    high = tl.zeros([BN, BK], tl.float32)
    for start in range(0, k, BK):
        real = at < k - start
        both = inside[:, None] & real[None, :]
        w = tl.load(w_ptrs, mask=both, other=0.0).to(tl.float32)
        if PAIR != "none":
            other = tl.load(w_ptrs + apart[:, None], mask=both, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + at, mask=real, other=0.0).to(tl.float32)
        if NORM == "rms":
            squares += x * x
        if NORM == "layer":
            x = (x - mean) * scale
        if NORM != "none":
            x *= tl.load(norm_ptr + start + at, mask=real, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                x += tl.load(shift_ptr + start + at, mask=real, other=0.0).to(tl.float32)
        low += w * x[None, :]
        if PAIR != "none":
            high += other * x[None, :]
        w_ptrs += w_step
    a = tl.sum(low, 1)
    b = tl.sum(high, 1)
    if NORM == "rms":
        # What multiplies a whole row multiplies its products as well.
        scale = tl.rsqrt(tl.sum(squares, 0) / k + eps)
        a *= scale
        b *= scale
    if BIAS:
        a += tl.load(bias_ptr + first, mask=inside, other=0.0).to(tl.float32)
        if PAIR == "rotary":
            b += tl.load(bias_ptr + second, mask=inside, other=0.0).to(tl.float32)
    a = activate(a, ACT)
    if PAIR == "gate":
        a *= b
    if PAIR == "rotary":
        turns = inside & (head < rotated_heads)
        cos_a = tl.load(cos_ptr + dim, mask=turns, other=1.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + dim, mask=turns, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + dim + HALF, mask=turns, other=1.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + dim + HALF, mask=turns, other=0.0).to(tl.float32)
        turned = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = turned
    if RESIDUAL:
        a += tl.load(residual_ptr + unit, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + first, a.to(out_ptr.dtype.element_ty), mask=inside)
    if PAIR == "rotary":
        tl.store(out_ptr + second, b.to(out_ptr.dtype.element_ty), mask=inside)


def default(count: int, *, transposed: bool = False) -> dict[str, int]:
    """Parameters for so many columns, or pairs of them, that nobody tuned.

    A weight that is transposed has columns side by side.
    """
    if transposed:
        return {"block_n": 64, "block_k": 32, "warps": 4}
    if count > _MANY:
        return {"block_n": 4, "block_k": 512, "warps": 4}
    return {"block_n": 2, "block_k": 1024, "warps": 4}


def fits(params: dict[str, int]) -> bool:
    """Whether a thread's elements are enough for its loads, and leave it registers."""
    elements = params["block_n"] * params["block_k"] / (32 * params["warps"])
    return _ELEMENTS[0] <= elements <= _ELEMENTS[1]


def gemv(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    norm: Norm | None = None,
    heads: int = 0,
    rotated_heads: int = 0,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """act(norm(x) @ w^T + bias) + residual, accumulated in fp32 and rounded once.

    Args:
        x: [1, K], fp16, bf16 or fp32, last stride 1.
        w: [N, K], any strides, [2 N, K] gated.
        bias: [N] or None.
        residual: [1, N] or None, last stride 1; added after the activation.
        activation: as in `gemm`.
        gated: w is gate above up, and the result act(y @ gate^T) * (y @ up^T), y = norm(x), without
            bias and residual.
        norm: of x, [K]; what it makes is not rounded before the product.
        heads: of D rows each that w has, where there are cos and sin.
        rotated_heads: the first of these, which become h * cos + rotate_half(h) * sin, as in `qkv`;
            without activation and residual.
        cos, sin: [1, D], any float dtype, last stride 1.
        params: one value of SPACE each; None takes `default`.

    Returns:
        [1, N], contiguous, x's dtype.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other, epilogues that
            exclude each other, or tensors that require grad.

    Example:
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = gemv(x, linear.weight, linear.bias, x, norm=norm)
    """
    m, k = x.shape if x.ndim == 2 else (0, 0)
    if m != 1:
        raise UnsupportedError(f"x must be one row [1, K], not {list(x.shape)}: `gemm` takes more")
    n = w.shape[0] // (1 + gated)
    rotary = cos is not None or sin is not None
    common.check(
        x, {"w": (w, (n * (1 + gated), k)), "bias": (bias, (n,)), "residual": (residual, (1, n))},
        activation,
    )  # fmt: skip
    check_rows("x", x)
    check_norm(x, norm)
    if norm is not None and norm.rms and norm.bias is not None:
        raise UnsupportedError("an RMSNorm with a bias: apply it outside")
    pair, half, count = "none", 1, n
    if gated or rotary:
        if residual is not None or (gated and (rotary or bias is not None)):
            raise UnsupportedError(
                "a gated product has no bias, and neither it nor a rotated one has a residual"
            )
        pair = "gate" if gated else "rotary"
    if rotary:
        if activation != "none":
            raise UnsupportedError(f"heads are rotated, not activated: {activation!r}")
        if heads < 1 or n % heads or not 0 <= rotated_heads <= heads:
            raise UnsupportedError(f"{rotated_heads} of {heads} heads of w {list(w.shape)}")
        check_rotary(x, cos, sin, None, n // heads)
        half, count = n // heads // 2, n // 2
    if residual is not None:
        check_rows("residual", residual)
    params = params or default(count, transposed=w.stride(1) != 1)
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    if n == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    of_norm = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    kind = "none" if norm is None else "rms" if norm.rms else "layer"
    with common.on_device_of(x):
        launch(
            gemv_kernel, (triton.cdiv(count, params["block_n"]),),
            x, w, bias, residual, cos, sin, out, *of_norm, k, count, *w.stride(), rotated_heads,
            pair, half, activation, bias is not None, residual is not None, kind,
            params["block_n"], params["block_k"], _CHUNK * params["warps"],
            num_warps=params["warps"], **dependent.options(x.device),
        )  # fmt: skip
    return out
