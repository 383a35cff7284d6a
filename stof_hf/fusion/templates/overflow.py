"""What T5's blocks do where fp16 has overflowed: everything is clamped, in place.

One kernel looks for infinities and leaves a flag a program; the other reads all flags and, as good
as always, ends. A product whose results are clamped leaves a flag a tile instead of the first.
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
_FLAGS = 1024


def default() -> dict[str, int]:
    """Parameters of an untuned call."""
    return {"elements": 4096, "warps": 8}


def fits(params: dict[str, int]) -> bool:
    """Whether a thread's elements stay in registers."""
    return 4 <= params["elements"] // (32 * params["warps"]) <= 64


@triton.jit
def find_kernel(x_ptr, flag_ptr, count, each, ELEMENTS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Whether `each` elements from the program's first on hold an infinity."""
    await_kernels_before(DEPENDENT)
    first = tl.program_id(0).to(tl.int64) * each
    found = tl.zeros([ELEMENTS], tl.int32)
    for at in range(0, each, ELEMENTS):
        place = first + at + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32)
        found |= (tl.abs(x) == float("inf")).to(tl.int32)
    tl.store(flag_ptr + tl.program_id(0), tl.max(found, 0))


@triton.jit
def overflowed(x, inside):
    """[rows], 1 for each row of a tile in which an element that is inside is infinite."""
    return tl.max((inside & (tl.abs(x.to(tl.float32)) == float("inf"))).to(tl.int32), 1)


@triton.jit
def clamp_kernel(x_ptr, flag_ptr, flags, count, limit, ELEMENTS: tl.constexpr, FLAGS: tl.constexpr,
                 DEPENDENT: tl.constexpr):  # fmt: skip
    """Elements between -limit and limit, if there is a flag; NaN stays."""
    await_kernels_before(DEPENDENT)
    found = tl.zeros([FLAGS], tl.int32)
    for at in range(0, flags, FLAGS):
        flag = at + tl.arange(0, FLAGS)
        found |= tl.load(flag_ptr + flag, mask=flag < flags, other=0)
    if tl.max(found, 0) > 0:
        place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + place, mask=place < count)
        y = x.to(tl.float32)
        y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))
        tl.store(x_ptr + place, y.to(x.dtype), mask=place < count)


def overflow(x: torch.Tensor, *, params: dict[str, int] | None = None) -> torch.Tensor:
    """Clamp to the largest number less 1000 if an element is infinite, in place.

    Args:
        x: fp16, contiguous.
        params: of `SPACE`, for which `fits` holds; `default` chooses otherwise.

    Returns:
        x.

    Raises:
        UnsupportedError: another dtype or layout; a tensor that needs a gradient.

    Example:
        >>> hidden = overflow(hidden)  # doctest: +SKIP
    """
    refuse_gradients(x)
    if x.dtype != torch.float16 or not x.is_contiguous():
        raise UnsupportedError(f"x must be fp16 and contiguous, not {x.dtype} with {x.stride()}")
    params = params or default()
    count, elements = x.numel(), params["elements"]
    if count:
        steps = triton.cdiv(count, elements)
        each = triton.cdiv(steps, _FLAGS) * elements
        flags = flags_for(x, triton.cdiv(count, each))
        with on_device_of(x):
            launch(
                find_kernel, (len(flags),), x, flags, count, each, ELEMENTS=elements,
                num_warps=params["warps"], **dependent.options(x.device),
            )  # fmt: skip
            clamp(x, flags, params)
    return x


def flags_for(x: torch.Tensor, count: int) -> torch.Tensor:
    """Room for as many flags; whoever asks for it writes each of them."""
    return scratch(count, torch.int32, x.device)


def clamp(x: torch.Tensor, flags: torch.Tensor, params: dict[str, int] | None = None) -> None:
    """Launch what clamps x, contiguous, if one of the flags is set; on the current device."""
    params = params or default()
    elements, limit = params["elements"], torch.finfo(x.dtype).max - 1000
    launch(
        clamp_kernel, (triton.cdiv(x.numel(), elements),), x, flags, len(flags), x.numel(), limit,
        ELEMENTS=elements, FLAGS=_FLAGS, num_warps=params["warps"], **dependent.options(x.device),
    )  # fmt: skip
