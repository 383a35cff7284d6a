"""Launches of Triton kernels that are worked out once, and repeated with other tensors.

A template checks its arguments and Triton binds and specialises them, which takes the host longer
than small kernels take the GPU. `Prepared` keeps the compiled kernel and its arguments, and puts in
the pointers of a call, or descriptors (TMA) of its tensors where the kernel takes those. Triton
encodes descriptors into the parameters of a launch, so that a CUDA graph keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["Prepared", "launch"]

_launches: ContextVar[list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] | None] = ContextVar(
    "launches", default=None
)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **rest: Any) -> None:
    """`kernel[grid](*args, **rest)`, noticed by the `Prepared` call that it is part of."""
    compiled = kernel[grid](*args, **rest)
    launches = _launches.get()
    # Kernels that are interpreted are not compiled.
    if launches is not None and compiled is not None:
        names = kernel.arg_names[len(args) :]
        launches.append((compiled, grid, (*args, *(rest[name] for name in names))))


class Prepared:
    """A call of a template whose tensors change and nothing else: not their shapes, nor the device.

    Args:
        function: takes tensors, launches one kernel, and returns what that wrote: one tensor or
            several, or None where it works in place.
        checked: how many of the last tensors may change their layout after all, which makes the
            call anew.
    """

    def __init__(self, function: Callable[..., Any], checked: int = 0):
        self.function, self.checked = function, checked
        self._run: Callable[..., Any] | None = None
        self._layouts: list[Any] = []

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if self._run is not None and self._layouts == self._layouts_of(inputs):
            pointers = [x.data_ptr() for x in inputs]
            union = 0
            for pointer in pointers:
                union |= pointer
            # Triton compiles for addresses that are multiples of 16.
            if union % 16 == 0:
                return self._repeat(inputs, pointers)
        launches: list[Any] = []
        token = _launches.set(launches)
        try:
            result = self.function(*inputs)
        finally:
            _launches.reset(token)
        self._keep(launches, inputs, result)
        return result

    def _layouts_of(self, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
        checked = inputs[-self.checked :] if self.checked else ()
        return [(x.shape, x.stride(), x.dtype) for x in checked]

    def _keep(self, launches: list[Any], inputs: tuple[torch.Tensor, ...], result: Any) -> None:
        """Note where inputs and results stand among the kernel's arguments."""
        self._run = None
        if len(launches) != 1:
            return
        compiled, grid, args = launches[0]
        outputs = () if result is None else result if isinstance(result, tuple) else (result,)
        tensors, given = (*inputs, *outputs), [_tensor(arg) for arg in args]
        places = [[i for i, one in enumerate(given) if one is x] for x in tensors]
        if any(x.data_ptr() % 16 for x in given if isinstance(x, torch.Tensor)) or not all(places):
            return
        # Which of two is which, the same tensor in the place of both does not tell.
        if len({id(x) for x in tensors}) != len(tensors):
            return
        changing = {place for each in places for place in each}
        # Weights must live, and stay where they are, as long as this is called.
        self._held = [arg for i, arg in enumerate(args) if i not in changing]
        self._args = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        for place in changing:
            self._args[place] = None if args[place] is given[place] else _of(args[place], None)
        self._places = places
        self._sizes = [x.shape for x in outputs]
        self._single = not isinstance(result, tuple)
        self._run = compiled[(*grid, 1, 1)[:3]]
        self._layouts = self._layouts_of(inputs)

    def _repeat(self, inputs: tuple[torch.Tensor, ...], pointers: list[int]) -> Any:
        outputs = [inputs[0].new_empty(size) for size in self._sizes]
        pointers += [x.data_ptr() for x in outputs]
        args = self._args.copy()
        for places, x, pointer in zip(self._places, (*inputs, *outputs), pointers, strict=True):
            for place in places:
                descriptor = self._args[place]
                args[place] = pointer if descriptor is None else _of(descriptor, x)
        self._run(*args)
        if self._single:
            return outputs[0] if outputs else None
        return tuple(outputs)


def _tensor(arg: Any) -> Any:
    """What a descriptor describes; anything else is what it is."""
    return getattr(arg, "base", arg)


def _of(descriptor: Any, x: torch.Tensor | None) -> Any:
    """The descriptor of another tensor of the same layout, without the checks of a new one."""
    other = object.__new__(type(descriptor))
    other.__dict__ = {**vars(descriptor), "base": x}
    return other
