"""Launches of Triton kernels of which everything but the tensors is fixed."""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernel:
    """A kernel launch with everything fixed but the tensors that come first among its arguments.

    Triton specialises on whether most pointers are multiples of 16: the compiled kernel is reused
    only for tensors that are, as those of its first launch were.
    """

    def __init__(
        self, fn: Any, grid: tuple[int, ...], tensors: tuple[torch.Tensor, ...],
        rest: tuple[Any, ...], **options: Any,
    ):  # fmt: skip
        self.fn, self.tensors, self.rest, self.options = fn, tensors, rest, options
        self.grid = (*grid, 1, 1)[:3]
        self.fixed = (*(t.data_ptr() for t in tensors), *rest)
        self.compiled: Any = None

    def __call__(
        self, *tensors: torch.Tensor, more: tuple[int | torch.Tensor | None, ...] = ()
    ) -> None:
        """Launch on tensors, and on what follows them, of which alignment does not matter.

        Numbers and None in `more` are part of what the call was prepared for.
        """
        pointers = [t.data_ptr() for t in tensors]
        union = 0
        for pointer in pointers:
            union |= pointer
        for x in more:
            pointers.append(x.data_ptr() if isinstance(x, torch.Tensor) else x)
        if self.compiled is not None and union % 16 == 0:
            self.compiled[self.grid](*pointers, *self.fixed)
            return
        everything = (*tensors, *more, *self.tensors, *self.rest)
        compiled = self.fn[self.grid](*everything, **self.options)
        if union % 16 == 0:
            self.compiled = compiled
