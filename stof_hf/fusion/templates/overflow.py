"""What T5's blocks do where fp16 has overflowed: everything is clamped.

One kernel looks for infinities, in a sum if there is a residual, and leaves a flag a program; the
other reads all flags and, as good as always, ends. A product or a norm whose results are clamped
leaves flags in the place of the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import UnsupportedError
from ...kernels import dependent
from ...kernels.dependent import await_kernels_before
from .launch import launch, scratch
from .norm_common import on_device_of, refuse_gradients

SPACE: dict[str, tuple[int, ...]] = {"elements": (1024, 2048, 4096, 8192), "warps": (4, 8)}
#: Flags that a program of the second kernel reads at once, and the most programs of the first.
FLAGS = 1024
#: What everything lies between where an element is infinite.
LIMIT = torch.finfo(torch.float16).max - 1000


def default() -> dict[str, int]:
    """Parameters of an untuned call."""
    return {"elements": 4096, "warps": 8}


def fits(params: dict[str, int]) -> bool:
    """Whether a thread's elements stay in registers."""
    return 4 <= params["elements"] // (32 * params["warps"]) <= 64


@triton.jit
def find_kernel(
    x_ptr, residual_ptr, out_ptr, flag_ptr, count, each,
    ELEMENTS: tl.constexpr, RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Whether `each` elements from the program's first on hold an infinity; with a residual, of
    their sums, which are written."""
    await_kernels_before(DEPENDENT)
    first = tl.program_id(0).to(tl.int64) * each
    found = tl.zeros([ELEMENTS], tl.int32)
    for at in range(0, each, ELEMENTS):
        place = first + at + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + place, mask=place < count, other=0.0)
        if RESIDUAL:
            added = tl.load(residual_ptr + place, mask=place < count, other=0.0)
            x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
            tl.store(out_ptr + place, x, mask=place < count)
        found |= (tl.abs(x.to(tl.float32)) == float("inf")).to(tl.int32)
    tl.store(flag_ptr + tl.program_id(0), tl.max(found, 0))


@triton.jit
def overflowed(x, inside):
    """[rows], 1 for each row of a tile in which an element that is inside is infinite."""
    return tl.max((inside & (tl.abs(x.to(tl.float32)) == float("inf"))).to(tl.int32), 1)


@triton.jit
def flagged(flag_ptr, flags, FLAGS: tl.constexpr):
    """Whether one of the flags is set, FLAGS of which are read at once."""
    found = tl.zeros([FLAGS], tl.int32)
    for at in range(0, flags, FLAGS):
        flag = at + tl.arange(0, FLAGS)
        found |= tl.load(flag_ptr + flag, mask=flag < flags, other=0)
    return tl.max(found, 0) > 0


@triton.jit
def between(x, limit):
    """x between -limit and limit; NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def clamp_kernel(x_ptr, flag_ptr, flags, count, limit, ELEMENTS: tl.constexpr, FLAGS: tl.constexpr,
                 DEPENDENT: tl.constexpr):  # fmt: skip
    """Elements between -limit and limit, if there is a flag."""
    await_kernels_before(DEPENDENT)
    if flagged(flag_ptr, flags, FLAGS):
        place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + place, mask=place < count)
        tl.store(x_ptr + place, between(x.to(tl.float32), limit).to(x.dtype), mask=place < count)


def overflow(
    x: torch.Tensor, residual: torch.Tensor | None = None, *, params: dict[str, int] | None = None
) -> torch.Tensor:
    """Clamp to the largest number less 1000 if an element is infinite.

    Args:
        x: fp16, contiguous; clamped in place where there is no residual.
        residual: added to x, rounded to fp16, before; likewise.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        x; with a residual, the sum.

    Raises:
        UnsupportedError: another dtype or layout; a tensor that needs a gradient.

    Example:
        >>> hidden = overflow(hidden, residual)  # doctest: +SKIP
    """
    check_half(x)
    if residual is not None:
        check_half(residual, x)
    out = x if residual is None else torch.empty_like(x)
    params = params or default()
    count, elements = x.numel(), params["elements"]
    if count:
        steps = triton.cdiv(count, elements)
        each = triton.cdiv(steps, FLAGS) * elements
        flags = flags_for(x, triton.cdiv(count, each))
        with on_device_of(x):
            launch(
                find_kernel, (len(flags),), x, x if residual is None else residual, out, flags,
                count, each, ELEMENTS=elements, RESIDUAL=residual is not None,
                num_warps=params["warps"], **dependent.options(x.device),
            )  # fmt: skip
            clamp(out, flags, params)
    return out


def check_half(x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raise unless x is fp16 without gaps, of `like`'s shape and device, and wants no gradient."""
    refuse_gradients(x)
    if x.dtype != torch.float16 or not x.is_contiguous():
        raise UnsupportedError(
            f"what is clamped must be fp16 and contiguous, not {x.dtype} with strides {x.stride()}"
        )
    if like is not None and (x.shape, x.device) != (like.shape, like.device):
        raise UnsupportedError(
            f"a residual must be {list(like.shape)} on {like.device}, not {list(x.shape)} on "
            f"{x.device}"
        )


def flags_for(x: torch.Tensor, count: int) -> torch.Tensor:
    """Room for as many flags; whoever asks for it writes each of them."""
    return scratch(count, torch.int32, x.device)


def clamp(x: torch.Tensor, flags: torch.Tensor, params: dict[str, int] | None = None) -> None:
    """Launch what clamps x, contiguous, if one of the flags is set; on the current device."""
    params = params or default()
    elements = params["elements"]
    launch(
        clamp_kernel, (triton.cdiv(x.numel(), elements),), x, flags, len(flags), x.numel(), LIMIT,
        ELEMENTS=elements, FLAGS=FLAGS, num_warps=params["warps"], **dependent.options(x.device),
    )  # fmt: skip
