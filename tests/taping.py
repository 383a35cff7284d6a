"""What stands in for CUDA graphs on the CPU: a tape of operators, repeated on the same memory.

Python does not run again in a replay, so that whatever it decided or read while the tape was made
shows where it was wrong for other inputs. Reading values while recording is an error, as on a GPU.
Below, the calls that tests of either make and compare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stof_hf import MaskError, SparseMask, UnsupportedError
from stof_hf.hf import masks

_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


@contextlib.contextmanager
def _no_builds() -> Iterator[None]:
    """Masks that are not there already cannot be built, as while a graph is captured."""

    def build(*_: Any, **__: Any) -> Any:
        raise MaskError("a mask cannot be built while a CUDA graph is captured")

    with contextlib.ExitStack() as stack:
        for name in ("from_pattern", "from_function", "from_dense", "from_block_mask"):
            stack.enter_context(patch.object(SparseMask, name, build))
        yield


class _Taping(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _READS:
            raise UnsupportedError(f"{func} reads values on the host")
        out = func(*args, **kwargs)
        shared = _storages((args, kwargs))
        # Views and what works in place need no copy.
        written = [None if _storages(x) & shared else x for x in tree_leaves(out)]
        self.steps.append((func, args, kwargs, written))
        return out


class Tape:
    """As `stof_hf.runtime.recorder.Recording`."""

    def __init__(self, recorder: TapeRecorder, steps: list[Any], outputs: Any):
        self.recorder, self.steps, self.outputs = recorder, steps, outputs

    def replay(self) -> None:
        # Memory is shared: what another replay left in it is gone.
        for tape in self.recorder.tapes:
            tape.poison()
        for func, args, kwargs, written in self.steps:
            for old, new in zip(written, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
        self.recorder.replays += 1

    def poison(self) -> None:
        for *_, written in self.steps:
            for x in written:
                if isinstance(x, torch.Tensor):
                    x.fill_(float("nan") if x.is_floating_point() else 77)

    def release(self) -> None:
        self.recorder.tapes.remove(self)
        self.poison()


class TapeRecorder:
    """As `stof_hf.runtime.recorder.Recorder`."""

    device_type = "cpu"
    #: The last one that was made.
    latest: TapeRecorder

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.captures = self.replays = 0
        TapeRecorder.latest = self

    @staticmethod
    def capturing() -> bool:
        return False

    def order(self, device: torch.device) -> None:
        pass

    def capture(self, run: Any, device: torch.device, undo: Any = None) -> Tape:
        self.captures += 1
        # A GPU is not asked whether a mask is all ones.
        undo = undo or (lambda: None)
        with patch.object(masks, "_all_ones_for_free", lambda _: False):
            run()
            undo()
            # What Transformers asks before it reads a mask.
            asked = "transformers.utils.import_utils.is_cuda_stream_capturing"
            with patch(asked, lambda: True), _no_builds(), _Taping() as taping:
                outputs = run()
            undo()
        tape = Tape(self, taping.steps, outputs)
        self.tapes.append(tape)
        return tape


def ids(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


def masked(batch, length, left=0, right=0, seed=0, dtype=torch.int64):
    """Inputs whose first row is padded on the right and whose last one is on the left."""
    mask = torch.ones(batch, length, dtype=dtype)
    mask[0, length - right :] = 0
    mask[-1, :left] = 0
    return {"input_ids": ids(batch, length, seed), "attention_mask": mask}


def same(got, wanted, mask=None, tolerance=2e-6):
    """Equal, but for tokens that the mask hides."""
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if mask is not None and got.shape[:2] == mask.shape:
            got, wanted = got[mask.bool()], wanted[mask.bool()]
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=1e-5)
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key in wanted:
            same(got[key], wanted[key], mask, tolerance)
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other, mask, tolerance)
    else:
        assert got is wanted is None


@torch.no_grad()
def compare(model, plain, calls, tolerance=2e-6, **options):
    """All calls first, so that a result that a later call writes to shows."""
    results = [model(**call, **options) for call in calls]
    for got, call in zip(results, calls, strict=True):
        same(got, plain(**call, **options), call.get("attention_mask"), tolerance)
