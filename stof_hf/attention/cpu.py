"""The cpu backend: the C++ kernels of csrc/cpu, or torch operations where they do not build.

The kernels are a plain C library that ctypes calls with one packed struct: it compiles in seconds
because it includes no torch header, and a call costs microseconds.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import warnings
from functools import lru_cache
from typing import Any

import torch

from ..errors import BuildError, MaskError, StofWarning
from ..kernels import jit
from ..kernels.threads import openmp
from ..masks.sparse_mask import SparseMask
from . import blocked
from .checks import check
from .dropout import Dropout

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLAGS = (
    "-O3",
    "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)
# Mirrors stof::Problem in csrc/cpu/problem.h: pointers, then sizes and strides, then two doubles.
_PROBLEM = struct.Struct("15q" + "9q" + "4q" + "2q" + "2q" + "1q" + "2q" + "7q" + "2q" + "2d")


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: SparseMask | None,
    *,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys its mask allows.

    Args:
        q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; one dtype of fp32, bf16,
            fp16; any strides whose last one is 1 (else one copy).
        mask: SparseMask [B or 1, H or 1, Sq, Sk], or None: all allowed.
        bias: broadcastable to [B, H, Sq, Sk], added to the scores after softcap.
        sinks: [H], one more logit of each row's softmax, without a value.
        scale: factor of the scores. softcap: scores become softcap * tanh(score / softcap) if > 0.
        dropout: which probabilities are dropped; torch operations compute such calls.

    Returns out [B, Sq, H, Dv] in q's dtype and lse fp32 [B, H, Sq]. A row without a key gives
    zeros; keys that a row may not attend to cannot change it, not even by NaN or infinity.

    Raises what `check` raises, and MaskError where a view begins outside its mask.
    """
    check(q, k, v, mask, bias, sinks)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    if mask is not None:
        _check_rows(mask, q_len)
    library = _library() if dropout is None else None
    if library is None:
        return blocked.forward(
            q, k, v, mask,
            bias=bias, sinks=sinks, scale=scale, softcap=softcap, dropout=dropout,
        )  # fmt: skip

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(batch, q_len, heads, value_dim)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    if bias is not None:
        bias = _without_broadcast(bias).float().expand(batch, heads, q_len, kv_len)
    if sinks is not None:
        sinks = sinks.float().contiguous()

    if mask is None:
        mask_pointers, mask_sizes = (0,) * 7, (0, 0, 1, 0, 0, 0, 0)
    else:
        valid = mask.kv_valid
        mask_pointers = (
            mask.pattern_id.data_ptr(),
            mask.row_ptr.data_ptr(),
            mask.run_col.data_ptr(),
            mask.run_len.data_ptr(),
            mask.run_bits.data_ptr(),
            mask.tile_bits.data_ptr(),
            0 if valid is None else valid.data_ptr(),
        )
        mask_sizes = (
            *_strides(mask.pattern_id),
            mask.row_ptr.shape[0],
            mask.row_ptr.shape[1] - 1,
            0 if valid is None else _strides(valid)[0],
            int(mask.row_start),
            int(mask.col_start),
        )
    problem = _PROBLEM.pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        *mask_pointers,
        openmp(),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        *mask_sizes,
        batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
        _DTYPES[q.dtype],
        torch.get_num_threads(),
        scale,
        softcap,
    )
    if library(problem) != 0:
        raise MemoryError("attention on the CPU ran out of memory")
    return out, lse


def _check_rows(mask: SparseMask, q_len: int) -> None:
    """A start that is a tensor was not checked before, and the kernels trust it."""
    start, rows = int(mask.row_start), 64 * (mask.row_ptr.shape[1] - 1)
    if start < 0 or start + q_len > rows or int(mask.col_start) < 0:
        raise MaskError(
            f"rows {start} to {start + q_len} lie outside a mask of {rows} rows: build it for a "
            "longer sequence"
        )


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of a tensor that broadcasts where its length is 1."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]


def _without_broadcast(x: torch.Tensor) -> torch.Tensor:
    """x with expanded dimensions cut to length 1, so that a conversion does not fill them."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


@lru_cache(1)
def _library() -> Any | None:
    """The entry point of the C++ kernels, or None, with one warning, where there are none."""
    try:
        library = jit.load_library("stof_cpu", ["cpu/attention.cpp"], _FLAGS)
    except BuildError as error:
        warnings.warn(
            f"stof_hf: attention on the CPU runs on torch operations, correct but slower ({error})",
            StofWarning,
            stacklevel=2,
        )
        return None
    function = library.stof_attention_forward
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int
    return function
