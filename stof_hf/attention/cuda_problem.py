"""`stof::Problem` of csrc/cuda/problem.h: what a call of the CUDA kernels is given."""

from __future__ import annotations

import ctypes

import torch

from ..errors import BuildError
from ..kernels import cuda_build
from ..masks.sparse_mask import SparseMask
from .relative import Bias, RelativeBias

_POINTERS = (
    "query", "key", "value", "out", "lse", "workspace", "kv_valid", "bias", "sinks", "row_start",
    "col_start",
)  # fmt: skip
MASK = ("row_ptr", "run_col", "run_len", "run_bits", "tile_bits")
#: In the order of the constants of problem.h.
BIAS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAN = ("items", "steps", "bits", "rows", "merges", "queue")


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*PLAN, "pattern_id")),
        *(
            (name, ctypes.c_int64)
            for name in ("pattern_batch", "pattern_head", "n_items", "n_merges", "n_queue", "slots")
        ),
    ]


class _Mask(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in MASK),
        *((name, ctypes.c_int64) for name in ("tile_rows", "row_start", "col_start")),
    ]


class Problem(ctypes.Structure):
    """`stof::Problem` of csrc/cuda/problem.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, Strides) for name in "qkv"),
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
        ("mask", _Mask),
        ("splits", ctypes.c_int64),
        *(
            (name, ctypes.c_int64)
            for name in ("with_lse", "offset", "left", "right", "rows", "together")
        ),
    ]  # fmt: skip

    def describe(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask, scale: float,
        softcap: float = 0.0, bias: Bias | None = None,
    ) -> None:  # fmt: skip
        """Fill in sizes and strides, and which of the mask's patterns each head uses."""
        for name, x in zip("qkv", (q, k, v), strict=True):
            setattr(self, name, Strides(*x.stride()[:3]))
        self.batch, self.heads, self.q_len, self.head_dim = q.shape
        self.kv_heads, self.kv_len, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        if mask.kv_valid is not None and len(mask.kv_valid) > 1:
            self.valid_batch = mask.kv_valid.shape[1]
        self.device, self.scale, self.softcap = q.device.index, scale, softcap
        if bias is not None:
            sizes = zip(bias.shape, bias.stride(), strict=True)
            strides = [0 if size == 1 else stride for size, stride in sizes]
            self.bias_batch, self.bias_head, self.bias_row, self.bias_col = strides
            self.bias_dtype = BIAS_DTYPES.index(bias.dtype)
        ids = mask.pattern_id
        if len(mask.row_ptr) > 1:
            self.plan.pattern_id = ids.data_ptr()
            self.plan.pattern_batch = ids.shape[1] if ids.shape[0] > 1 else 0
            self.plan.pattern_head = 1 if ids.shape[1] > 1 else 0


class Call:
    """A prepared call of a kernel; the subclass fills in the rest of `problem`.

    Args:
        family, dim: the kernel, and the head size that it was compiled for.
        with_lse: False where nobody needs the second result, which is None then.

    Raises BuildError where the kernel cannot be built.
    """

    def __init__(
        self, family: str, dim: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask: SparseMask, bias: Bias | None, sinks: torch.Tensor | None, scale: float,
        softcap: float, with_lse: bool,
    ):  # fmt: skip
        kernels = cuda_build.library(family, dim, q.dtype, q.device.index)
        if kernels.stof_problem_bytes() != ctypes.sizeof(Problem):
            raise BuildError(
                "csrc/cuda/problem.h and stof_hf/attention/cuda_problem.py do not agree"
            )
        cuda_build.binding()
        self.run = torch.ops.stof_cuda.run.default
        self.function = ctypes.cast(kernels.stof_run, ctypes.c_void_p).value
        self.casts_sinks = sinks is not None and sinks.dtype != torch.float32
        self.starts = [isinstance(s, torch.Tensor) for s in (mask.row_start, mask.col_start)]
        self.problem = Problem()
        self.problem.with_lse = with_lse
        self.problem.describe(q, k, v, mask, scale, softcap, bias)
        self.address = ctypes.addressof(self.problem)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: SparseMask,
        bias: Bias | None, sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        if self.casts_sinks:
            sinks = sinks.float()
        if isinstance(bias, RelativeBias):
            bias = bias.first
        row_start = mask.row_start if self.starts[0] else None
        col_start = mask.col_start if self.starts[1] else None
        return self.run(
            q, k, v, mask.kv_valid, bias, sinks, row_start, col_start, self.function, self.address
        )


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of tensors of 2-byte elements begins at a multiple of 16 bytes, and no
    stride of 0 stands for elements that are not there: what the copy engine asks for."""
    return all(
        x.data_ptr() % 16 == 0 and all(x.stride(i) > 0 and x.stride(i) % 8 == 0 for i in range(3))
        for x in tensors
    )
