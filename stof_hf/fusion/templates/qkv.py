"""Packed projection to query, key and value, with the rotary embedding in the epilogue.

A rotation mixes element d of a head with element d + D / 2. A block therefore computes two
products: the columns of a tile of pairs that lie in the first halves of their heads, and their
partners in the second halves. The elements of a pair then sit in the same register of the same
thread, whatever the head size, and tiles need not begin where heads do. Without rotary embedding
the projection is a `gemm`.
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
from .common import SPACE, check_rows, fetch_weights, tile_of, two_products, weight_pointers
from .gemm import default, fits, gemm
from .launch import launch
from .prologue import arguments, check_norm

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["SPACE", "default", "fits", "qkv"]


@triton.jit
def rotary_kernel(
    x_ptr, w_ptr, bias_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, norm_ptr, shift_ptr, eps,
    m, n, k, x_m, w_n, w_k, cos_m, sin_m, length, rotated_heads,
    HALF: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    NORM: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BM rows of BN pairs of columns of norm(x) @ w^T + bias, rotated in rotated_heads heads."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n // 2, BN), GROUP_M)
    rows = tile_m * BM + tl.arange(0, BM)
    pairs = tile_n * BN + tl.arange(0, BN)
    rows_in = rows < m
    pairs_in = pairs < n // 2
    head = pairs // HALF
    dim = pairs % HALF
    columns = head * (2 * HALF) + dim
    fetch_weights(w_ptr, columns, n, k, w_n, w_k, BN, DEPENDENT)
    fetch_weights(w_ptr, columns + HALF, n, k, w_n, w_k, BN, DEPENDENT)
    await_kernels_before(DEPENDENT)
    step = tl.full([], BK, tl.int64) * w_k
    low, high = two_products(
        x_ptr + rows.to(tl.int64) * x_m,
        weight_pointers(w_ptr, columns, w_n, w_k, BK),
        weight_pointers(w_ptr, columns + HALF, w_n, w_k, BK),
        rows_in, pairs_in, norm_ptr, shift_ptr, eps, k, step, step, BM, BN, BK, EVEN_K, NORM,
        CHUNK,
    )  # fmt: skip
    if BIAS:
        low += tl.load(bias_ptr + columns, mask=pairs_in, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias_ptr + columns + HALF, mask=pairs_in, other=0.0).to(tl.float32)[None, :]
    if POSITIONS:
        row = tl.load(positions_ptr + rows, mask=rows_in, other=0).to(tl.int64)
    else:
        row = (rows % length).to(tl.int64)
    known = (row >= 0) & (row < length)
    rotated = (pairs_in & (head < rotated_heads))[None, :]
    # A position beyond the table makes NaN of its queries and keys: wrong, but not silently.
    mask = (rows_in & known)[:, None] & rotated
    none = float("nan")
    cos = cos_ptr + (row * cos_m)[:, None] + dim[None, :]
    sin = sin_ptr + (row * sin_m)[:, None] + dim[None, :]
    cos_low = tl.load(cos, mask=mask, other=none).to(tl.float32)
    sin_low = tl.load(sin, mask=mask, other=none).to(tl.float32)
    turned_low = low * cos_low - high * sin_low
    cos_high = tl.load(cos + HALF, mask=mask, other=none).to(tl.float32)
    sin_high = tl.load(sin + HALF, mask=mask, other=none).to(tl.float32)
    turned_high = high * cos_high + low * sin_high
    low = tl.where(rotated, turned_low, low)
    high = tl.where(rotated, turned_high, high)
    out = out_ptr + (rows.to(tl.int64) * n)[:, None] + columns[None, :]
    inside = rows_in[:, None] & pairs_in[None, :]
    tl.store(out, low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, high.to(out_ptr.dtype.element_ty), mask=inside)


def qkv(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    norm: Norm | None = None,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """norm(x) @ w^T + bias, query and key heads rotated; accumulated in fp32 and rounded once.

    A head h of queries or keys becomes h * cos + rotate_half(h) * sin, as in Transformers'
    apply_rotary_pos_emb.

    Args:
        x: [M, K], fp16, bf16 or fp32, last stride 1.
        w: [(heads + 2 kv_heads) D, K], any strides: the weights of query, key and value, stacked.
        bias: [(heads + 2 kv_heads) D] or None.
        heads, kv_heads: heads of the query, and of key and value each.
        cos, sin: [P, D], any float dtype, last stride 1; None leaves out the rotation.
        positions: int32 or int64 [M], the row of cos and sin for each row of x, which must be less
            than P: others make NaN. None takes row i % P: P = S for a batch with equal positions,
            P = M for positions of each row's own.
        norm: as in `gemm`; None takes x as it is.
        params: one value of SPACE each (block_n: columns of the result); None takes `default`.

    Returns:
        [M, (heads + 2 kv_heads) D], contiguous, x's dtype. Query, key and value are views:
        `out.unflatten(-1, (-1, D)).split((heads, kv_heads, kv_heads), -2)`.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other, cos and sin that
            cover only a part of a head, a last stride other than 1, or tensors that require grad.

    Example:
        >>> cos, sin = (t.flatten(0, 1) for t in position_embeddings)             # doctest: +SKIP
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     out = qkv(x.flatten(0, 1), w, heads=32, kv_heads=8, cos=cos, sin=sin)
        >>> q, k, v = out.unflatten(-1, (-1, 128)).split((32, 8, 8), -2)          # doctest: +SKIP
    """
    m, k = x.shape if x.ndim == 2 else (0, 0)
    n, packed = w.shape[0], heads + 2 * kv_heads
    common.check(x, {"w": (w, (n, k)), "bias": (bias, (n,))})
    check_rows("x", x)
    if n % packed:
        raise UnsupportedError(
            f"w has {n} rows, no multiple of {packed} heads: stack the weights of {heads} query, "
            f"{kv_heads} key and {kv_heads} value heads of one size"
        )
    if cos is None and sin is None:
        if positions is not None:
            raise UnsupportedError("positions without cos and sin: pass all three")
        return gemm(x, w, bias, norm=norm, params=params)
    check_rotary(x, cos, sin, positions, n // packed)
    check_norm(x, norm)
    params = params or default(m, n, k, x.dtype, x.device, norm=norm is not None)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    pairs = params["block_n"] // 2
    blocks = triton.cdiv(m, params["block_m"]) * triton.cdiv(n // 2, pairs)
    if blocks == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    of_norm, prologue = arguments(norm, params)
    with common.on_device_of(x):
        launch(
            rotary_kernel, (blocks,),
            x, w, bias, cos, sin, None if positions is None else positions.contiguous(), out,
            *of_norm, m, n, k, x.stride(0), *w.stride(), cos.stride(0), sin.stride(0), cos.shape[0],
            heads + kv_heads, n // packed // 2, bias is not None, positions is not None,
            k % params["block_k"] == 0, params["block_m"], pairs, params["block_k"],
            params["group_m"], *prologue,
            num_warps=params["warps"], num_stages=params["stages"], **dependent.options(x.device),
        )  # fmt: skip
    return out


def check_rotary(
    x: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    dim: int,
) -> None:
    if cos is None or sin is None:
        raise UnsupportedError("one of cos and sin is None: pass both, or neither")
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != dim or dim % 2:
        raise UnsupportedError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must both be [positions, {dim}], an "
            "even head size: rotate outside where a model rotates a part of each head"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_rows(name, table)
        if not table.is_floating_point() or table.device != x.device:
            raise UnsupportedError(
                f"{name} is {table.dtype} on {table.device}: pass a float tensor on {x.device}"
            )
    if positions is None:
        if len(cos) == 0 or len(x) % len(cos):
            raise UnsupportedError(
                f"{len(x)} rows are no multiple of the {len(cos)} rows of cos: pass positions"
            )
    elif (
        positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64)
        or positions.device != x.device
    ):  # fmt: skip
        raise UnsupportedError(
            f"positions must be int32 or int64 [{len(x)}] on {x.device}, not "
            f"{positions.dtype} {list(positions.shape)} on {positions.device}"
        )
