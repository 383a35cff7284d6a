"""Steps of `generate` with a static cache, as CUDA graphs: one for each cache, as long as it lives.

With a static cache `generate` compiles its steps: it makes masks of a fixed size, and calls what
`get_compiled_call` gives it. That traces layers' own code, not what replaced them: graphs take the
place of both. Steps are given the mask that hides
padding, widened to all places of the cache, and make their own masks of it, on the device; where
the next token goes lies on the device, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache, StaticCache, StaticLayer

__all__ = ["Lengths", "Room", "counts_on_device", "methods_of", "step_of"]

#: Tokens of a step, at most.
_MOST = 16


def counts_on_device(cache: Any) -> bool:
    """Whether a cache is one whose steps can be repeated: no layer keeps a count on the host."""
    return (
        type(cache) is StaticCache
        and not cache.offloading
        and all(type(layer) is StaticLayer for layer in cache.layers)
    )


class Room:
    """A cache, told by where its keys and values lie; it is not kept alive.

    `seen` are the kinds of steps that there have been.
    """

    def __init__(self, cache: StaticCache):
        self._cache, self._places = weakref.ref(cache), _places(cache)
        self.seen: set[Any] = set()

    def holds(self, cache: Cache) -> bool:
        """Whether it is this cache, and where it was."""
        return self._cache() is cache and self._places == _places(cache)

    @property
    def gone(self) -> bool:
        return self._cache() is None


def _places(cache: StaticCache) -> list[int]:
    layers = cache.layers
    return [x.data_ptr() for y in layers for x in (y.keys, y.values, y.cumulative_length)]


class Lengths:
    """Where a cache's next token goes, to be put back after runs that are not to count."""

    def __init__(self, cache: StaticCache):
        self._now = [layer.cumulative_length for layer in cache.layers]
        self._before = [x.clone() for x in self._now]

    @torch.inference_mode()
    def put_back(self) -> None:
        torch._foreach_copy_(self._now, self._before)


def step_of(kwargs: dict[str, Any]) -> tuple[StaticCache, dict[str, Any]] | None:
    """A step's cache, and its other arguments with a mask of a fixed size; None for other calls."""
    cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    fitting = (
        kwargs.get("return_dict") is True and isinstance(ids, torch.Tensor)
        and ids.ndim == 2 and ids.shape[1] <= _MOST and counts_on_device(cache)
        and all(layer.is_initialized for layer in cache.layers)
    )  # fmt: skip
    if not fitting:
        return None
    rest = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    if mask is not None:
        places = cache.layers[0].max_cache_len
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] > places:
            return None
        # No token sees what is behind it.
        rest["attention_mask"] = F.pad(mask, (0, places - mask.shape[1]), value=1)
    return cache, rest


def methods_of(
    cls: type[nn.Module], stepping: Callable[[nn.Module, Any], Callable[..., Any]],
    takes: Callable[[nn.Module, Any, bool], bool],
) -> dict[str, Any]:  # fmt: skip
    """What a model's class with graphs says to `generate`.

    Args:
        cls: the model's own class.
        stepping: (model, compile_config) -> what is called in the place of a compiled forward.
        takes: (model, cache, whether the model may have changed) -> whether graphs are for its
            steps.
    """
    known = cls.__module__.startswith("transformers.models.")
    if not known or hasattr(cls, "create_masks_for_generate"):
        # Nobody knows what it reads off a mask's width; its masks are more than padding.
        return {}

    def create_masks_for_generate(self: nn.Module, **given: Any) -> Any:
        if takes(self, given["past_key_values"], bool(given.get("is_first_iteration"))):
            return given["attention_mask"]
        return masking_utils.create_masks_for_generate(**given)

    return {
        "create_masks_for_generate": create_masks_for_generate,
        "get_compiled_call": stepping,
    }
