"""Whether kernels may read weights before the kernels in front of them have ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["constant_weights", "weights_are_constant"]

_constant: ContextVar[bool] = ContextVar("constant", default=False)


@contextmanager
def constant_weights() -> Iterator[None]:
    """For the capture of a CUDA graph that writes no weight.

    A graph begins when what was launched before it has ended, so that none of its kernels finds a
    weight half written. Outside of graphs, the kernel in front may be an optimizer's.

    >>> with constant_weights():
    ...     weights_are_constant()
    True
    >>> weights_are_constant()
    False
    """
    token = _constant.set(True)
    try:
        yield
    finally:
        _constant.reset(token)


def weights_are_constant() -> bool:
    """Whether the caller is in a `constant_weights` block."""
    return _constant.get()
