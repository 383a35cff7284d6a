"""Layers of a model replaced in place, and put back.

A replaced layer keeps its modules and parameters; only its class changes, to a subclass whose
forward runs the layer's operators, fused as somebody chose. So its state_dict, its copies and
pickles, and what Transformers looks for by class stay what they were.
"""

from __future__ import annotations

import copyreg
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from .fused import Choice, Fused, dtype_of
from .guard import OWN_FORWARD, layer_of, refusal
from .layer import Context, Layer, attention_of, implementation
from .packing import unpack
from .parts import kind
from .runners import IMPLEMENTATIONS

__all__ = ["Found", "context_of", "find", "install", "patch_of", "restore"]

#: Modules of stof_hf.patches.
FAMILIES = ("bert", "distilbert", "gpt2", "llama", "modernbert", "t5", "vit")
#: What a layer may be called with and still be computed by its operators, by the names that
#: Transformers' layers use; anything else that is given runs the layer's own code.
_FIELDS = {
    "attention_mask": "mask", "position_embeddings": "position_embeddings",
    "position_bias": "position_bias", "encoder_hidden_states": "encoder",
    "encoder_attention_mask": "cross_mask", "encoder_decoder_position_bias": "cross_bias",
    "position_ids": "position_ids", "token_type_ids": "token_type_ids",
    "past_key_values_length": "past",
}  # fmt: skip
_CACHE = "past_key_values"
_IGNORED = frozenset(("use_cache", "cache_position", "output_attentions"))


@cache
def _patches() -> dict[type[nn.Module], Callable[[nn.Module], Layer]]:
    found = {}
    for name in FAMILIES:
        patch = importlib.import_module(f"stof_hf.patches.{name}")
        found |= dict.fromkeys(patch.LAYERS, patch.layer)
        if hasattr(patch, "EMBEDDINGS"):
            found |= dict.fromkeys(patch.EMBEDDINGS, patch.embeddings)
    return found


