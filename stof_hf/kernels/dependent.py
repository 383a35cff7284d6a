"""Triton kernels that begin while the kernel in front of them ends (programmatic dependent launch).

What a kernel sets up, and what of its weights it asks for ahead, is then hidden behind the kernel
in front. A kernel that is launched so first waits for that one, and only then reads or writes what
others write or read; each waits in turn, so that nothing older runs any more either.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["await_kernels_before", "fetch", "options", "overlaps"]


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a device can: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch: the kernel's DEPENDENT, and how Triton launches it."""
    return dict.fromkeys(("DEPENDENT", "launch_pdl"), overlaps(device))


@triton.jit
def await_kernels_before(DEPENDENT: tl.constexpr):
    """Waits for the kernel in front, and lets the one behind begin."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(ptrs):
    """Asks for the lines of these addresses to be brought into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
