"""Whether a layer is still what its fused kernels were made for: a cheap check for every call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, contains, getitem
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from .layer import Layer

__all__ = ["Guard", "columns", "layer_of", "pointer", "refusal"]

#: Where Transformers' hooks live that record outputs; they do nothing but when it records.
RECORDING = "transformers.utils.output_capturing"
#: Of a module, why what replaces its class's forward does not run.
OWN_FORWARD = "has a forward of its own (tensor parallel, offloaded, or a patch)"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_training = attrgetter("training")
pointer = torch.Tensor.data_ptr


class Guard:
    """What is compared: submodules, their classes, hooks and forwards, and where weights lie.

    Every call compares all of it, so that it is read without a line of Python for each.

    A submodule that PEFT or a quantiser puts in another's place, a hook on any of them, dropout
    that trains, weights that were moved or replaced all make `holds` False.
    """

    def __init__(self, layer_module: nn.Module):
        inner = list(layer_module.modules())[1:]
        parents = [layer_module, *inner]
        self._children = columns((m._modules, name) for m in parents for name in m._modules)
        held = ((m._parameters, name) for m in inner for name in m._parameters)
        self._parameters = columns((d, name) for d, name in held if d[name] is not None)
        self._inner, self._types = inner, list(map(type, inner))
        self._dropouts = [m for m in inner if isinstance(m, nn.Dropout)]
        self._attributes = [m.__dict__ for m in inner]
        self._hooks = [
            *chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in inner),
            _module._global_forward_hooks, _module._global_forward_pre_hooks,
        ]  # fmt: skip
        self._expected = self.state()

    def state(self) -> tuple[Any, ...]:
        """All that is compared, by identity or as numbers."""
        return (
            list(map(getitem, *self._children)),
            list(map(type, self._inner)),
            list(map(len, self._hooks)),
            list(map(contains, self._attributes, repeat("forward"))),
            list(map(_training, self._dropouts)),
            list(map(pointer, map(getitem, *self._parameters))),
        )

    def holds(self) -> bool:
        try:
            return self.state() == self._expected
        except (KeyError, AttributeError):  # a submodule or a parameter is gone
            return False


def columns(pairs: Iterable[tuple[Any, str]]) -> tuple[list[Any], list[str]]:
    """The first and the second of all pairs."""
    firsts, seconds = [], []
    for first, second in pairs:
        firsts.append(first)
        seconds.append(second)
    return firsts, seconds


def refusal(layer_module: nn.Module, layer: Layer, tied: set[int]) -> str | None:
    """Why a layer is left alone, or None where it can be replaced.

    Args:
        tied: ids of parameters that several modules hold.
    """
    for name, inner in layer_module.named_modules():
        if inner is layer_module:
            continue
        hooks = chain(inner._forward_hooks.values(), inner._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", None) != RECORDING for hook in hooks):
            return f"{name} has forward hooks"
        if "forward" in vars(inner):
            return f"{name} {OWN_FORWARD}"
        if isinstance(inner, nn.Dropout) and inner.training and not layer_module.training:
            return f"{name} is dropout in training mode"
    names = {id(m): name for name, m in layer_module.named_modules()}
    used: list[tuple[str, nn.Parameter]] = []
    for operator in layer.operators:
        for inner in operator.modules:
            name = names.get(id(inner), type(inner).__name__)
            known = (nn.Linear, Conv1D, nn.Conv2d) if operator.projects else (nn.Embedding,)
            if operator.weighs and type(inner) not in known:
                kind = f"{type(inner).__module__}.{type(inner).__qualname__}"
                return f"{name} is a {kind}, not nn.{known[0].__name__}"
            mine = [(f"{name}.{key}", p) for key, p in inner._parameters.items() if p is not None]
            if reason := next(filter(None, (_unlike(*each) for each in mine)), None):
                return reason
            used += mine
        if operator.projects:
            biases = {inner.bias is None for inner in operator.modules}
            if len(biases) > 1:
                return "of projections side by side, some have a bias and some do not"
            if len(operator.modules) > 1 and (reason := _packable(operator.modules, names, tied)):
                return reason
    weights = [(name, p) for name, p in used if p.ndim >= 2]
    for name, parameter in weights:
        first = weights[0][1]
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            return f"{name} is {parameter.dtype} on {parameter.device}, unlike {weights[0][0]}"
    return None


def _unlike(name: str, parameter: nn.Parameter) -> str | None:
    """What keeps kernels from reading a parameter, if anything does."""
    if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
        return f"{name} is a {type(parameter.data).__name__} (tensor parallel or quantised)"
    if parameter.is_meta:
        return f"{name} is offloaded"
    return None if parameter.dtype in _DTYPES else f"{name} is {parameter.dtype}"


def _packable(modules: tuple[nn.Module, ...], names: dict[int, str], tied: set[int]) -> str | None:
    for inner in modules:
        for key, parameter in inner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in tied:
                return f"{names[id(inner)]}.{key} is tied to another module's"
            if parameter.untyped_storage().nbytes() != parameter.nbytes:
                return f"{names[id(inner)]}.{key} is part of another tensor"
    return None


def layer_of(layer_module: nn.Module, make: Any) -> Layer | str:
    """The layer's operators, or why there are none."""
    try:
        return make(layer_module)
    except UnsupportedError as error:
        return str(error)
    except (AttributeError, TypeError) as error:
        return f"its modules are not what is expected: {error}"
