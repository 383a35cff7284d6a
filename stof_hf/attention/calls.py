"""Calls of GPU kernels, prepared once and kept with the mask.

Everything that a call with the same mask, shapes, strides and alignment repeats - the work list,
the grid, the compiled kernel - is worked out when it is first seen; a later call launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..masks.cache import mask_for
from ..masks.device import keep
from ..masks.patterns import Full
from ..masks.sparse_mask import SparseMask
from .checks import check
from .relative import Bias

FULL_PATTERN = Full()
#: A mask used with ever new shapes must not keep them all.
_MOST_CALLS = 256

Prepare = Callable[..., Any]


def forward(
    name: str, prepare: Prepare, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: SparseMask | None, *, bias: Bias | None = None,
    sinks: torch.Tensor | None = None, scale: float, softcap: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run what `prepare` makes of such a call; returns (out [B, Sq, H, Dv], lse fp32 [B, H, Sq]).

    Args:
        name: under which the mask keeps the prepared calls.
        prepare: (q, k, v, mask, bias, sinks, scale, softcap, on_device) -> an object that is called
            with (q, k, v, mask, bias, sinks), and with the seed where there is one. on_device:
            nothing may be read back to the host.
        seed: of dropout, int64 [1].
    """
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return forward(
                name, prepare, q, k, v, mask, bias=bias, sinks=sinks, scale=scale, softcap=softcap,
                seed=seed,
            )  # fmt: skip
    if mask is None:
        mask = mask_for(FULL_PATTERN, q.shape[-2], k.shape[-2], device=q.device)
    valid = mask.kv_valid
    key = (
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0,
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device, scale, softcap,
        None if valid is None else valid.shape,
        None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
        mask.q_len, mask.kv_len,
        mask.row_start if isinstance(mask.row_start, int) else None,
        mask.col_start if isinstance(mask.col_start, int) else None,
    )  # fmt: skip
    calls = mask.plans.setdefault(name, {})
    call = calls.get(key)
    if call is None:
        check(q, k, v, mask, bias, sinks)
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        on_device = capturing or "host_runs" not in mask.plans
        call = keep(
            lambda: _Call(prepare, q, k, v, mask, bias, sinks, scale, softcap, on_device), q.device
        )
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        # What a capture computes belongs to its graph.
        if not capturing:
            calls[key] = call
    if seed is not None:
        return call(q, k, v, mask, bias, sinks, seed)
    return call(q, k, v, mask, bias, sinks)


class _Call:
    """A prepared call behind what all backends ask of their tensors: rows side by side."""

    def __init__(
        self, prepare: Prepare, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask: SparseMask, bias: Bias | None, *rest: Any,
    ):  # fmt: skip
        self.copies = any(x.stride(3) != 1 for x in (q, k, v))
        if self.copies:
            q, k, v = _rows_together(q, k, v)
        if bias is not None and bias.ndim < 4:
            bias = bias[(None,) * (4 - bias.ndim)]
        self.call = prepare(q, k, v, mask, bias, *rest)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.copies:
            q, k, v = _rows_together(q, k, v)
        return self.call(q, k, v, *rest)


def _rows_together(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors whose elements of one row lie side by side."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]
