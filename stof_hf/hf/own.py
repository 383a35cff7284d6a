"""Models whose attention does not go through Transformers' interface, made to look at its name.

A patch (stof_hf/patches) gives functions that take the place of methods of such a family's classes.
They run where the configuration says "stof"; else the method is the family's own, so that switching
back with `set_attn_implementation("eager")` leaves nothing behind. Parameters stay where they are.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import eager_mask

from ..errors import UnsupportedError, warn_once
from ..masks.sparse_mask import SparseMask
from ..masks.traced import TracedMask
from ..patches import OWN_ATTENTION
from . import attention
from .patching import pending, stamp_pending, stamp_pending_traced

# How many of the queries' rows a family's own code uses of the masks that it asks for.
_MASK_ROWS = {"longformer": 1, "led": None}

_served: set[str] = set()


def patch(module: ModuleType) -> None:
    """Patch a family's module, once it is imported; a second call changes nothing."""
    # Importing it registers "stof", which imports this module.
    from transformers.modeling_utils import PreTrainedModel

    family = module.__name__.split(".")[-2]
    if family in _served:
        return
    methods = importlib.import_module(f"stof_hf.patches.{OWN_ATTENTION[family]}").METHODS[family]
    found = {}
    for path, function in methods.items():
        cls, name = path.split(".")
        original = vars(getattr(module, cls, None) or object).get(name)
        if original is None or not _fits(function, original):
            return  # another version than the patch was written for, which is refused as before
        found[path] = (getattr(module, cls), name, original, function)
    for cls, name, original, function in found.values():
        setattr(cls, name, _switch(original, function))
    for cls in vars(module).values():
        own = isinstance(cls, type) and cls.__module__ == module.__name__
        if own and issubclass(cls, PreTrainedModel):
            # Transformers reads the module's source to see whether its attention can be switched.
            cls._can_set_attn_implementation_cached_value = True
    for table in class_tables(module):
        table["stof"] = table["eager"]
    _served.add(family)


def _fits(function: Callable[..., Any], original: Callable[..., Any]) -> bool:
    """Whether a patch's function, which takes the original first, names the same arguments."""
    own, _, *wanted = inspect.signature(function).parameters
    taken = list(inspect.signature(original).parameters)
    return wanted == ["args", "kwargs"] or [own, *wanted] == taken


def _switch(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "config", None)
        if config is None or config._attn_implementation != "stof":
            return original(self, *args, **kwargs)
        return function(self, original, *args, **kwargs)

    return method


def class_tables(module: ModuleType) -> list[dict[str, type]]:
    """The module's tables from names of attention implementations to classes, as SAM's."""
    tables = (t for t in vars(module).values() if isinstance(t, dict) and "eager" in t)
    return [t for t in tables if all(isinstance(c, type) for c in t.values())]


def serves(cls: type) -> bool | None:
    """Whether "stof" computes the attention of a model class that does it on its own.

    None for classes of all other families.
    """
    modules = {base.__module__ for base in cls.__mro__}
    for family in OWN_ATTENTION:
        if f"transformers.models.{family}.modeling_{family}" in modules:
            return family in _served
    return None


def mask_for_own_code(config: Any, **arguments: Any) -> torch.Tensor | None:
    """The additive mask that a family's own code computes with; None where it is to be sparse."""
    family = getattr(config, "model_type", None)
    if family not in _served or family not in _MASK_ROWS:
        return None
    rows = _MASK_ROWS[family] or arguments.pop("q_length")
    return eager_mask(**{**arguments, "q_length": rows})


@dataclass(frozen=True)
class Carried:
    """A mask that a family's own code hands on to its layers without a look inside.

    MPT casts its mask, which may be None; Falcon adds ALiBi to one of four dimensions.
    """

    mask: SparseMask | TracedMask | None
    ndim: ClassVar[int] = 0

    def to(self, *args: Any, **kwargs: Any) -> Carried:
        return self

    def contiguous(self) -> Carried:
        return self


def carried(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function whose masks are `Carried` where the family needs that."""

    @functools.wraps(make_mask)
    def mask_function(*args: Any, **kwargs: Any) -> Any:
        mask = make_mask(*args, **kwargs)
        config = kwargs.get("config")
        family = getattr(config, "model_type", None)
        needed = family == "mpt" or (family == "falcon" and config.alibi)
        if not needed or family not in _served or isinstance(mask, Carried):
            return mask
        return Carried(mask)

    return mask_function


def require_padding(model: nn.Module, mask: Any) -> None:
    """Raise UnsupportedError for a mask from which a model cannot compute ALiBi."""
    if mask is not None and getattr(mask, "ndim", None) != 2:
        raise UnsupportedError(
            f"{type(model).__name__} computes ALiBi from the attention mask, which must be [batch, "
            "tokens]: give a mask of padding and a dynamic cache, and patterns by "
            "stof_hf.set_pattern"
        )


def leaves_to_own_code(module: nn.Module, output_attentions: bool = False) -> bool:
    """Whether the family's own code has to compute a layer, with one warning.

    Raises UnsupportedError for a layer with a pattern of `set_pattern`.
    """
    if torch.compiler.is_compiling():
        stamp_pending_traced()
    elif pending:
        stamp_pending()
    if module.__dict__.get("_stof_stamp") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} has a sparse pattern of its own, to which set_pattern cannot "
            "add another: leave it out with set_pattern(..., modules=...)"
        )
    if not torch.compiler.is_compiling():
        output_attentions = output_attentions or attention._collects_weights()
    if not output_attentions:
        return False
    name = type(module).__name__
    why = "output_attentions=True asks for attention weights"
    warn_once(f"{name} runs the model's own code: {why}", stacklevel=5)
    return True


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SparseMask | None,
    *, scale: float | None = None, bias: torch.Tensor | None = None, dropout_p: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The op on [B, H, S, D], of the usual scale: [B, Sq, H * Dv], as layers project it."""
    out = attention.attention_by_rows(
        query, key, value, mask, scale, softcap=0.0, bias=bias, sinks=None, dropout_p=dropout_p
    )
    return out.flatten(2)


class PerForward:
    """A function of a tensor that all layers of a forward are called with, and of other arguments.

    Each value is computed once for as long as the tensor lives, and outside of compiled graphs.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.values = function, WeakIdKeyDictionary()

    @torch.compiler.disable
    def __call__(self, tensor: torch.Tensor, *args: Any) -> Any:
        known = self.values.setdefault(tensor, {})
        if args not in known:
            known[args] = self.function(tensor, *args)
        return known[args]
