"""What the templates that normalise rows share: arithmetic, checks, the device of a launch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl

from ...errors import UnsupportedError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def add_rows(x, ptr, stride, rows, cols, inside):
    """x plus elements of a matrix, in fp32."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return x + tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, ptr, stride, rows, cols, inside):
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def normalise(x, weight_ptr, shift_ptr, cols, eps, offset,
              N: tl.constexpr, RMS: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """LayerNorm or RMSNorm of rows that are fp32 and 0 beyond column N.

    The variance is of the differences from the mean: E[x^2] - E[x]^2 cancels where the mean is far
    from 0.
    """
    real = cols < N
    if not RMS:
        x = tl.where(real[None, :], x - (tl.sum(x, 1) / N)[:, None], 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
    x *= (tl.load(weight_ptr + cols, mask=real, other=0.0).to(tl.float32) + offset)[None, :]
    if SHIFT:
        x += tl.load(shift_ptr + cols, mask=real, other=0.0).to(tl.float32)[None, :]
    return x


def width(n: int) -> int:
    """Columns of the block that holds a row of n elements."""
    return max(32, triton.next_power_of_2(n))


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which x need not be on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def refuse_gradients(*tensors: torch.Tensor | None) -> None:
    """Raise where autograd would have to know of a kernel that it cannot differentiate."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UnsupportedError(
            "fused templates compute no gradients: call them under torch.no_grad(), or run the "
            "unfused modules for training"
        )


def check_matrix(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless x is a matrix of adjacent elements, of `like`'s dtype, device and shape."""
    if x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise UnsupportedError(
            f"{name} must be [rows, columns] with columns side by side, not {list(x.shape)} with "
            f"strides {list(x.stride())}: pass {name}.flatten(0, -2) or {name}.contiguous()"
        )
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"{name} is {x.dtype}: use float16, bfloat16 or float32")
    if like is not None and (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise UnsupportedError(
            f"{name} must be {like.dtype} {list(like.shape)} on {like.device}, not {x.dtype} "
            f"{list(x.shape)} on {x.device}: convert it with {name}.to(...) or expand it"
        )


def check_vectors(n: int, device: torch.device, **vectors: torch.Tensor | None) -> None:
    """Raise unless each is None or n adjacent floats on the device."""
    for name, v in vectors.items():
        if v is None:
            continue
        if v.shape != (n,) or v.device != device or not v.is_floating_point():
            raise UnsupportedError(
                f"{name} must be {n} floats on {device}, not {v.dtype} {list(v.shape)} on "
                f"{v.device}"
            )
        if not v.is_contiguous():
            raise UnsupportedError(f"{name} has gaps: pass {name}.contiguous()")
