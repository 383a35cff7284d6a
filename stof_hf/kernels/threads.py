"""Threads of the C++ libraries: those of the OpenMP runtime that torch has loaded.

They get a pointer to its GOMP_parallel: a library linked against a second runtime would have its
threads compete with torch's spinning ones. Without one they start threads of their own.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache


@lru_cache(1)
def openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0
