"""Front of a gated MLP: two linear layers of the same input, multiplied, in one kernel.

A block computes the same tile of both products: it loads each tile of the input once, and neither
product goes through memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import common
from .common import SPACE, activate, check_rows, tile_of, two_products, weight_pointers
from .launch import launch
from .prologue import arguments, check_norm

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["SPACE", "default", "fits", "gated"]


@triton.jit
def gated_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, norm_ptr, shift_ptr, eps,
    m, n, k, x_m, gate_n, gate_k, up_n, up_k,
    ACT: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    NORM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of act(y @ gate^T) * (y @ up^T), y = norm(x)."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP_M)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    rows_in = rows < m
    columns_in = columns < n
    rows = rows.to(tl.int64)
    step = tl.full([], BK, tl.int64)
    gate, up = two_products(
        x_ptr + rows * x_m,
        weight_pointers(gate_ptr, columns, gate_n, gate_k, BK),
        weight_pointers(up_ptr, columns, up_n, up_k, BK),
        rows_in, columns_in, norm_ptr, shift_ptr, eps, k, step * gate_k, step * up_k,
        BM, BN, BK, EVEN_K, NORM, CHUNK,
    )  # fmt: skip
    out = out_ptr + (rows * n)[:, None] + columns[None, :]
    product = (activate(gate, ACT) * up).to(out_ptr.dtype.element_ty)
    tl.store(out, product, mask=rows_in[:, None] & columns_in[None, :])


def default(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *, norm: bool = False
) -> dict[str, int]:
    """Parameters for two products [m, k] x [k, n] that nobody tuned, after a norm or none."""
    return common.default(m, n, dtype, device, products=2, norm=norm)


def fits(
    params: dict[str, int], dtype: torch.dtype, *, shared_memory: int, norm: bool = False
) -> bool:
    """Whether the kernel compiles with these parameters and fits into this many bytes."""
    return common.fits(params, 2 * params["block_n"], dtype, shared_memory, norm)


def gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str = "silu",
    norm: Norm | None = None,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """act(y @ gate^T) * (y @ up^T), y = norm(x), accumulated in fp32 and rounded once.

    Args:
        x: [M, K], fp16, bf16 or fp32, last stride 1.
        gate, up: [N, K], any strides, such as the halves of one packed weight [2 N, K].
        activation: as in `gemm`, applied to the gate.
        norm: as in `gemm`; None takes x as it is.
        params: one value of SPACE each (block_n: columns of the result); None takes `default`.

    Returns:
        [M, N], contiguous, x's dtype.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other, an unknown
            activation, a last stride other than 1, or tensors that require grad.

    Example:
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = gated(x, mlp.gate_proj.weight, mlp.up_proj.weight)
    """
    m, k = x.shape if x.ndim == 2 else (0, 0)
    n = gate.shape[0]
    common.check(x, {"gate": (gate, (n, k)), "up": (up, (n, k))}, activation)
    check_rows("x", x)
    check_norm(x, norm)
    params = params or default(m, n, k, x.dtype, x.device, norm=norm is not None)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    blocks = common.tiles_of(m, n, params)
    if blocks == 0:
        return out
    of_norm, prologue = arguments(norm, params)
    with common.on_device_of(x):
        launch(
            gated_kernel, (blocks,),
            x, gate, up, out, *of_norm, m, n, k, x.stride(0), *gate.stride(), *up.stride(),
            activation, k % params["block_k"] == 0, params["block_m"], params["block_n"],
            params["block_k"], params["group_m"], *prologue,
            num_warps=params["warps"], num_stages=params["stages"],
        )  # fmt: skip
    return out
