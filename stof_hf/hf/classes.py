"""What the classes of a model tell about its attention, before a model of them exists.

Read from the names that compiled code refers to, not from source text, which notebooks and frozen
applications lack.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from . import own

_ATTENTION = re.compile(r"atte?n", re.IGNORECASE)
# Gates over features, and heads that pool a sequence with a query of their own.
_NO_LAYER = re.compile(r"gatedatte?n|pool", re.IGNORECASE)
_INTERFACE = {"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"}
_SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention", "MultiheadAttention"}
_PICKED_LATER = re.compile(r"Auto(Model|Backbone)|load_backbone")


def uses_interface(cls: type) -> bool:
    """Whether a model class's attention goes through Transformers' attention interface.

    A module without attention classes is taken to combine models that are checked on their own.
    Where some attention classes of a module use the interface and others do not, what the model
    is built of tells. Families that have a patch for their own attention are told apart by that.
    """
    if (served := own.serves(cls)) is not None:
        return served
    layers = _attention_classes(cls)
    if layers and not any(map(_interface_calls, layers)):
        return False
    return not is_a_part(cls)


@functools.cache
def is_a_part(cls: type) -> bool:
    """Whether a class only attends on its own, in a module where others use the interface.

    As Gemma 4's audio tower: the models around it do run with "stof".
    """
    if own.serves(cls) is not None or not any(map(_interface_calls, _attention_classes(cls))):
        return False
    built = _built_of(cls)
    if any(map(_interface_calls, built)) or not left_alone(cls):
        return False
    return not any(_PICKED_LATER.match(n) for c in built for f in _functions(c) for n in _names(f))


@functools.cache
def left_alone(cls: type) -> tuple[str, ...]:
    """Names of the attention classes in a model class that compute on their own."""
    if own.serves(cls) is not None:
        return ()
    return tuple(sorted(c.__name__ for c in _built_of(cls) if _attends_on_its_own(c)))


def extends_mask(cls: type) -> bool:
    """Whether a layer appends to its mask if that is a tensor, as DeepSeek V4's do."""
    calls = (names for c in _attention_classes(cls) for names in _interface_calls(c))
    return any(names >= {"isinstance", "Tensor", "pad"} for names in calls)


def picked_by_name(cls: type) -> bool:
    """Whether the model's module holds a table from implementation names to classes, as SAM's."""
    return any("stof" not in t for t in own.class_tables(sys.modules[cls.__module__]))


def _attention_classes(cls: type) -> list[type]:
    """The attention classes of the module that defines a model class."""
    module = sys.modules.get(cls.__module__)
    found = vars(module).values() if module else []
    classes = [c for c in found if isinstance(c, type) and issubclass(c, nn.Module)]
    return [c for c in classes if _is_attention(c) and c.__module__ == cls.__module__]


def _is_attention(cls: type[nn.Module]) -> bool:
    return bool(_ATTENTION.search(cls.__name__)) and not issubclass(cls, PreTrainedModel)


def _attends_on_its_own(cls: type) -> bool:
    """Whether an attention class computes a softmax itself; those around others do not."""
    if not _is_attention(cls) or _NO_LAYER.search(cls.__name__) or _interface_calls(cls):
        return False
    return any(_SOFTMAX & _names_with_helpers(f) for f in _functions(cls))


def _built_of(cls: type) -> set[type]:
    """The class and the modules that its code refers to, theirs as well."""
    found, todo = {cls}, [cls]
    while todo:
        for function in _functions(todo.pop()):
            for name in _names(function):
                value = function.__globals__.get(name)
                for c in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(c, type) and issubclass(c, nn.Module) and c not in found:
                        found.add(c)
                        todo.append(c)
    return found


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The methods that build and run a module; initialising weights refers to any class."""
    for base in cls.__mro__:
        if base is PreTrainedModel or base.__module__.split(".")[0] == "torch":
            continue
        for name, f in vars(base).items():
            f = getattr(f, "__wrapped__", f)
            if isinstance(f, types.FunctionType) and name != "_init_weights":
                yield f


def _interface_calls(cls: type) -> list[set[str]]:
    """The names in each method of a class that refers to the attention interface."""
    return [names for f in _functions(cls) if _INTERFACE & (names := _names(f))]


def _names_with_helpers(
    function: types.FunctionType, known: frozenset[str] = frozenset()
) -> set[str]:
    """The names in a function and in those functions of its module that it refers to."""
    names = _names(function)
    for name in names - known:
        helper = function.__globals__.get(name)
        if isinstance(helper, types.FunctionType) and helper.__module__ == function.__module__:
            names = names | _names_with_helpers(helper, known | names)
    return names


def _names(function: types.FunctionType) -> set[str]:
    return _names_in(function.__code__)


def _names_in(code: types.CodeType) -> set[str]:
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(code.co_freevars, *inner)
