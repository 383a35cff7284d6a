"""CUDA graphs of torch.compile: torch before 2.13 asserts what need not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["any_traces"]


@contextmanager
def any_traces() -> Iterator[None]:
    """Let outputs of a graph have no stack trace, as from torch 2.13 on.

    Traces are for messages alone. A graph that writes a static cache has fewer of them than
    outputs, and torch ends with an AssertionError where the next step begins.
    """
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    own = CUDAGraphTreeManager.dealloc_current_path_weakrefs

    def dealloc(manager: Any) -> None:
        for node in manager.current_node._path_from_root:
            outputs = len(node.tensor_weakrefs)
            node.stack_traces = [*node.stack_traces, *[None] * outputs][:outputs]
        own(manager)

    CUDAGraphTreeManager.dealloc_current_path_weakrefs = dealloc
    try:
        yield
    finally:
        CUDAGraphTreeManager.dealloc_current_path_weakrefs = own
