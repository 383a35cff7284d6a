"""CUDA graphs behind a small seam: what `graphs` asks of a device, and no more."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError
from ..kernels.constant import constant_weights

__all__ = ["Recorder", "Recording", "no_collection", "own_workspace"]

#: The first run loads kernels, builds masks and packs weights; the second finds them, as a capture
#: has to.
_WARM_UPS = 2


class Recording:
    """One captured run: `replay` repeats it, and writes `outputs` anew."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, device: torch.device):
        self.graph: torch.cuda.CUDAGraph | None = graph
        self.outputs, self._device = outputs, device

    def replay(self) -> None:
        self.graph.replay()

    def release(self) -> None:
        """Give the memory back; a replay may still be running."""
        torch.cuda.synchronize(self._device)
        self.graph.reset()
        self.graph = self.outputs = None


class Recorder:
    """Records on CUDA devices. All recordings share one memory pool.

    Intermediate results of one may therefore lie where another has its outputs: whoever replays
    copies the outputs before the next replay, and `order`s streams.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._alive: WeakSet[Recording] = WeakSet()
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None

    @staticmethod
    def capturing() -> bool:
        return torch.cuda.is_current_stream_capturing()

    def order(self, device: torch.device) -> None:
        """Let what is launched next wait for what was replayed and copied on another stream."""
        stream = torch.cuda.current_stream(device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

    def capture(
        self, run: Callable[[], Any], device: torch.device, undo: Callable[[], None] | None = None
    ) -> Recording:
        """What `run` does on `device`, to be repeated.

        What it reads that was made before has to live as long as the recording. Weights it only
        reads.

        Args:
            undo: puts back what a run changed: those that warm up are not to count.

        Raises whatever `run` raises, and UnsupportedError where it reads values on the host.
        """
        with torch.cuda.device(device):
            if self._side is None or self._side.device != device:
                self._side = torch.cuda.Stream(device)
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(_WARM_UPS):
                    run()
                    if undo is not None:
                        undo()
            current.wait_stream(self._side)
            # A pool whose last graph is gone cannot be joined any more.
            if self._pool is None or not any(one.graph for one in self._alive):
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device, such as those that pin a data loader's batches.
            captured = torch.cuda.graph(
                graph, self._pool, self._side, capture_error_mode="thread_local"
            )
            try:
                # A capture that fails to end leaves the side stream as the current one.
                with (
                    torch.cuda.stream(current), no_collection(), own_workspace(), captured,
                    OnDevice(), constant_weights(),
                ):  # fmt: skip
                    outputs = run()
            except BaseException:
                # The allocator may still take a capture that failed to be using the pool.
                self._pool = None
                raise
        recording = Recording(graph, outputs, device)
        self._alive.add(recording)
        return recording


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage may hold another CUDA graph, which cannot be destroyed during a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def own_workspace() -> Iterator[None]:
    """Lets a capture take cuBLAS's workspace from its own memory pool, and give it back to that.

    PyTorch keeps a workspace for each stream, until somebody, such as torch.compile with CUDA
    graphs of its own, frees all of them: a graph must not have been captured with one of those.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


_READS = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__array__", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique",
    "unique_consecutive", "equal", "allclose",
}  # fmt: skip
_MOVES = {"to", "cpu", "cuda", "copy_", "type_as"}
_MAKES = {"tensor", "as_tensor"}


class OnDevice(TorchFunctionMode):
    """Refuses what waits for a device, before the device does.

    A capture that CUDA breaks off may leave PyTorch's generator and allocator as if it still ran;
    one that Python leaves ends in good order.
    """

    def __init__(self, kind: str = "cuda"):
        super().__init__()
        self.kind = kind

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS and any(map(self._holds, args)):
            raise _refused(name)
        if name == "__getitem__" and self._by_booleans(args[1]):
            raise _refused("indexing by booleans")
        if name in _MOVES and args[0].numel():
            kinds = {"cpu": "cpu", "cuda": "cuda"}
            target = kinds.get(name) or _kind_of(*args[1:], *kwargs.values())
            if target not in (None, args[0].device.type):
                raise _refused(name)
        if name in _MAKES and _kind_of(kwargs.get("device")) == self.kind:
            source = args[0] if args else kwargs["data"]
            # A cache begins with a tensor of nothing, which nobody copies.
            if not self._holds(source) and not (isinstance(source, list) and not source):
                raise _refused(f"torch.{name}")
        return func(*args, **kwargs)

    def _holds(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.device.type == self.kind

    def _by_booleans(self, index: Any) -> bool:
        indices = index if isinstance(index, tuple) else (index,)
        return any(self._holds(x) and x.dtype == torch.bool for x in indices)


def _kind_of(*places: Any) -> str | None:
    """The type of the first device, or of a tensor's, among arguments."""
    for place in places:
        if isinstance(place, torch.Tensor):
            return place.device.type
        if isinstance(place, (str, torch.device)):
            return torch.device(place).type
    return None


def _refused(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"its forward copies between the host and the GPU ({name}), which no CUDA graph can repeat"
    )
