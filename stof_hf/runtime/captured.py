"""One captured forward: its arguments, the buffers that it reads, and how results leave it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import StaticCache

from ..errors import UnsupportedError
from ..fusion.install import in_use
from ..masks.cache import noting
from .buckets import Facts, Size, Unknown, copy_out, padded_shape
from .recorder import Recorder, Recording
from .steps import Lengths
from .unpadded import padded

__all__ = ["Captured", "arguments_of", "shapes_of"]


class Captured:
    """One recording with the buffers that it reads."""

    recording: Recording
    _size: Size | None = None

    def __init__(
        self, recorder: Recorder, model: nn.Module, facts: Facts | None,
        tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any],
        sizes: tuple[Size, Size] | None, cache: StaticCache | None = None,
    ):  # fmt: skip
        """Captures.

        Args:
            cache: to which the forward adds its tokens, and which is then none of its outputs.
        """
        forward, arguments = type(model).replaced.forward, dict(plain)
        self._facts, self._as_tuple = facts, False
        if facts is not None:
            wanted = arguments.get("return_dict")
            self._as_tuple = not (model.config.return_dict if wanted is None else wanted)
            # What outputs are is known by their names.
            arguments["return_dict"] = True
            cached = arguments.get("use_cache", getattr(model.config, "use_cache", False))
            if facts.causal and not cached and "attention_mask" not in tensors:
                arguments["past_key_values"] = _NOTHING_BEFORE
        undo, inference = None, False
        if cache is not None:
            arguments["past_key_values"] = cache
            # What inference mode made may only be written to in it.
            undo, inference = Lengths(cache).put_back, cache.layers[0].keys.is_inference()
        device = next(iter(tensors.values())).device
        with torch.inference_mode(False), torch.no_grad():
            self._static = {
                name: torch.zeros(shape, dtype=tensors[name].dtype, device=device)
                for name, shape in shapes_of(tensors, sizes)
            }
            self._fill(tensors, sizes)
            # Transformers leaves out a mask of ones, but never while a graph is captured: the
            # warm-up has to take the same way.
            for name, x in self._static.items():
                if name.endswith("attention_mask") and x.ndim == 2:
                    x[:, 0] = 0

            def run() -> Any:
                # What was made of a tensor's values and kept for its version is not for a graph.
                torch.autograd.graph.increment_version([*self._static.values()])
                with torch.inference_mode(inference), torch.no_grad():
                    return forward(model, **self._static, **arguments)

            with _no_mask_stays_none(), noting() as masks, padded():
                try:
                    self.recording = recorder.capture(run, device, undo)
                except BaseException:
                    if undo is not None:
                        undo()
                    raise
            if cache is not None:
                self._leave_out_the_cache()
            self._held = [*map(_read_of, masks), *in_use(model)]
        self._size = None

    def _leave_out_the_cache(self) -> None:
        """A recording does not keep it alive."""
        outputs = dataclasses.replace(self.recording.outputs, past_key_values=_NOTHING_BEFORE)
        self.recording.outputs = outputs
        try:
            # A step that was taken cannot be given back.
            copy_out(outputs, _NOTHING_BEFORE)
        except Unknown as unknown:
            self.recording.release()
            raise UnsupportedError(f"it returns {unknown}") from unknown

    def __call__(
        self, tensors: Mapping[str, torch.Tensor], sizes: tuple[Size, Size] | None,
        cache: StaticCache | None = None,
    ) -> Any:  # fmt: skip
        self._fill(tensors, sizes)
        self.recording.replay()
        real = (self._facts, *sizes) if sizes is not None else ()
        out = copy_out(self.recording.outputs, _NOTHING_BEFORE, *real, instead=cache)
        return out.to_tuple() if self._as_tuple else out

    def _fill(self, tensors: Mapping[str, torch.Tensor], sizes: tuple[Size, Size] | None) -> None:
        if self._size is None or (sizes is not None and sizes[0] != self._size):
            static = self._static.values()
            if sizes is None:
                self._targets = list(static)
            else:
                self._size = sizes[0]
                # Views that inference mode makes may not be written to outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    # Padding hides what an earlier call left behind it, but not that it is NaN.
                    torch._foreach_zero_(list(static))
                    self._targets = [x[: self._size[0], : self._size[1]] for x in static]
        torch._foreach_copy_(self._targets, [tensors[name] for name in self._static])


_patching = threading.Lock()


@contextlib.contextmanager
def _no_mask_stays_none() -> Iterator[None]:
    """Let Transformers leave out a mask that nobody gave, in a capture as outside.

    Transformers 5.17 takes a capture for tracing, in which it makes a dense mask of ones, and with
    it PyTorch's attention is several times as slow. What it asks of masks that are there stays.
    """
    with _patching:
        own = masking_utils.is_tracing
        masking_utils.is_tracing = lambda tensor=None: tensor is not None and own(tensor)
        try:
            yield
        finally:
            masking_utils.is_tracing = own


class _NothingBefore:
    """A cache without a token that keeps none, for decoders without a mask.

    Without a cache, Transformers looks for packed sequences in the positions, which in a capture it
    has to take for granted: a mask as dense as padding's would follow.
    """

    is_compileable = False

    def get_seq_length(self, *_: Any) -> int:
        return 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        return keys, values


_NOTHING_BEFORE = _NothingBefore()


def _read_of(mask: Any) -> list[Any]:
    """A mask with what kernels were prepared of it: the mask itself does not keep that for ever."""
    kept = [list(x.values()) if isinstance(x, dict) else x for x in mask.plans.values()]
    derived = getattr(mask, "_derived", {})
    return [mask, kept, *map(_read_of, derived.values())]


def shapes_of(
    tensors: Mapping[str, torch.Tensor], sizes: tuple[Size, Size] | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of a graph's buffers."""
    shapes = ((name, tensors[name].shape) for name in sorted(tensors))
    if sizes is None:
        return tuple((name, tuple(shape)) for name, shape in shapes)
    return tuple((name, padded_shape(shape, *sizes)) for name, shape in shapes)


@cache
def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def arguments_of(
    cls: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], cached: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """A call's tensors and plain values by name; None for what no graph is to run.

    Args:
        cached: the call has a cache besides.
    """
    defaults = _defaults(cls)
    given = [*zip(defaults, args, strict=False), *kwargs.items()]
    if len(args) > len(defaults) or len(dict(given)) < len(given):
        return None
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in given:
        if isinstance(value, torch.Tensor):
            dense = type(value) is torch.Tensor and value.layout == torch.strided
            # Losses are for training; bounds of packed sequences are read on the host.
            if not dense or not value.numel() or "label" in name or name.startswith("cu_seq"):
                return None
            tensors[name] = value
        elif value is None and defaults.get(name) is None:
            continue
        elif type(value) in (type(None), bool, int, float, str):
            plain[name] = value
        else:
            return None
    mask = tensors.get("attention_mask")
    if not tensors or (mask is not None and mask.ndim not in (2, 4)):
        return None
    # Without a mask and a cache, positions say where packed sequences begin.
    packed = mask is None and not cached and "position_ids" in tensors
    return None if packed else (tensors, plain)