def patch_of(module: nn.Module) -> Callable[[nn.Module], Layer] | None:
    """What makes a Layer of such a module, or None where no patch does."""
    return _patches().get(original_class(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """A layer's class, replaced or not."""
    return type(module).replaced if isinstance(module, _Replaced) else type(module)


@dataclass(frozen=True)
class Found:
    """A layer of a model that a patch knows.

    Args:
        name: in the model. kind: shared by layers that are computed alike.
        reason: why it is left alone, or None; then `layer` says what it computes.
    """

    name: str
    module: nn.Module
    kind: str | None
    layer: Layer | None
    reason: str | None

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.layer)


def find(model: nn.Module) -> list[Found]:
    """Every layer of a model that a patch knows, replaced or not; what embeds comes last."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    tied = {place for place, count in holders.items() if count > 1}
    found = [_look_at(name, m, tied) for name, m in model.named_modules() if patch_of(m)]
    return sorted(found, key=lambda each: each.layer is not None and each.layer.enter is not None)


def _look_at(name: str, module: nn.Module, tied: set[int]) -> Found:
    layer = layer_of(module, patch_of(module))
    reason = layer if isinstance(layer, str) else refusal(module, layer, tied)
    if reason is None and "forward" in vars(module):
        reason = f"it {OWN_FORWARD}"
    if reason is None and (attention := attention_of(layer)) is not None:
        chosen = implementation(attention.module.config)
        if chosen not in IMPLEMENTATIONS:
            reason = f"its attention function is {chosen!r}: set_attn_implementation('stof')"
    if reason is not None:
        return Found(name, module, None, None, reason)
    return Found(name, module, kind(original_class(module), layer), layer, None)


def context_of(kwargs: Mapping[str, Any]) -> Context | None:
    """What a layer is called with besides its rows; None where its operators do not know it."""
    context = Context()
    for name, value in kwargs.items():
        if value is None or name in _IGNORED:
            continue
        if name == _CACHE:
            # Decoders with cross-attention have two in one.
            context.cache = getattr(value, "self_attention_cache", value)
            context.caches = None if context.cache is value else value
        elif name in _FIELDS:
            setattr(context, _FIELDS[name], value)
        else:
            return None
    return context


class _Replaced:
    """Stands in front of a layer's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Nothing else is traced: graphs are made of the layer's own code.
        if not torch.compiler.is_compiling() and not self.training:
            out = self._fused(args, kwargs)
            if out is not None:
                return out
        return type(self).replaced.forward(self, *args, **kwargs)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cls, fused = type(self), self.__dict__.get("_stof_fused")
        names = positional(cls.replaced)
        rest = kwargs | dict(zip(names, args, strict=False))
        given = rest.pop(names[0], None)
        if fused is None or given is None or not _may_fuse(given):
            return None
        context = context_of(rest)
        if context is None:
            return None
        return fused.run(self, _patches()[cls.replaced], given, context)

    def __reduce_ex__(self, protocol: int) -> Any:
        # Classes made at run time have no name to be found by.
        return _again, (type(self).replaced, self.__getstate__())


def _may_fuse(given: torch.Tensor) -> bool:
    """Whether nobody needs gradients, casts, graphs, or what modules inside of layers return."""
    if (
        torch.is_grad_enabled() or torch.is_autocast_enabled(given.device.type)
        or torch.jit.is_tracing()
    ):  # fmt: skip
        return False
    # What Transformers records, attentions for instance.
    collected = _active_collector.get()
    return collected is None or all(
        name == "hidden_states" or name.startswith("_") for name in collected
    )


def _again(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = copyreg.__newobj__(_subclass(cls))
    module.__setstate__(state)
    return module


@cache
def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    # The same name: Transformers finds what it records by class or by name.
    return type(cls.__name__, (_Replaced, cls), {"replaced": cls, "__module__": cls.__module__})


@cache
def positional(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a layer takes, in their order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def install(
    layers: list[Found], choices: Mapping[str, Mapping[int, Choice | None]] | None = None
) -> list[str]:
    """Replace layers; returns the names of those that are replaced.

    Args:
        layers: as `find` gives them; those with a reason stay as they are.
        choices: kind -> number of rows -> how it is computed then (None: by its own code), added to
            what the layer has; layers that only have their own code stay as they are. None runs
            each operator by itself.
    """
    names = []
    for found in layers:
        if found.reason is not None:
            continue
        module = found.module
        if choices is None:
            given: Mapping[int, Choice | None] = {1: Choice.unfused(found.layer)}
        else:
            given = choices.get(found.kind, {})
        before = module.__dict__.get("_stof_fused")
        kept = before.choices if before is not None and before.dtype == found.dtype else {}
        given = {**kept, **given}
        if not any(given.values()):
            continue
        module.__dict__["_stof_fused"] = Fused(given, found.dtype)
        if not isinstance(module, _Replaced):
            module.__class__ = _subclass(type(module))
        module.__dict__["_stof_fused"].prepare(module, patch_of(module))
        names.append(found.name)
    return names


def replaced(model: nn.Module) -> Iterator[nn.Module]:
    """Every replaced layer of a model."""
    return (module for module in model.modules() if isinstance(module, _Replaced))


def in_use(model: nn.Module) -> list[Any]:
    """What replaced layers made besides the weights: a CUDA graph needs it to stay."""
    return [module.__dict__["_stof_fused"].in_use() for module in replaced(model)]


def restore(model: nn.Module) -> int:
    """Put every layer that `tune` or `apply_tuned` replaced back as it was.

    Weights that were packed get memory of their own again, so that outputs are bit for bit what
    they were. Again, it changes nothing.

    Returns:
        How many layers were put back.
    """
    layers = list(replaced(model))
    for module in layers:
        layer = layer_of(module, patch_of(module))
        module.__class__ = type(module).replaced
        module.__dict__.pop("_stof_fused", None)
        if isinstance(layer, str):
            continue
        for operator in layer.operators:
            if operator.projects and len(operator.modules) > 1:
                unpack(p for m in operator.modules for p in m._parameters.values() if p is not None)
    return len(layers)
