"""Rows of up to three tables, looked up by ids, added up, + LayerNorm or RMSNorm.

A program holds whole rows in registers, as the norm by itself does (norm.py), whose parameters it
shares. Ids are read and rows are asked for in the same program, so that nothing but ids, rows and
the result goes through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...errors import UnsupportedError
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from .launch import launch
from .norm import MAX_COLUMNS, SPACE, default, fits
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

if TYPE_CHECKING:
    from ..parts import Norm

__all__ = ["MAX_COLUMNS", "MAX_TABLES", "SPACE", "default", "embed", "fits"]

MAX_TABLES = 3


@triton.jit
def add_looked_up(x, table_ptr, count, ids_ptr, batch_stride, token_stride, rows, tokens, m, cols,
                  N: tl.constexpr):  # fmt: skip
    """x plus rows of a table [count, N]; NaN, and nothing read, for ids outside of it."""
    places = rows // tokens * batch_stride + rows % tokens * token_stride
    ids = tl.load(ids_ptr + places, mask=rows < m, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < count)
    inside = (known & (rows < m))[:, None] & (cols < N)[None, :]
    x = add_rows(x, table_ptr, N, ids, cols, inside)
    return x + tl.where(known, 0.0, float("nan"))[:, None]


@triton.jit
def embed_kernel(
    a_ptr, b_ptr, c_ptr, a_ids_ptr, b_ids_ptr, c_ids_ptr, weight_ptr, shift_ptr, out_ptr,
    m, tokens, a_count, b_count, c_count, a_batch, a_token, b_batch, b_token, c_batch, c_token,
    eps,
    TABLES: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    RMS: tl.constexpr, SHIFT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ROWS rows; tables and out are contiguous."""
    await_kernels_before(DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    x = tl.zeros([ROWS, BLOCK_N], tl.float32)
    x = add_looked_up(x, a_ptr, a_count, a_ids_ptr, a_batch, a_token, rows, tokens, m, cols, N)
    if TABLES > 1:
        x = add_looked_up(x, b_ptr, b_count, b_ids_ptr, b_batch, b_token, rows, tokens, m, cols, N)
    if TABLES > 2:
        x = add_looked_up(x, c_ptr, c_count, c_ids_ptr, c_batch, c_token, rows, tokens, m, cols, N)
    y = normalise(x, weight_ptr, shift_ptr, cols, eps, 0.0, N, RMS, SHIFT)
    store_rows(y, out_ptr, N, rows, cols, (rows < m)[:, None] & (cols < N)[None, :])


def embed(
    tables: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    norm: Norm,
    *,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """Normalise the sums of the rows that ids look up in tables.

    An id that is not in [0, V) makes a row of NaN: PyTorch would stop the process there, and what
    lies beyond a table is never read.

    Args:
        tables: one to three, [V, N] contiguous, N <= 16384, of one dtype: fp16, bf16 or fp32.
        ids: for each table, int64 or int32: the first [B, S], others [1 or B, 1 or S]; any strides.
        norm: weight and bias [N], any float dtype.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        [B * S, N] contiguous, the tables' dtype.

    Raises:
        UnsupportedError: a dtype, shape, stride or device that is none of the above; a tensor
            that needs a gradient.

    Example:
        >>> rows = embed([words, positions], [ids, torch.arange(512)[None]], norm)
        ... # doctest: +SKIP
    """
    refuse_gradients(*tables, norm.weight, norm.bias)
    if not 1 <= len(tables) == len(ids) <= MAX_TABLES:
        raise UnsupportedError(
            f"{len(tables)} tables and {len(ids)} tensors of ids: there may be up to {MAX_TABLES}, "
            "and ids for each"
        )
    first, like = tables[0], ids[0]
    n = first.shape[-1]
    if n > MAX_COLUMNS:
        raise UnsupportedError(
            f"rows of {n} elements do not fit into registers, the longest has {MAX_COLUMNS}: "
            "leave this unfused"
        )
    for table in tables:
        check_matrix("a table", table)
        if (table.shape[1], table.dtype, table.device) != (n, first.dtype, first.device):
            raise UnsupportedError(
                f"a table is {table.dtype} {list(table.shape)} on {table.device}, the first has "
                f"rows of {n} {first.dtype} on {first.device}"
            )
        if not table.is_contiguous():
            raise UnsupportedError("a table's rows lie apart: pass table.contiguous()")
    strides = [stride for each in ids for stride in _strides(each, like, first.device)]
    check_vectors(n, first.device, norm_weight=norm.weight, norm_bias=norm.bias)
    m, tokens = like.numel(), like.shape[1]
    params = params or default(m, n, first.device)
    out = torch.empty(m, n, dtype=first.dtype, device=first.device)
    if out.numel():
        unused = MAX_TABLES - len(tables)
        with on_device_of(first):
            launch(
                embed_kernel, (triton.cdiv(m, params["rows"]),),
                *tables, *[first] * unused, *ids, *[like] * unused,
                norm.weight, norm.weight if norm.bias is None else norm.bias, out,
                m, tokens, *map(len, tables), *[0] * unused, *strides, *[0] * 2 * unused,
                norm.eps,
                TABLES=len(tables), N=n, BLOCK_N=width(n), ROWS=params["rows"], RMS=norm.rms,
                SHIFT=norm.bias is not None, num_warps=params["warps"],
                **dependent.options(first.device),
            )  # fmt: skip
    return out


def _strides(ids: torch.Tensor, like: torch.Tensor, device: torch.device) -> tuple[int, int]:
    """Between sequences and tokens; 0 where there is one for all."""
    sizes = tuple(zip(ids.shape, like.shape, strict=False))
    if ids.ndim != 2 or like.ndim != 2 or not all(n in (1, m) for n, m in sizes):
        raise UnsupportedError(f"ids {list(ids.shape)} do not fit {list(like.shape)}: expand them")
    if ids.dtype not in (torch.int64, torch.int32) or ids.device != device:
        raise UnsupportedError(
            f"ids are {ids.dtype} on {ids.device}: use int64 or int32 on {device}"
        )
    along, across = (s if n > 1 else 0 for s, n in zip(ids.stride(), ids.shape, strict=True))
    return along, across
