"""The `cuda` backend: prepares and launches the kernels of csrc/cuda.

What calls with the same mask, shapes and strides share is packed once into a C struct and kept with
the mask; a call hands its tensors and that struct to the binding, which allocates the outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..masks.bits import TILE
from ..masks.cache import mask_for
from ..masks.patterns import Full
from ..masks.sparse_mask import SparseMask
from . import select
from .granules import granule_plan

_PATTERN = Full()
_POINTERS = ("query", "key", "value", "out", "lse", "workspace", "kv_valid", "bias", "sinks")
_PLAN = ("items", "steps", "bits", "rows", "merges", "queue")


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_PLAN, "pattern_id")),
        *(
            (name, ctypes.c_int64)
            for name in ("pattern_batch", "pattern_head", "n_items", "n_merges", "n_queue", "slots")
        ),
    ]


class Problem(ctypes.Structure):
    """`stof::Problem` of csrc/cuda/problem.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, _Strides) for name in "qkv"),
        *(
            (name, ctypes.c_int64)
            for name in (
                "bias_batch", "bias_head", "bias_row", "bias_col", "bias_dtype", "valid_batch",
                "batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim",
                "workspace_bytes", "grid", "two_heads", "device",
            )
        ),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("plan", _Plan),
    ]  # fmt: skip


def takes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask | None,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float,
) -> bool:  # fmt: skip
    """Whether the kernels compute this call."""
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] in (64, 128) and v.shape[3] == q.shape[3]
        and scale > 0 and softcap == 0 and bias is None
        and q.shape[2] > select.DECODE_ROWS
        and (mask is None or not mask.is_view)
        and (mask is None or "host_runs" in mask.plans)
        and all(_aligned(x) for x in (q, k, v))
    )  # fmt: skip


def _aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine can address the rows."""
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(s * x.itemsize % 16 == 0 and s > 0 for s in x.stride()[:3])
    )


class BlockCall:
    """A prepared call of the block-wise kernel."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask | None,
        sinks: torch.Tensor | None, scale: float, config: select.CudaConfig | None = None,
    ):  # fmt: skip
        if mask is None:
            mask = mask_for(_PATTERN, q.shape[2], k.shape[2], device=q.device)
        batch, heads, q_len, dim = q.shape
        kv_heads, kv_len = k.shape[1], k.shape[2]
        if config is None:
            config = select.cuda_config(q, k, mask)
        copies = batch * heads // (2 if config.two_heads else 1)
        per_copy = kv_len * 2 * dim * k.itemsize * kv_heads * (1 + config.two_heads) // heads
        together = min(copies, max(1, config.l2_bytes // per_copy))
        plan = granule_plan(mask, config.layout, copies, config.workers, together)
        n_items = plan.items.shape[1]
        p = Problem()
        for name, x in zip("qkv", (q, k, v), strict=True):
            setattr(p, name, _Strides(*x.stride()[:3]))
        p.batch, p.heads, p.q_len, p.head_dim = batch, heads, q_len, dim
        p.kv_heads, p.kv_len, p.value_dim = kv_heads, kv_len, v.shape[3]
        if mask.kv_valid is not None and len(mask.kv_valid) > 1:
            p.valid_batch = mask.kv_valid.shape[1]
        p.grid = min(config.workers, n_items * copies)
        p.two_heads = config.two_heads
        p.device = q.device.index
        p.scale = scale
        p.workspace_bytes = batch * heads * plan.slots * TILE * (dim + 2) * 4
        for name in _PLAN:
            setattr(p.plan, name, getattr(plan, name).data_ptr())
        ids = mask.pattern_id
        p.plan.pattern_id = ids.data_ptr() if len(mask.row_ptr) > 1 else None
        p.plan.pattern_batch = ids.shape[1] if ids.shape[0] > 1 else 0
        p.plan.pattern_head = 1 if ids.shape[1] > 1 else 0
        p.plan.n_items, p.plan.n_merges = n_items, plan.merges.shape[1]
        p.plan.n_queue, p.plan.slots = len(plan.queue) or n_items * copies, plan.slots
        if not len(plan.queue):
            p.plan.queue = None
        self.problem = p
        self.kept: tuple[Any, ...] = (plan, mask)
