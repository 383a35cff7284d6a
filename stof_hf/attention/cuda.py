"""The `cuda` backend: prepares and launches the kernels of csrc/cuda.

What calls with the same mask, shapes and strides share is packed once (`calls.py`) into a C struct;
a call hands its tensors and that struct to the binding, which allocates the outputs and launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from ..masks.bits import TILE
from ..masks.sparse_mask import SparseMask
from . import select
from .cuda_problem import PLAN, Problem, kernel_function
from .granules import granule_plan


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: torch.Tensor | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    otherwise: Callable[..., Any],
) -> BlockCall | None:  # fmt: skip
    """See `calls.forward`; None where no kernel computes such a call.

    Args:
        otherwise: prepares a call elsewhere, for tensors whose rows turn out not to be aligned.

    Raises BuildError where the kernels cannot be built.
    """
    block_wise = (
        torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] in (64, 128) and v.shape[3] == q.shape[3]
        and scale > 0 and softcap == 0 and bias is None
        and not mask.is_view
        and all(x.stride(i) * 2 % 16 == 0 for x in (q, k, v) for i in range(3))
        and all(x.stride(i) > 0 for x in (q, k, v) for i in range(3))
    )  # fmt: skip
    return BlockCall(q, k, v, mask, sinks, scale, otherwise) if block_wise else None


class BlockCall:
    """A prepared call of the block-wise kernel for Hopper."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        sinks: torch.Tensor | None, scale: float, otherwise: Callable[..., Any],
        config: select.CudaConfig | None = None,
    ):  # fmt: skip
        self.function = kernel_function("hopper", q)
        self.run = torch.ops.stof_cuda.run.default
        self.otherwise, self.scale = otherwise, scale
        self.other: Any = None
        self.casts_sinks = sinks is not None and sinks.dtype != torch.float32
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
        p.describe(q, k, v, mask, scale)
        p.grid = min(config.workers, n_items * copies)
        p.two_heads = config.two_heads
        p.workspace_bytes = batch * heads * plan.slots * TILE * (dim + 2) * 4
        for name in PLAN:
            setattr(p.plan, name, getattr(plan, name).data_ptr())
        p.plan.n_items, p.plan.n_merges = n_items, plan.merges.shape[1]
        p.plan.n_queue, p.plan.slots = len(plan.queue) or n_items * copies, plan.slots
        if not len(plan.queue):
            p.plan.queue = None
        self.problem, self.address = p, ctypes.addressof(p)
        # The problem holds their addresses.
        self.kept = (plan, mask.pattern_id)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: torch.Tensor | None, sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            if self.other is None:
                self.other = self.otherwise(q, k, v, mask, bias, sinks, self.scale, 0.0, False)
            return self.other(q, k, v, mask, bias, sinks)
        if self.casts_sinks:
            sinks = sinks.float()
        tensors = (q, k, v, mask.kv_valid, None, sinks, None, None)
        return self.run(*tensors, self.function, self.address)
