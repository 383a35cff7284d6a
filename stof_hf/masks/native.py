"""The host library: masks and plans made by C++ (csrc/masks, csrc/plan), in microseconds."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

import torch

from ..errors import BuildError
from ..kernels.threads import openmp
from .device import staging

_FLAGS = (
    "-O3",
    "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
    "-fvisibility=hidden",
)
# Nanoseconds of work that a thread has at least: waking one takes up to 20 us.
_GRAIN = 35_000


def threads() -> tuple[int, int, int]:
    """stof::Threads of csrc/masks/result.h: PyTorch's own, as many as it may use."""
    return openmp(), torch.get_num_threads(), _GRAIN


def library() -> ctypes.CDLL:
    """The library, built at first use. Raises BuildError where it does not build, tried once."""
    made = _library()
    if isinstance(made, str):
        raise BuildError(made)
    return made


@lru_cache(1)
def _library() -> ctypes.CDLL | str:
    """The library, or why it does not build."""
    from ..kernels import jit

    try:
        made = jit.load_library("stof_host", ["masks/mask.cpp", "plan/granules.cpp"], _FLAGS)
    except BuildError as error:
        return str(error)
    for function in (made.stof_mask, made.stof_plan):
        function.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        function.restype = ctypes.c_void_p
    made.stof_work.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    made.stof_work.restype = ctypes.c_bool
    made.stof_take.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    made.stof_take.restype = ctypes.c_bool
    return made


def take(result: int | None, size: int, device: torch.device) -> torch.Tensor:
    """The arrays that a call of the library made, `size` bytes, as one int32 tensor on the host.

    Args:
        device: where the tensor is uploaded to; see `staging`.

    Raises MemoryError where the call failed, and what `staging` raises.
    """
    taken, host = bool(result), None
    try:
        if taken:
            host = staging(size // 4, device)
    finally:
        if result:
            taken = library().stof_take(result, None if host is None else host.data_ptr())
    if not taken:
        raise MemoryError("a mask or its plan does not fit into the host's memory")
    return host
