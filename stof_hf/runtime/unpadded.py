"""Forwards of encoders on the real tokens of padded batches alone.

`unpad` gives a module that holds all layers of an encoder a subclass of the same name. Its forward
gathers the real tokens of a batch into one row, runs the layers on it under a mask of packed
documents, and scatters what comes out.
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from ..errors import warn_once
from ..fusion.install import FAMILIES
from ..fusion.layer import implementation
from ..hf.patching import Stamp, fallback_of, pending, stamp_pending
from ..masks.packed import is_packable
from ..masks.sparse_mask import SparseMask
from .real_tokens import RealTokens

__all__ = ["Unpadded", "padded", "routes", "subclass", "unpads"]


def unpads(model: nn.Module) -> bool:
    """Whether `unpad` changed a part of a model."""
    return any(isinstance(module, Unpadded) for module in model.modules())


_padded: ContextVar[bool] = ContextVar("padded", default=False)


@contextmanager
def padded() -> Iterator[None]:
    """Forwards are computed padded meanwhile: what a CUDA graph repeats may not read padding."""
    token = _padded.set(True)
    try:
        yield
    finally:
        _padded.reset(token)


class _Kind(type):
    """Of classes made at run time, which pickles find by what they were made of."""


copyreg.pickle(_Kind, lambda cls: (subclass, (cls.replaced,)))


class Unpadded:
    """Stands in front of a class."""


@cache
def routes() -> dict[type[nn.Module], Callable[..., Any]]:
    """How each class is run."""
    found: dict[type[nn.Module], Callable[..., Any]] = {}
    for name in FAMILIES:
        patch = importlib.import_module(f"stof_hf.patches.{name}")
        found |= dict.fromkeys(getattr(patch, "STACKS", ()), _run_stack)
        found |= dict.fromkeys(getattr(patch, "BODIES", ()), _run_body(patch))
    return found


@cache
def subclass(cls: type[nn.Module]) -> type[nn.Module]:
    run = routes()[cls]

    # The same signature: Transformers and its users look up what a forward takes.
    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (
            torch.compiler.is_compiling() or torch.jit.is_tracing() or _padded.get()
            or torch._C._len_torch_dispatch_stack() or _capturing()
        ):  # fmt: skip
            out = run(self, cls.forward, *args, **kwargs)
            if out is not None:
                return out
        return cls.forward(self, *args, **kwargs)

    # The same name: Transformers finds what it records, and saves, by class or by name.
    body = {"replaced": cls, "forward": forward, "__module__": cls.__module__}
    return _Kind(cls.__name__, (Unpadded, cls), body)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _run_stack(
    module: nn.Module, own: Callable[..., Any], hidden_states: torch.Tensor,
    attention_mask: Any = None, *rest: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """A module that embedded rows go through, under a mask made for them; None for padded."""
    if rest or not _passes(kwargs):
        return None
    made = _pack(module, len(hidden_states), {"": attention_mask})
    if made is None:
        return None
    real, masks = made
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = real.gather(kwargs["position_ids"])
    collected = (_active_collector.get() or {}).get("hidden_states", [])
    before = len(collected)
    out = real.scatter_all(own(module, real.gather(hidden_states), masks[""], **kwargs))
    collected[before:] = real.scatter_all(collected[before:])
    return out


def _run_body(patch: Any) -> Callable[..., Any]:
    """A model whose own forward embeds tokens, makes masks and runs layers."""

    def run(
        module: nn.Module, own: Callable[..., Any], input_ids: torch.Tensor | None = None,
        attention_mask: Any = None, position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = {name: x for name, x in given.items() if x is not None}
        flat = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if len(given) != 1 or not flat or not _passes(kwargs):
            return None
        if implementation(module.config) != "stof":
            return None
        name, x = given.popitem()
        made = _pack(module, len(x), patch.masks(module, x.shape[:2], attention_mask))
        if made is None:
            return None
        real, masks = made
        positions = real.columns if position_ids is None else real.gather(position_ids)
        arguments = {name: real.gather(x), "position_ids": positions, **kwargs}
        return real.scatter_all(own(module, attention_mask=masks, **arguments))

    return run


def _passes(kwargs: dict[str, Any]) -> bool:
    """Whether rows may be packed under arguments that layers are called with besides them.

    Caches, other sequences and bounds of packed ones may not be; a loss's number of items may.
    """
    return all(
        name == "position_ids" or x is None
        or isinstance(x, (bool, int, float, str, list, tuple))
        or (isinstance(x, torch.Tensor) and x.ndim == 0)
        for name, x in kwargs.items()
    )  # fmt: skip


def _pack(
    module: nn.Module, batch: int, masks: dict[str, Any]
) -> tuple[RealTokens, dict[str, SparseMask]] | None:
    """The real tokens of a batch, and masks for them; None where it is to be computed padded.

    Args:
        masks: with the same padding.
    """
    for mask in masks.values():
        if type(mask) is not SparseMask or mask.kv_valid is None or mask.pattern is None:
            return None
        if mask.q_len != mask.kv_len or mask.is_view or not is_packable(mask.pattern):
            return None
    if pending:
        stamp_pending()
    stamps, falls_back = _settings(module)
    if falls_back:
        _warn(module, 'fallback="sdpa" is set, which may make masks over all tokens of the batch')
        return None
    unknown = [stamp.pattern for stamp in stamps if not is_packable(stamp.pattern)]
    if unknown:
        _warn(module, f"its pattern {type(unknown[0]).__name__} cannot be packed")
        return None
    real = RealTokens.of(next(iter(masks.values())), batch)
    if real is None:
        return None
    made = {name: real.mask(mask.pattern, stamps) for name, mask in masks.items()}
    if any(mask is None for mask in made.values()):
        _warn(module, "padding in the middle of a sequence changes the distances of a pattern")
        return None
    return real, made


def _settings(module: nn.Module) -> tuple[list[Stamp], bool]:
    """The patterns on a module's layers, each once, and whether these may fall back to sdpa."""
    found: dict[str, Stamp] = {}
    # Layers share a configuration: one that has it stands for all.
    configured: dict[int, nn.Module] = {}
    # Every forward walks through all modules: `modules()` takes several times as long.
    left = [module]
    while left:
        inner = left.pop()
        held = inner.__dict__
        if (config := held.get("config")) is not None:
            configured[id(config)] = inner
        if (stamp := held.get("_stof_stamp")) is not None:
            found[stamp.key] = stamp
        left += held["_modules"].values()
    return list(found.values()), any(fallback_of(m) == "sdpa" for m in configured.values())


def _warn(module: nn.Module, reason: str) -> None:
    warn_once(f"stof_hf: {type(module).__name__} runs padded: {reason}", stacklevel=5)
