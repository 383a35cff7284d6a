"""The `cuda` backend: prepares and launches the kernels of csrc/cuda.

What calls with the same mask, shapes and strides share is packed once (`calls.py`) into a C struct;
a call hands its tensors and that struct to the binding, which allocates the outputs and launches.
"""

from __future__ import annotations

import torch

from ..kernels.cuda_kernels import kernel
from ..masks.bits import TILE
from ..masks.sparse_mask import SparseMask
from . import select
from .cuda_problem import BIAS_DTYPES, PLAN, Call, aligned
from .granules import granule_plan
from .relative import Bias


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
    with_lse: bool = True,
) -> BlockCall | None:  # fmt: skip
    """See `calls.forward`; None where no kernel computes such a call, or Triton's does it sooner.

    Raises BuildError where the kernels cannot be built.
    """
    able = families(q, k, v, mask, bias, scale, softcap)
    family = select.block_kernel(able, q, k, v, mask, bias, softcap)
    if family is None:
        return None
    return BlockCall(family, q, k, v, mask, bias, sinks, scale, softcap, with_lse=with_lse)


def families(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
    bias: Bias | None, scale: float, softcap: float,
) -> list[str]:  # fmt: skip
    """The families of block-wise kernels that compute such a call on the tensors' device."""
    if mask.is_view or (bias is not None and bias.dtype not in BIAS_DTYPES):
        return []
    capability = torch.cuda.get_device_capability(q.device)
    dim = max(q.shape[3], v.shape[3])
    found = [name for name in ("hopper", "sm80") if kernel(name, dim, q.dtype, capability)]
    by_boxes = (
        v.shape[3] == q.shape[3] and scale > 0 and softcap == 0 and bias is None
        and aligned(q, k, v)
    )  # fmt: skip
    return found if by_boxes else [name for name in found if name != "hopper"]


class BlockCall(Call):
    """A prepared call of a block-wise kernel; `family` is one of `families`."""

    def __init__(
        self, family: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None, scale: float, softcap: float,
        config: select.CudaConfig | None = None, with_lse: bool = True,
    ):  # fmt: skip
        batch, heads, q_len, head_dim = q.shape
        kv_heads, kv_len, value_dim = v.shape[1:]
        dim = max(head_dim, value_dim)
        super().__init__(family, dim, q, k, v, mask, bias, sinks, scale, softcap, with_lse)
        if config is None:
            config = select.cuda_config(q, k, v, mask)
        copies = batch * heads // (2 if config.two_heads else 1)
        row_bytes = (head_dim + value_dim) * k.itemsize
        per_copy = kv_len * row_bytes * kv_heads * (1 + config.two_heads) // heads
        together = min(copies, max(1, config.l2_bytes // per_copy))
        plan = granule_plan(mask, config.layout, copies, config.workers, together)
        n_items = plan.items.shape[1]
        p = self.problem
        p.grid = min(config.workers, n_items * copies)
        p.two_heads = config.two_heads
        p.workspace_bytes = batch * heads * plan.slots * TILE * (dim + 2) * 4
        for name in PLAN:
            setattr(p.plan, name, getattr(plan, name).data_ptr())
        p.plan.n_items, p.plan.n_merges = n_items, plan.merges.shape[1]
        p.plan.n_queue, p.plan.slots = len(plan.queue) or n_items * copies, plan.slots
        if not len(plan.queue):
            p.plan.queue = None
        # The problem holds their addresses.
        self.kept = (plan, mask.pattern_id)
