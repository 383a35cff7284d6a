"""Layers of a model replaced in place, and put back.

A replaced layer keeps its modules and parameters; only its class changes, to a subclass whose
forward runs the layer's operators. So its state_dict, its copies and pickles, and what Transformers
looks for by class stay what they were.
"""

from __future__ import annotations

import copyreg
import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from .layer import Context, Layer

__all__ = ["install", "patch_of", "restore"]

#: Modules of stof_hf.patches.
FAMILIES = ("bert", "gpt2", "llama", "modernbert", "vit")
#: What a layer may be called with and still be computed by its operators, by the names that
#: Transformers' layers use; anything else that is given runs the layer's own code.
_MASK, _CACHE, _ROTARY = "attention_mask", "past_key_values", "position_embeddings"
_IGNORED = ("position_ids", "use_cache", "cache_position")


@cache
def _patches() -> dict[type[nn.Module], Callable[[nn.Module], Layer]]:
    found = {}
    for name in FAMILIES:
        patch = importlib.import_module(f"stof_hf.patches.{name}")
        found |= dict.fromkeys(patch.LAYERS, patch.layer)
    return found


def patch_of(module: nn.Module) -> Callable[[nn.Module], Layer] | None:
    """What makes a Layer of such a module, or None where no patch does."""
    return _patches().get(type(module))


class _Replaced:
    """Stands in front of a layer's class."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(_positional(type(self)), args, strict=False))
        given = {name: value for name, value in kwargs.items() if value is not None}
        known = {_MASK, _CACHE, _ROTARY, *_IGNORED}
        cls = type(self).replaced
        if self.training or torch.is_grad_enabled() or set(given) - known:
            return cls.forward(self, hidden_states, **kwargs)
        context = Context(given.get(_MASK), given.get(_CACHE), given.get(_ROTARY))
        return patch_of_class(cls)(self).run(hidden_states, context)

    def __reduce_ex__(self, protocol: int) -> Any:
        # Classes made at run time have no name to be found by.
        return _again, (type(self).replaced, self.__getstate__())


def patch_of_class(cls: type[nn.Module]) -> Callable[[nn.Module], Layer]:
    return _patches()[cls]


def _again(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = copyreg.__newobj__(_subclass(cls))
    module.__setstate__(state)
    return module


@cache
def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    # The same name: Transformers finds what it records by class or by name.
    return type(cls.__name__, (_Replaced, cls), {"replaced": cls, "__module__": cls.__module__})


@cache
def _positional(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a layer takes behind its rows."""
    return tuple(inspect.signature(cls.replaced.forward).parameters)[2:]


def install(model: nn.Module) -> int:
    """Replace every layer that a patch knows; returns how many."""
    layers = [module for module in model.modules() if patch_of(module)]
    for module in layers:
        module.__class__ = _subclass(type(module))
    return len(layers)


def restore(model: nn.Module) -> int:
    """Put every replaced layer back; returns how many. Again, it changes nothing."""
    layers = [module for module in model.modules() if isinstance(module, _Replaced)]
    for module in layers:
        module.__class__ = type(module).replaced
    return len(layers)
